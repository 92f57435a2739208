"""One call of block-sparse attention as the TPU kernels see it: tiles, and plain rows of blocks."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from routing_jax.kernels.block_sparse.implementation import AttentionInputs, AttentionOptions
from routing_jax.kernels.block_sparse.mosaic_tpu.tiles import Tiles, ring_stages, tiles_for, turns
from routing_jax.kernels.block_table import ceil_div, row_lengths
from routing_jax.kernels.padding import pad_axis
from routing_jax.kernels.segments import query_segments
from routing_jax.kernels.tpu import LANES, device_kind, tpu_refusal

_HEAD_DIM = 256
# Head dims are padded to this. Padded to whole tiles of 128 lanes, head dim 64 takes the schedule
# of 128: steps of eight blocks have on v5e 15 % more bundles forward and 9 % for dq, on v6e 5 and
# 8 %; on tpu7x 3 % less forward. dk and dv have 1 to 4 % less.
_HEAD_DIMS = 64
_BLOCKS = (64, 128, 256, 512)
_CAPACITY = 16384  # a row's list stands in scalar memory twice, and so does its bias
_VMEM = 40 * 2**20  # of the 64 MiB that the smallest of the current chips has
HEADER = 2  # entries before a row's blocks
# Logits are kept in powers of two, the chip's own: a multiplication less for each.
LOG2_E = math.log2(math.e)


class Arrays(NamedTuple):
    """What the kernels read. X is the flat (sequence, kv head).

    Attributes:
      q: [X,M,R,H], the G heads of a tile below each other, R their rows and padding.
      kv: [X·J,2,block_kv,H], the keys and the values of a block, for one copy to bring.
      rows: [X,M,1,2+C] int32: blocks to visit; 1 if that is block i in step i (a dense row); the
        listed blocks.
      queries: [B or 1,M,1 or 2,R] int32: the last key that a query sees by its position, −1 for
        none; segments.
      k_segments: [B·J,1,block_kv] int32, to whole lanes, or None.
      bias: [X,M,1,C] float32, times log2 e, or None.
    """

    q: jax.Array
    kv: jax.Array
    rows: jax.Array
    queries: jax.Array
    k_segments: jax.Array | None
    bias: jax.Array | None


class Geometry(NamedTuple):
    """The static sizes of one call.

    Attributes:
      B: sequences.
      T: queries, before padding.
      S: keys, before padding.
      K: kv heads.
      G: query heads a kv head.
      H: head dim, padded.
      R: rows of a tile, padded.
      M: query tiles.
      J: key blocks.
      C: slots of a table row.
      block_q: queries a tile.
      block_kv: keys a block.
      scale: what logits are multiplied by.
      tiles: how much is taken at once.
    """

    B: int
    T: int
    S: int
    K: int
    G: int
    H: int
    R: int
    M: int
    J: int
    C: int
    block_q: int
    block_kv: int
    scale: float
    tiles: Tiles

    @property
    def X(self) -> int:  # noqa: N802
        """Sequences times kv heads."""
        return self.B * self.K


def refusal(options: AttentionOptions, inputs: AttentionInputs) -> str | None:
    """Why the TPU kernels do not run this call here; None if they do."""
    return unsupported(options, inputs) or tpu_refusal()


def unsupported(options: AttentionOptions, inputs: AttentionInputs) -> str | None:
    """Why the TPU kernels run this call on no device; None if they do."""
    del options
    table, head_dim = inputs.table, inputs.q.shape[-1]
    if head_dim > _HEAD_DIM:
        return f"it takes head dims up to {_HEAD_DIM}, and q has {head_dim}"
    if table.block_q not in _BLOCKS or table.block_kv not in _BLOCKS:
        return (
            f"it takes blocks of {', '.join(map(str, _BLOCKS))}, and the table has "
            f"{table.block_q}×{table.block_kv}"
        )
    if table.capacity > _CAPACITY:
        return f"it takes table rows of up to {_CAPACITY} slots, and the table has {table.capacity}"
    needed = vector_memory(sizes_of(AttentionOptions(True, 1.0), inputs), inputs)
    if needed > _VMEM:
        return (
            f"it holds a tile with all heads of its group in {_VMEM >> 20} MiB, and this call "
            f"needs {ceil_div(needed, 2**20)} MiB"
        )
    return None


def vector_memory(geometry: Geometry, inputs: AttentionInputs) -> int:
    """An upper estimate of the bytes that the greediest of the kernels, a gradient, holds.

    Twice q and d_out, or a ring of them; a ring of k and v; accumulators; five arrays of logits;
    and with a bias two sums for each slot.
    """
    width = 2 if inputs.q.dtype == jnp.bfloat16 else 4
    R, H, block_kv = geometry.R, ceil_div(geometry.H, LANES) * LANES, geometry.block_kv
    blocks, tiles = blocks_together(geometry)[0], tiles_together(geometry)[0]
    rings = 2 * (ring_stages(tiles) * R + ring_stages(blocks) * block_kv) * H * width
    sums = 2 * (R + 2 * block_kv) * H * 4
    logits = 5 * R * max(blocks, tiles) * block_kv * 4
    slots = 0 if inputs.block_bias is None else 2 * (geometry.C + 8) * R * 4
    return rings + sums + logits + slots


def blocks_together(geometry: Geometry) -> list[int]:
    """How many blocks the kernels of rows take in one turn, largest first."""
    tiles = geometry.tiles
    keys = min(tiles.keys, tiles.logits // geometry.R)
    return turns(max(1, keys // geometry.block_kv))


def tiles_together(geometry: Geometry) -> list[int]:
    """How many query tiles the kernel of key blocks takes in one turn, largest first."""
    most = geometry.tiles.block_logits // (geometry.R * geometry.block_kv)
    return turns(max(1, min(geometry.tiles.query_tiles, most)))


def sizes_of(options: AttentionOptions, inputs: AttentionInputs) -> Geometry:
    """The static sizes of a call."""
    (B, T, N, H), (S, K), table = inputs.q.shape, inputs.k.shape[1:3], inputs.table
    G = N // K
    return Geometry(
        B, T, S, K, G,
        ceil_div(H, _HEAD_DIMS) * _HEAD_DIMS, ceil_div(G * table.block_q, LANES) * LANES,
        table.num_tiles, ceil_div(S, table.block_kv), table.capacity,
        table.block_q, table.block_kv, options.scale, tiles_for(device_kind()),
    )  # fmt: skip


def query_tiles(geometry: Geometry, x: jax.Array, fill: float = 0) -> jax.Array:
    """[B,T,N,…] -> [X,M,R,…], the heads of a group below each other."""
    B, M, K, G = geometry.B, geometry.M, geometry.K, geometry.G
    x = pad_axis(x, 1, M * geometry.block_q, fill)
    x = x.reshape(B, M, geometry.block_q, K, G, *x.shape[3:])
    x = jnp.moveaxis(x, (3, 4), (1, 3)).reshape(B * K, M, G * geometry.block_q, *x.shape[5:])
    return pad_axis(x, 2, geometry.R, fill)


def from_query_tiles(geometry: Geometry, x: jax.Array) -> jax.Array:
    """Undoes `query_tiles`."""
    B, M, K, G = geometry.B, geometry.M, geometry.K, geometry.G
    x = x[:, :, : G * geometry.block_q]
    x = x.reshape(B, K, M, G, geometry.block_q, *x.shape[3:])
    x = jnp.moveaxis(x, (1, 3), (3, 4))
    return x.reshape(B, M * geometry.block_q, K * G, *x.shape[5:])[:, : geometry.T]


def _key_blocks(geometry: Geometry, x: jax.Array) -> jax.Array:
    x = pad_axis(widen(geometry, x), 1, geometry.J * geometry.block_kv)
    x = x.reshape(geometry.B, geometry.J, geometry.block_kv, geometry.K, -1)
    return x.transpose(0, 3, 1, 2, 4).reshape(-1, geometry.block_kv, x.shape[4])


def per_head(geometry: Geometry, x: jax.Array) -> jax.Array:
    """[B or 1,K or 1,…] -> [X,…]."""
    x = jnp.broadcast_to(x, (geometry.B, geometry.K, *x.shape[2:]))
    return x.reshape(geometry.X, *x.shape[2:])


def widen(geometry: Geometry, x: jax.Array) -> jax.Array:
    """Pads the head dim; half-precision floats that TPUs lack become float32."""
    x = x.astype(jnp.float32) if x.dtype == jnp.float16 else x
    return pad_axis(x, 3, geometry.H)


def prepare(options: AttentionOptions, inputs: AttentionInputs) -> tuple[Geometry, Arrays]:
    """Cuts a call to the kernels' measure."""
    q, k, v, table, bias, positions, segments = inputs
    geometry = sizes_of(options, inputs)
    T, S, J, M = geometry.T, geometry.S, geometry.J, geometry.M
    lengths = row_lengths(table, T, S, q_positions=positions, causal=options.causal)
    places = jnp.arange(T, dtype=jnp.int32)[None] if positions is None else positions
    k_segments = own = None
    if segments is not None:
        places, own = query_segments(jnp.broadcast_to(places, (geometry.B, T)), segments)
        k_segments = pad_axis(segments.astype(jnp.int32), 1, J * geometry.block_kv)
        k_segments = k_segments.reshape(-1, 1, geometry.block_kv)
        k_segments = pad_axis(k_segments, 2, ceil_div(geometry.block_kv, LANES) * LANES)

    last = jnp.where(places < 0, -1, jnp.minimum(places, S - 1) if options.causal else S - 1)
    of_queries = [last] if own is None else [last, own.astype(jnp.int32)]

    def to_rows(x):  # [B or 1,T] -> [B or 1,M,R]
        x = pad_axis(x, 1, M * geometry.block_q, -1).reshape(-1, M, 1, geometry.block_q)
        x = jnp.broadcast_to(x, (x.shape[0], M, geometry.G, geometry.block_q))
        return pad_axis(x.reshape(x.shape[0], M, -1), 2, geometry.R, -1)

    header = jnp.stack(jnp.broadcast_arrays(lengths, table.dense.astype(jnp.int32)), -1)
    rows = jnp.concatenate([per_head(geometry, header), per_head(geometry, table.indices)], -1)
    arrays = Arrays(
        query_tiles(geometry, widen(geometry, q)),
        jnp.stack([_key_blocks(geometry, x) for x in (k, v)], axis=1),
        rows[:, :, None],
        jnp.stack([to_rows(x) for x in of_queries], axis=2),
        k_segments,
        None if bias is None else per_head(geometry, bias.astype(jnp.float32) * LOG2_E)[:, :, None],
    )
    return geometry, arrays
