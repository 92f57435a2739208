"""How much the TPU kernels take at once, by generation of TPU.

The numbers come from the compiler's schedules of each generation: LOG.md.
"""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Tiles:
    """What the kernels take at once; each size is cut down to what a call has.

    Attributes:
      keys: keys that a query tile meets in one turn of its loop, in whole blocks. A larger turn
        leaves the compiler more to do while it waits.
      logits: logits of such a turn.
      piece: keys of which a turn of the forward pass makes weights while it computes the logits of
        the next; a turn has two such pieces, unless they would be smaller than this.
      query_tiles: query tiles that a key block meets in one turn, in the backward pass.
      block_logits: logits of such a turn.
    """

    keys: int = 1024
    logits: int = 512 * 1024
    piece: int = 512
    query_tiles: int = 4
    block_logits: int = 256 * 1024

    def __post_init__(self):
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(
                    f"{field.name} is {getattr(self, field.name)}; it must be at least 1."
                )


def tiles_for(device_kind: str) -> Tiles:
    """The sizes for a device.

    Args:
      device_kind: as jax names it: 'TPU v5 lite' and 'TPU v5' take small pieces.

    >>> [tiles_for(kind).piece for kind in ("TPU v5 lite", "TPU v6 lite", "TPU7x")]
    [128, 512, 512]
    """
    return Tiles(piece=128) if device_kind.startswith("TPU v5") else Tiles()


def turns(at_most: int) -> list[int]:
    """How many are taken in one turn: as many as allowed, then half as many, down to one.

    >>> turns(11)
    [8, 4, 2, 1]
    """
    return [1 << i for i in reversed(range(at_most.bit_length()))]


def ring_stages(at_once: int) -> int:
    """Steps that a ring of copies holds: two at least are under way while a turn is worked on.

    >>> ring_stages(1), ring_stages(8)
    (3, 16)
    """
    return max(3, 2 * at_once)
