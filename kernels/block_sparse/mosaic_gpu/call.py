"""One call of block-sparse attention as the Hopper kernels see it: padded arrays, plain tables."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from routing_jax.kernels.block_sparse.implementation import AttentionInputs, AttentionOptions
from routing_jax.kernels.block_table import ceil_div, row_lengths, whole_blocks
from routing_jax.kernels.hopper import LOG2_E, WARPGROUP_ROWS, hopper_refusal
from routing_jax.kernels.padding import pad_axis
from routing_jax.kernels.segments import query_segments

_HEAD_DIMS = (64, 128, 256)
_BLOCKS = (64, 128)


class Arrays(NamedTuple):
    """What the kernels read. T, S and H are padded: to whole tiles, whole blocks, and 64s.

    Attributes:
      q: [B,T,N,H].
      k: [B,S,K,H].
      v: [B,S,K,H].
      lengths: [B,K,M] int32, blocks that a row visits; here and below B and K may be 1.
      unmasked: [B,K,M] int32, how many of them, the first ones, every query of the tile sees whole.
      dense: [B,K,M] int32, 1 for rows that visit block i in step i.
      indices: [B,K,M,C] int32.
      positions: [B,T] int32 or None for 0, 1, 2, …; −1 for a query that sees nothing.
      q_segments: [B,T] int32 or None.
      k_segments: [B,S] int32 or None.
      bias: [B,K,M,C] float32 in units of log2, or None.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    lengths: jax.Array
    unmasked: jax.Array
    dense: jax.Array
    indices: jax.Array
    positions: jax.Array | None
    q_segments: jax.Array | None
    k_segments: jax.Array | None
    bias: jax.Array | None


class Output(NamedTuple):
    """What the backward pass knows of each query; T is padded.

    Attributes:
      d_out: [B,T,N,H], the cotangent of the output.
      lse: [B,N,T] float32, the log-sum-exp in units of log2; +inf where nothing was seen, so that
        P = exp2(S − inf) = 0.
      delta: [B,N,T] float32, Σ_h dO·O − dLSE, so that dS = P·(dP − δ).
    """

    d_out: jax.Array
    lse: jax.Array
    delta: jax.Array


class Columns(NamedTuple):
    """The table by columns: which tiles attend to each key block. B and K may be 1.

    Attributes:
      offsets: [B,K,J+1] int32, as in `TransposedTable`.
      entries: [B,K,M·C] int32.
      dense_tiles: [B,K,M] int32.
      first_dense: [B,K,J] int32, which of the dense tiles is the first that sees a block.
      dense_counts: [B,K,J] int32, how many do; they follow one another.
    """

    offsets: jax.Array
    entries: jax.Array
    dense_tiles: jax.Array
    first_dense: jax.Array
    dense_counts: jax.Array


class Geometry(NamedTuple):
    """The static sizes of one call.

    Attributes:
      B: sequences.
      T: queries, before padding.
      S: keys, before padding.
      N: query heads.
      K: kv heads.
      H: head dim, padded.
      M: query tiles.
      J: key blocks.
      C: slots of a table row.
      block_q: queries a tile.
      block_kv: keys a block.
      causal: whether later keys are hidden.
      scale: what logits are multiplied by, in units of log2.
      splits: shares of a row's blocks that are separate items.
    """

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    M: int
    J: int
    C: int
    block_q: int
    block_kv: int
    causal: bool
    scale: float
    splits: int = 1

    @property
    def G(self) -> int:  # noqa: N802
        """Query heads a kv head."""
        return self.N // self.K

    @property
    def chunks(self) -> int:
        """Pieces of 64 rows, the share of one warpgroup, in the G heads of one tile."""
        return self.G * self.block_q // WARPGROUP_ROWS

    @property
    def pairs(self) -> int:
        """Items a tile, kv head and split: two warpgroups, with a chunk each."""
        return ceil_div(self.chunks, 2)

    @property
    def cluster(self) -> int:
        """Programs that work side by side on items of one row, whose keys they fetch together."""
        return 2 if self.pairs % 2 == 0 else 1

    @property
    def items(self) -> int:
        """Items in all."""
        return self.B * self.K * self.M * self.pairs * self.splits

    @property
    def cluster_items(self) -> int:
        """Items that every program of a cluster takes one of, in all."""
        return self.items // self.cluster

    def place(self, chunk: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A chunk's head within the group and its first row within the tile."""
        row = chunk * WARPGROUP_ROWS
        return lax.div(row, self.block_q), lax.rem(row, self.block_q)


def refusal(options: AttentionOptions, inputs: AttentionInputs) -> str | None:
    """Why the Hopper kernels do not run this call here; None if they do."""
    return unsupported(options, inputs) or hopper_refusal()


def unsupported(options: AttentionOptions, inputs: AttentionInputs) -> str | None:
    """Why the Hopper kernels run this call on no device; None if they do."""
    table, head_dim = inputs.table, inputs.q.shape[-1]
    if inputs.q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, and q is {inputs.q.dtype}"
    if head_dim > max(_HEAD_DIMS):
        return f"it takes head dims up to {max(_HEAD_DIMS)}, and q has {head_dim}"
    if table.block_q not in _BLOCKS or table.block_kv not in _BLOCKS:
        return (
            f"it takes blocks of {' and '.join(map(str, _BLOCKS))}, and the table has "
            f"{table.block_q}×{table.block_kv}"
        )
    if options.scale <= 0:
        return f"it takes a positive scale, and scale is {options.scale}"
    return None


def prepare(options: AttentionOptions, inputs: AttentionInputs) -> tuple[Geometry, Arrays]:
    """Cuts a call to the kernels' measure; nothing is copied where it fits already."""
    q, k, v, table, bias, positions, segments = inputs
    (B, T, N, _), (S, K, head_dim) = q.shape, k.shape[1:]
    H = min(h for h in _HEAD_DIMS if h >= head_dim)
    M, J = table.num_tiles, ceil_div(S, table.block_kv)
    geometry = Geometry(
        B, T, S, N, K, H, M, J, table.capacity, table.block_q, table.block_kv,
        options.causal, options.scale * LOG2_E,
    )  # fmt: skip
    lengths = row_lengths(table, T, S, q_positions=positions, causal=options.causal)
    whole = whole_blocks(table, T, S, q_positions=positions, causal=options.causal)
    q_segments = k_segments = None
    if segments is not None:
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        positions, q_segments = query_segments(positions, segments)
        q_segments = pad_axis(q_segments.astype(jnp.int32), 1, M * table.block_q)
        k_segments = pad_axis(segments.astype(jnp.int32), 1, J * table.block_kv)
    if positions is not None:
        positions = pad_axis(positions, 1, M * table.block_q, fill=-1)
    arrays = Arrays(
        pad_axis(pad_axis(q, 3, H), 1, M * table.block_q),
        pad_axis(pad_axis(k, 3, H), 1, J * table.block_kv),
        pad_axis(pad_axis(v, 3, H), 1, J * table.block_kv),
        lengths,
        whole if segments is None else jnp.zeros_like(whole),
        table.dense.astype(jnp.int32),
        table.indices,
        positions,
        q_segments,
        k_segments,
        None if bias is None else bias.astype(jnp.float32) * LOG2_E,
    )
    return geometry, arrays


def at(shape: tuple[int, ...], batch: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where an array that may be broadcast over B and K keeps a (sequence, kv head)."""
    zero = jnp.int32(0)
    return (batch if shape[0] > 1 else zero, head if shape[1] > 1 else zero)
