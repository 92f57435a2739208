"""The transpose of a block table: for each key block, the query tiles that list it."""

import dataclasses

import jax
import jax.numpy as jnp

from routing_jax.kernels.block_table import BlockTable, visible_blocks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TransposedTable:
    """A block table read by columns, in compressed form (CSR); the backward pass for k and v.

    The tiles that list block j are `entries[offsets[j]:offsets[j+1]] // C`, ascending, and their
    slots `% C`. The tiles of dense rows attend to j as well, where they can see it: they are
    listed once, in `dense_tiles`, not under every block.

    Attributes:
      offsets: [B,K,J+1] int32, where each block's entries start.
      entries: [B,K,M·C] int32, m·C + c for each listed slot c of tile m, ordered by block, then
        tile; what stands at or past offsets[J] is meaningless.
      dense_counts: [B,K] int32, how many rows are dense.
      dense_tiles: [B,K,M] int32, their tiles, ascending; slots past the count hold M.
      capacity: C of the table.
    """

    offsets: jax.Array
    entries: jax.Array
    dense_counts: jax.Array
    dense_tiles: jax.Array
    capacity: int = dataclasses.field(metadata={"static": True})


def transpose_table(table: BlockTable, num_blocks: int) -> TransposedTable:
    """Transposes a table on the device: one sort of its slots, nothing of size J×M.

    Args:
      table: [B,K,M,C]. Listed indices outside [0, J) are left out.
      num_blocks: J, the number of key blocks.

    Returns:
      The transpose, with the table's B and K.

    >>> table = BlockTable(jnp.array([[[1, 2, -1]]]), jnp.array([[[[0, 0], [0, 1], [0, 0]]]]), 8, 8)
    >>> transposed = transpose_table(table, 2)
    >>> transposed.offsets.tolist(), (transposed.entries[0, 0, :3] // 2).tolist()
    ([[[0, 2, 3]]], [0, 1, 1])
    >>> transposed.dense_counts.tolist(), transposed.dense_tiles[0, 0, 0].tolist()
    ([[1]], 2)
    """
    B, K, M, C = table.indices.shape
    listed = jnp.arange(C)[None, None, None] < table.counts[..., None]
    listed &= (table.indices >= 0) & (table.indices < num_blocks)
    block = jnp.where(listed, table.indices, num_blocks).reshape(B * K, M * C)
    # One flat sort, its key led by the (sequence, head): a GPU sorts one long array far faster
    # than a few segments. Unused slots go to block J, the end of their segment.
    key = (jnp.arange(B * K, dtype=jnp.int32)[:, None] * (num_blocks + 1) + block).reshape(-1)
    slot = jnp.broadcast_to(jnp.arange(M * C, dtype=jnp.int32)[None], (B * K, M * C)).reshape(-1)
    _, entries = jax.lax.sort((key, slot), num_keys=1, is_stable=True)
    sizes = jnp.zeros(B * K * (num_blocks + 1), jnp.int32).at[key].add(1)
    ends = jnp.cumsum(sizes.reshape(B, K, num_blocks + 1)[..., :num_blocks], axis=-1)
    tiles = jnp.where(table.dense, jnp.arange(M, dtype=jnp.int32)[None, None], M)
    return TransposedTable(
        offsets=jnp.pad(ends, ((0, 0), (0, 0), (1, 0))).astype(jnp.int32),
        entries=entries.reshape(B, K, M * C),
        dense_counts=table.dense.sum(axis=-1, dtype=jnp.int32),
        dense_tiles=jnp.sort(tiles, axis=-1),
        capacity=C,
    )


def dense_runs(
    table: BlockTable,
    transposed: TransposedTable,
    num_queries: int,
    num_keys: int,
    *,
    q_positions: jax.Array | None = None,
    causal: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Which of the dense tiles attend to each key block: they follow one another.

    A dense tile sees the blocks below its visible count. Positions ascend, so of the dense tiles
    those that see a block are a run, cut short by the tiles that hold no query at all.

    Args:
      table: the table.
      transposed: its transpose.
      num_queries: T.
      num_keys: S.
      q_positions: [B,T] int32, each query's position; −1 marks an unused slot.
      causal: whether later keys are hidden.

    Returns:
      (first, counts), each [B,K,J] int32: the run's start in `dense_tiles`, and its length. B is
      the larger of the table's and q_positions'.

    >>> table = BlockTable(jnp.full((1, 1, 3), -1), jnp.zeros((1, 1, 3, 1), jnp.int32), 8, 8)
    >>> first, counts = dense_runs(table, transpose_table(table, 3), 24, 24)
    >>> first.tolist(), counts.tolist()
    ([[[0, 1, 2]]], [[[3, 2, 1]]])
    """
    _, K, M = transposed.dense_tiles.shape
    J = transposed.offsets.shape[2] - 1
    visible = visible_blocks(table, num_queries, num_keys, q_positions=q_positions, causal=causal)
    visible = jnp.pad(visible, ((0, 0), (0, 1)))  # of 'no tile'
    B = max(visible.shape[0], transposed.dense_tiles.shape[0])
    batch = jnp.arange(B)[:, None, None] if visible.shape[0] > 1 else 0
    seen = visible[batch, jnp.broadcast_to(transposed.dense_tiles, (B, K, M))]
    runs = jnp.where(seen > 0, seen, J + 1)
    search = jax.vmap(jax.vmap(lambda run: jnp.searchsorted(run, jnp.arange(1, J + 1))))
    first = search(runs).astype(jnp.int32)
    return first, jnp.maximum((seen > 0).sum(axis=2, keepdims=True, dtype=jnp.int32) - first, 0)
