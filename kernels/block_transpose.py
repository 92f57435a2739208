"""The transpose of a block table: for each key block, the query tiles that list it."""

import dataclasses

import jax
import jax.numpy as jnp

from routing_jax.kernels.block_table import BlockTable


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
