"""The sparsity structure: which key blocks each tile of queries attends to, and what that costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from routing_jax.kernels.checks import check_dtype, match_shape, refuse_rows, values_to_check

DENSE = -1  # the count of a row that attends to every visible block without listing any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockTable:
    """For each query tile of each kv head, the key blocks that it attends to.

    Tile m holds queries m·block_q onwards, block j keys j·block_kv onwards. The G query heads of
    a kv head share its rows. B and K may be 1 and then stand for every sequence or head.
    A listed block may be partly masked: causality, segments and ragged ends are decided in the
    kernel from positions. A row may depend only on what its tile's first query can see.

    Attributes:
      counts: [B,K,M] int32, blocks listed for the tile; −1 marks a dense row: every block that
        the tile's last query can see.
      indices: [B,K,M,C] int32, the listed blocks, ascending and without repeats; slots at or
        past the count are ignored (the functions of this package put 0 there).
      block_q: queries a tile.
      block_kv: keys a block.

    >>> table = BlockTable(jnp.array([[[1, 2]]]), jnp.array([[[[0, 0], [0, 1]]]]), 64, 64)
    >>> table.num_tiles, table.capacity
    (2, 2)
    """

    counts: jax.Array
    indices: jax.Array
    block_q: int = dataclasses.field(metadata={"static": True})
    block_kv: int = dataclasses.field(metadata={"static": True})

    @property
    def num_tiles(self) -> int:
        """M, how many query tiles the table has rows for."""
        return self.counts.shape[2]

    @property
    def capacity(self) -> int:
        """C, how many blocks a row can list."""
        return self.indices.shape[3]

    @property
    def dense(self) -> jax.Array:
        """[B,K,M] bool, the rows that attend to every visible block."""
        return self.counts == DENSE


def ceil_div(total: int, size: int) -> int:
    """How many pieces of `size` cover `total`.

    >>> ceil_div(129, 64)
    3
    """
    return -(-total // size)


def with_dense_rows(table: BlockTable, dense: jax.Array) -> BlockTable:
    """The table with some rows made dense, such as those of the samples routed to full attention.

    Args:
      table: the rows that stay where `dense` is False.
      dense: bool, broadcast against [B,K,M]; a [B,1,1] array decides per sample.

    Returns:
      A table whose B, K and M are those of the broadcast.

    Raises:
      ValueError: a shape that does not broadcast.

    >>> table = BlockTable(jnp.ones((1, 1, 2), jnp.int32), jnp.zeros((1, 1, 2, 1), jnp.int32), 8, 8)
    >>> with_dense_rows(table, jnp.array([True, False])[:, None, None]).counts.tolist()
    [[[-1, -1]], [[1, 1]]]
    """
    try:
        shape = jnp.broadcast_shapes(dense.shape, table.counts.shape)
    except ValueError as error:
        raise ValueError(
            f"dense must broadcast against the table's [B,K,M] {table.counts.shape}; "
            f"it has shape {dense.shape}."
        ) from error
    if shape[2:] != table.counts.shape[2:]:
        raise ValueError(f"dense has {shape[2]} tiles; the table has {table.num_tiles}.")
    return dataclasses.replace(
        table,
        counts=jnp.where(dense, DENSE, table.counts),
        indices=jnp.broadcast_to(table.indices, (*shape, table.capacity)),
    )


def visible_blocks(
    table: BlockTable,
    num_queries: int,
    num_keys: int,
    *,
    q_positions: jax.Array | None = None,
    causal: bool = True,
) -> jax.Array:
    """How many key blocks a dense row of each tile visits: those its last query can see.

    Args:
      table: for its block sizes and M.
      num_queries: T; query t stands at position t unless `q_positions` says otherwise.
      num_keys: S.
      q_positions: [B,T] int32, each query's position; −1 marks an unused slot.
      causal: whether later keys are hidden.

    Returns:
      [B,M] int32 ([1,M] without `q_positions`); 0 for a tile without queries.

    >>> table = BlockTable(jnp.ones((1, 1, 3), jnp.int32), jnp.zeros((1, 1, 3, 1), jnp.int32), 8, 8)
    >>> visible_blocks(table, 20, 20).tolist(), visible_blocks(table, 20, 20, causal=False).tolist()
    ([[1, 2, 3]], [[3, 3, 3]])
    """
    tiles, num_blocks = table.num_tiles, ceil_div(num_keys, table.block_kv)
    if q_positions is None:
        ends = (jnp.arange(tiles, dtype=jnp.int32) + 1) * table.block_q
        last = jnp.minimum(ends, num_queries)[None] - 1
    else:
        pad = tiles * table.block_q - q_positions.shape[1]
        padded = jnp.pad(q_positions, ((0, 0), (0, pad)), constant_values=-1)
        last = padded.reshape(-1, tiles, table.block_q).max(axis=2)
    seen = jnp.minimum(last // table.block_kv + 1, num_blocks) if causal else num_blocks
    return jnp.where(last >= 0, seen, 0).astype(jnp.int32)


def row_lengths(
    table: BlockTable,
    num_queries: int,
    num_keys: int,
    *,
    q_positions: jax.Array | None = None,
    causal: bool = True,
) -> jax.Array:
    """How many key blocks a kernel visits for each row: the count, or all visible ones if dense.

    Args:
      table: the table.
      num_queries: T.
      num_keys: S.
      q_positions: [B,T] int32, each query's position; −1 marks an unused slot.
      causal: whether later keys are hidden.

    Returns:
      [B,K,M] int32; B is the larger of the table's and q_positions'. 0 for a tile without queries.

    >>> table = BlockTable(jnp.array([[[1, -1]]]), jnp.zeros((1, 1, 2, 1), jnp.int32), 8, 8)
    >>> row_lengths(table, 16, 16).tolist()
    [[[1, 2]]]
    """
    visible = visible_blocks(table, num_queries, num_keys, q_positions=q_positions, causal=causal)
    visible = visible[:, None]
    listed = jnp.clip(table.counts, 0, table.capacity)
    return jnp.where(table.dense, visible, jnp.where(visible > 0, listed, 0))


def whole_blocks(
    table: BlockTable,
    num_queries: int,
    num_keys: int,
    *,
    q_positions: jax.Array | None = None,
    causal: bool = True,
) -> jax.Array:
    """How many blocks of each row lie wholly before its tile's first query, and before S.

    Rows ascend, so these come first: a kernel pays for masks only behind them.

    Args:
      table: the table.
      num_queries: T.
      num_keys: S.
      q_positions: [B,T] int32, each query's position; −1 marks an unused slot.
      causal: whether later keys are hidden.

    Returns:
      [B,K,M] int32, at most `row_lengths`; B is the larger of the table's and q_positions'.

    >>> table = BlockTable(jnp.array([[[1, -1]]]), jnp.zeros((1, 1, 2, 1), jnp.int32), 8, 8)
    >>> whole_blocks(table, 16, 16).tolist()
    [[[0, 1]]]
    """
    first = first_positions(table, q_positions)
    ends = jnp.full_like(first, num_keys)
    if causal:
        ends = jnp.minimum(first + 1, num_keys)
    whole = jnp.maximum(ends, 0)[:, None] // table.block_kv  # [B,1,M]
    slots = jnp.arange(table.capacity, dtype=jnp.int32)[None, None, None]
    listed = (slots < table.counts[..., None]) & (table.indices < whole[..., None])
    count = jnp.where(table.dense, whole, listed.sum(axis=-1, dtype=jnp.int32))
    lengths = row_lengths(table, num_queries, num_keys, q_positions=q_positions, causal=causal)
    return jnp.minimum(count, lengths)


def first_positions(table: BlockTable, q_positions: jax.Array | None = None) -> jax.Array:
    """Where each tile's first query stands.

    Args:
      table: for its block sizes and M.
      q_positions: [B,T] int32, ascending, unused slots last and −1.

    Returns:
      [B,M] int32 ([1,M] without `q_positions`); −1 for a tile without queries.

    >>> table = BlockTable(jnp.ones((1, 1, 2), jnp.int32), jnp.zeros((1, 1, 2, 1), jnp.int32), 8, 8)
    >>> first_positions(table).tolist(), first_positions(table, jnp.arange(3, 19)[None]).tolist()
    ([[0, 8]], [[3, 11]])
    """
    if q_positions is None:
        return jnp.arange(table.num_tiles, dtype=jnp.int32)[None] * table.block_q
    return q_positions[:, :: table.block_q]


def density(
    table: BlockTable,
    num_queries: int,
    num_keys: int,
    *,
    q_positions: jax.Array | None = None,
    causal: bool = True,
) -> jax.Array:
    """Executed tiles ÷ those of full attention, both counted by whole tiles, per sequence and head.

    This is the attention's part of the unit of cost: full causal attention is exactly 1. One
    tile is 2·block_q·block_kv·H multiply-adds (scores and values) for each query head.

    Args:
      table: the table.
      num_queries: T.
      num_keys: S.
      q_positions: [B,T] int32, the positions of compacted queries; the full computation is then
        that of all S positions.
      causal: whether later keys are hidden, for the table and for the full computation alike.

    Returns:
      [B,K] float32.

    >>> table = BlockTable(jnp.array([[[1, -1]]]), jnp.zeros((1, 1, 2, 1), jnp.int32), 8, 8)
    >>> float(density(table, 16, 16)[0, 0])
    1.0
    """
    executed = row_lengths(table, num_queries, num_keys, q_positions=q_positions, causal=causal)
    length = num_queries if q_positions is None else num_keys
    num_blocks = ceil_div(num_keys, table.block_kv)
    ends = np.minimum((np.arange(ceil_div(length, table.block_q)) + 1) * table.block_q, length)
    seen = np.minimum((ends - 1) // table.block_kv + 1, num_blocks) if causal else num_blocks
    full = np.broadcast_to(seen, ends.shape).sum()
    return executed.sum(axis=2).astype(jnp.float32) / jnp.float32(full)


def check_table(
    table: BlockTable, num_queries: int, num_keys: int, *, batch: int, kv_heads: int
) -> None:
    """Refuses a table that does not fit the arrays it is used with.

    Shapes and dtypes are always checked, values where they are concrete; traced ones are under
    `checked`.

    Args:
      table: the table.
      num_queries: T.
      num_keys: S.
      batch: B.
      kv_heads: K.

    Raises:
      ValueError: a block size below 1, a shape or dtype that does not fit, a count outside
        [−1, C], a listed index outside [0, J), a row that is not strictly ascending.

    >>> table = BlockTable(jnp.ones((1, 1, 2), jnp.int32), jnp.full((1, 1, 2, 1), 7), 8, 8)
    >>> check_table(table, 16, 16, batch=1, kv_heads=1)
    Traceback (most recent call last):
    ...
    ValueError: table.indices must lie in [0, 2); row (0, 0, 0) lists [7].
    """
    if table.block_q < 1 or table.block_kv < 1:
        raise ValueError(
            f"table's block_q and block_kv must be at least 1; they are {table.block_q} and "
            f"{table.block_kv}."
        )
    check_dtype("table.counts", table.counts, ("int32",))
    check_dtype("table.indices", table.indices, ("int32",))
    sizes = match_shape("table.counts", table.counts, "BKM", {})
    match_shape("table.indices", table.indices, "BKMC", sizes)
    tiles = ceil_div(num_queries, table.block_q)
    if table.num_tiles != tiles:
        raise ValueError(
            f"table must have {tiles} query tiles (T={num_queries}, block_q={table.block_q}); "
            f"its counts [B,K,M] have shape {table.counts.shape}."
        )
    if sizes["B"] not in (1, batch) or sizes["K"] not in (1, kv_heads):
        raise ValueError(
            f"table's B and K must be 1 or those of k, ({batch}, {kv_heads}); "
            f"its counts [B,K,M] have shape {table.counts.shape}."
        )
    _check_values(table, ceil_div(num_keys, table.block_kv))


def _check_values(table: BlockTable, num_blocks: int) -> None:
    found = values_to_check(table.counts, table.indices)
    if found is None:
        return
    xp, (counts, indices) = found
    listed = xp.arange(table.capacity)[None, None, None] < counts[..., None]
    ascending = indices[..., 1:] > indices[..., :-1]

    def listing(row):
        return f"lists {indices[row][: counts[row]].tolist()}"

    refuse_rows(
        (counts < DENSE) | (counts > table.capacity),
        f"table.counts must lie in [-1, {table.capacity}]",
        lambda row: f"counts {counts[row]}",
    )
    refuse_rows(
        (listed & ((indices < 0) | (indices >= num_blocks))).any(-1),
        f"table.indices must lie in [0, {num_blocks})",
        listing,
    )
    refuse_rows(
        (listed[..., 1:] & ~ascending).any(-1),
        "table.indices must be strictly ascending within the count",
        listing,
    )
