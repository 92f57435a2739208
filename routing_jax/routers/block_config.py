"""What a block router is and what it may spend."""

from dataclasses import dataclass
from typing import Literal, get_args

BlockRouterKind = Literal[
    "pooled", "learned", "indexer", "clusters", "random", "window", "strided", "bigbird"
]
BlockBudget = Literal["blocks", "fraction", "mass", "gates"]
BlockPooling = Literal["mean", "learned"]
BlockImplementation = Literal["xla", "masked", "mosaic_gpu", "mosaic_tpu"]

FIXED = ("window", "strided", "bigbird")
_BUDGETS: dict[str, tuple[str, ...]] = {
    "mass": ("pooled", "learned", "indexer"),
    "gates": ("learned", "indexer", "random", "window"),
}


@dataclass(frozen=True)
class BlockRouterConfig:
    """Which key blocks a tile of queries attends to, and how many.

    A tile of block_q queries has one row of blocks for each kv head. It is decided from the tile's
    first query and from blocks that were complete before it, so training, prefill and decode
    agree. A row always lists the tile's own block, the local ones before it and the sinks.

    Attributes:
      kind: pooled: q · mean(k of the block), nothing learned (MoBA's rule). learned: the same
        with projections of its own, turned by their places in blocks (RoPE, as SeerAttention's
        gate), whose gate enters attention. indexer: those projections, of inputs that get no
        gradient, trained by distillation and by what their budget costs. clusters: blocks in the
        tile's cluster. random: projections that are never trained. window, strided, bigbird: fixed
        patterns (with sinks the first is the usual sink + window, and the last one's sinks are its
        global blocks).
      block_q: queries a tile; divides block_kv. 1 routes each query by itself.
      block_kv: keys a block.
      sinks: first blocks of the sequence that every row lists.
      local: blocks before the tile's own one that every row lists.
      budget: blocks: so many a row. fraction: that share of the blocks a row can see. mass: as
        many as hold that share of the row's softmax over the scores. gates: those whose gate is
        open, so that λ on `cost` decides; an indexer's are taught by distillation and by attention.
        Of kinds that don't look, gates are controls: with random scores each head learns how many
        blocks it wants, with a window how far it wants to see.
      blocks: for budget 'blocks', how many a row lists, with all that it always lists.
      fraction: for budget 'fraction'; for 'mass' and 'gates' the most that a row may list.
      mass: for budget 'mass'.
      width: R, of the projections of 'learned', 'indexer' and 'random'.
      pooling: of the tokens of a block, for those projections. mean: all weigh the same. learned: a
        token x weighs exp(x·d), d learned, so that what is looked for stands out. For 'learned' and
        'indexer'.
      clusters: E, for kind 'clusters'.
      fanout: 0 scores every block; else the search descends a tree of pooled keys with so many
        children a node, as broad as the row is long: O(log T) scores a row. For 'pooled' and
        'learned'.
      distil: for kind 'indexer', the share of tiles, drawn anew at each step, of which training
        computes dense attention's map and the divergence from it (the auxiliary loss).
      bias: initial logit of the gates.
      temperature: of the soft gate or cluster behind a straight-through gradient.
      implementation: of block-sparse attention; None for the best one here.

    >>> BlockRouterConfig(block_q=128, block_kv=64)
    Traceback (most recent call last):
    ...
    ValueError: blocks.block_q is 128; it must divide blocks.block_kv = 64.
    """

    kind: BlockRouterKind = "learned"
    block_q: int = 64
    block_kv: int = 64
    sinks: int = 1
    local: int = 0
    budget: BlockBudget = "fraction"
    blocks: int = 8
    fraction: float = 0.25
    mass: float = 0.9
    width: int = 32
    pooling: BlockPooling = "mean"
    clusters: int = 8
    fanout: int = 0
    distil: float = 0.0
    bias: float = 2.0
    temperature: float = 1.0
    implementation: BlockImplementation | None = None

    def __post_init__(self):
        choices = ("kind", BlockRouterKind), ("budget", BlockBudget), ("pooling", BlockPooling)
        for name, kind in choices:
            value = getattr(self, name)
            if value not in get_args(kind):
                raise ValueError(
                    f"blocks.{name} is {value!r}; accepted: {', '.join(get_args(kind))}."
                )
        for name in ("block_q", "block_kv", "width", "clusters"):
            if getattr(self, name) < 1:
                raise ValueError(f"blocks.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.block_kv % self.block_q:
            raise ValueError(
                f"blocks.block_q is {self.block_q}; it must divide blocks.block_kv = "
                f"{self.block_kv}."
            )
        for name in ("sinks", "local"):
            if getattr(self, name) < 0:
                raise ValueError(f"blocks.{name} is {getattr(self, name)}; it must be at least 0.")
        if self.width % 2:
            raise ValueError(f"blocks.width is {self.width}; it must be even, as RoPE turns pairs.")
        if self.blocks < self.forced:
            raise ValueError(
                f"blocks.blocks is {self.blocks}; it must hold a tile's own block, the local ones "
                f"and the sinks, {self.forced} blocks."
            )
        for name in ("fraction", "mass"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"blocks.{name} is {getattr(self, name)}; it must lie in (0, 1].")
        if self.temperature <= 0:
            raise ValueError(f"blocks.temperature is {self.temperature}; it must be above 0.")
        if self.fanout < 0 or self.fanout == 1:
            raise ValueError(f"blocks.fanout is {self.fanout}; it must be 0 or at least 2.")
        if self.kind not in _BUDGETS.get(self.budget, (self.kind,)):
            raise ValueError(
                f"blocks.budget is {self.budget!r}, which needs blocks.kind "
                f"{' or '.join(map(repr, _BUDGETS[self.budget]))}; it is {self.kind!r}."
            )
        if self.fanout and (
            self.kind not in ("pooled", "learned") or self.budget not in ("blocks", "fraction")
        ):
            raise ValueError(
                f"blocks.fanout is {self.fanout}; it needs blocks.kind 'pooled' or 'learned' and "
                f"blocks.budget 'blocks' or 'fraction', which are {self.kind!r} and "
                f"{self.budget!r}."
            )
        if self.pooling == "learned" and self.kind not in ("learned", "indexer"):
            raise ValueError(
                "blocks.pooling is 'learned', which needs blocks.kind 'learned' or 'indexer'; it "
                f"is {self.kind!r}."
            )
        if not 0 <= self.distil <= 1:
            raise ValueError(f"blocks.distil is {self.distil}; it must lie in [0, 1].")
        if self.distil and self.kind != "indexer":
            raise ValueError(f"blocks.distil needs blocks.kind 'indexer'; it is {self.kind!r}.")

    @property
    def forced(self) -> int:
        """How many blocks every long enough row lists: its own, the local ones and the sinks.

        >>> BlockRouterConfig(sinks=2).forced
        3
        """
        return 1 + self.local + self.sinks

    @property
    def feature_width(self) -> int | None:
        """R of the router's own projections; None where it has none.

        >>> BlockRouterConfig(kind="clusters").feature_width
        8
        """
        if self.kind == "pooled" or self.kind in FIXED:
            return None
        return self.clusters if self.kind == "clusters" else self.width

    @property
    def gated(self) -> bool:
        """Whether listed blocks have a bias, through which attention teaches the router.

        >>> BlockRouterConfig(kind="random", budget="gates").gated
        True

        >>> BlockRouterConfig(kind="pooled").gated
        False
        """
        return self.kind in ("learned", "clusters") or self.budget == "gates"

    def capacity(self, num_blocks: int) -> int:
        """C, how many slots a row needs when there are `num_blocks` key blocks.

        >>> BlockRouterConfig(fraction=0.25).capacity(64)
        16
        """
        most = self.blocks if self.budget == "blocks" else int(self.fraction * num_blocks + 0.5)
        # One more than `forced`, which the table's builder asks for when it is told tile starts.
        return min(max(most, self.forced + 1), num_blocks)

    def is_dense(self, num_blocks: int) -> bool:
        """Whether every row lists every block it can see, whatever the scores are.

        >>> BlockRouterConfig(budget="blocks", blocks=8).is_dense(8)
        True
        """
        if self.kind == "clusters":
            return False
        if self.budget == "blocks":
            return self.blocks >= num_blocks
        return self.budget == "fraction" and self.fraction == 1
