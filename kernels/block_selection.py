"""Tables chosen at run time: from a router's scores, from lists of blocks, from other tables.

Everything here runs inside jit, and nothing is larger than one number for each pair of a query
tile and a key block.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from routing_jax.kernels.block_table import DENSE, BlockTable
from routing_jax.kernels.checks import match_shape

_UNUSED = jnp.iinfo(jnp.int32).max


class Selection(NamedTuple):
    """What a router's scores chose.

    Attributes:
      table: the blocks kept.
      dropped: [B,K,M] int32, how many blocks the router wanted that the capacity left out.
    """

    table: BlockTable
    dropped: jax.Array


def _without_repeats(blocks: jax.Array) -> jax.Array:
    """Unsorted rows with every repeat replaced by `_UNUSED`."""
    blocks = jnp.sort(blocks, axis=-1)
    repeated = jnp.pad(blocks[..., 1:] == blocks[..., :-1], [(0, 0)] * 3 + [(1, 0)])
    return jnp.where(repeated, _UNUSED, blocks)


def _sorted_table(blocks: jax.Array, block_q: int, block_kv: int) -> BlockTable:
    """Ascending rows from unsorted ones without repeats, whose unused slots hold `_UNUSED`."""
    blocks = jnp.sort(blocks, axis=-1)
    used = blocks != _UNUSED
    counts = used.sum(axis=-1, dtype=jnp.int32)
    return BlockTable(counts, jnp.where(used, blocks, 0), block_q, block_kv)


def table_from_blocks(
    blocks: jax.Array, listed: jax.Array, *, block_q: int, block_kv: int
) -> BlockTable:
    """A table from lists in any order, with or without repeats.

    Args:
      blocks: [B,K,M,C] int32, key blocks.
      listed: [B,K,M,C] bool, which of them count.
      block_q: queries a tile.
      block_kv: keys a block.

    Returns:
      The table with its rows sorted and without repeats.

    Raises:
      ValueError: shapes that differ.

    >>> table = table_from_blocks(jnp.array([[[[2, 0, 2]]]]), jnp.ones((1, 1, 1, 3), bool),
    ...                           block_q=64, block_kv=64)
    >>> table.counts.tolist(), table.indices.tolist()
    ([[[2]]], [[[[0, 2, 0]]]])
    """
    match_shape("listed", listed, "BKMC", match_shape("blocks", blocks, "BKMC", {}))
    blocks = jnp.where(listed, blocks.astype(jnp.int32), _UNUSED)
    return _sorted_table(_without_repeats(blocks), block_q, block_kv)


def union_tables(first: BlockTable, second: BlockTable) -> BlockTable:
    """The table that lists what either lists; a row dense in either is dense.

    Args:
      first: a table.
      second: a table with the same tiles; its B and K may differ where one of them is 1.

    Returns:
      A table of capacity C₁ + C₂.

    Raises:
      ValueError: block sizes or shapes that differ.

    >>> one = BlockTable(jnp.array([[[1]]]), jnp.array([[[[3]]]]), 8, 8)
    >>> two = BlockTable(jnp.array([[[2]]]), jnp.array([[[[0, 3]]]]), 8, 8)
    >>> union_tables(one, two).indices.tolist()
    [[[[0, 3, 0]]]]
    """
    if (first.block_q, first.block_kv) != (second.block_q, second.block_kv):
        raise ValueError(
            f"tables to unite must share block_q and block_kv; they have "
            f"{(first.block_q, first.block_kv)} and {(second.block_q, second.block_kv)}."
        )
    shapes = first.counts.shape, second.counts.shape
    if shapes[0][2] != shapes[1][2] or any(a != b and 1 not in (a, b) for a, b in zip(*shapes)):
        raise ValueError(f"tables to unite have counts of shapes {shapes[0]} and {shapes[1]}.")
    shape = jnp.broadcast_shapes(*shapes)

    def listed(table):
        used = jnp.arange(table.capacity)[None, None, None] < table.counts[..., None]
        blocks = jnp.where(used, table.indices, _UNUSED)
        return jnp.broadcast_to(blocks, (*shape, table.capacity))

    blocks = jnp.concatenate([listed(first), listed(second)], axis=-1)
    union = _sorted_table(_without_repeats(blocks), first.block_q, first.block_kv)
    counts = jnp.where(first.dense | second.dense, DENSE, union.counts)
    return dataclasses.replace(union, counts=counts)


def best_blocks(scores: jax.Array, count: int) -> jax.Array:
    """The blocks that score best, best first, of few rows; of equals the first.

    Each block counts those that beat it: J² comparisons in one loop, which for the few rows of a
    token that is decoded takes a GPU less time than a sort, or XLA's selection of as many.

    Args:
      scores: [...,J] float32, none of them nan.
      count: how many, at most J.

    Returns:
      [...,count] int32.

    >>> best_blocks(jnp.array([[0.5, 2.0, 0.5, 1.0]]), 3).tolist()
    [[1, 3, 0]]
    """
    block = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    one, other = scores[..., :, None], scores[..., None, :]
    first = (block[None] < block[:, None]).reshape((1,) * (scores.ndim - 1) + (len(block),) * 2)
    better = (other > one) | ((other == one) & first)
    rank = jnp.sum(better, axis=-1, dtype=jnp.int32)
    slots = jnp.arange(count, dtype=jnp.int32).reshape((1,) * (scores.ndim - 1) + (-1, 1))
    block = block.reshape((1,) * scores.ndim + (-1,))
    return jnp.sum(jnp.where(rank[..., None, :] == slots, block, 0), axis=-1, dtype=jnp.int32)


def table_from_scores(
    scores: jax.Array,
    capacity: int,
    *,
    block_q: int,
    block_kv: int,
    sinks: int = 0,
    local: int = 0,
    causal: bool = True,
    wanted: jax.Array | None = None,
    row_limits: jax.Array | None = None,
    tile_starts: jax.Array | None = None,
) -> Selection:
    """For each tile and kv head: its own blocks, the sinks, and the best-scored of the others.

    A tile's own blocks are those its queries stand in, and `local` ones before. Under causality
    only blocks that were complete before the tile's first query compete, so a row never depends on
    later keys; the scores of other blocks are not read. Of equal scores the earlier block wins; a
    score of −inf is never chosen. No gradient flows to the scores: give it through `block_bias`.

    Args:
      scores: [B,K,M,J], larger is better.
      capacity: the most blocks a row lists, own blocks and sinks included; C = min(capacity, J).
      block_q: queries a tile.
      block_kv: keys a block.
      sinks: how many of the first blocks every row lists, once they are not in the future.
      local: how many blocks before those that its queries stand in every row lists.
      causal: whether later keys are hidden.
      wanted: [B,K,M,J] bool, blocks a gate opened: only these are listed, the best-scored first
        where they do not all fit. None wants as many as fit.
      row_limits: int32, broadcast against [B,K,M]: the most blocks each row lists, where that is
        fewer than `capacity`; own blocks and sinks are listed in any case.
      tile_starts: [B,M] int32, the position of each tile's first query; m·block_q when None.
        Decoding and chunked prefill say here which tiles they hold.

    Returns:
      The table, and how many wanted blocks were dropped in each row.

    Raises:
      ValueError: shapes that do not fit, or a capacity that cannot hold own blocks and sinks.

    >>> scores = jnp.array([[[[0., 0, 0, 0], [1, 0, 0, 0], [1, 2, 0, 0], [1, 3, 2, 0]]]])
    >>> table, dropped = table_from_scores(scores, 2, block_q=8, block_kv=8)
    >>> table.indices.tolist(), table.counts.tolist()
    ([[[[0, 0], [0, 1], [1, 2], [1, 3]]]], [[[1, 2, 2, 2]]])
    """
    sizes = match_shape("scores", scores, "BKMJ", {})
    if wanted is not None:
        match_shape("wanted", wanted, "BKMJ", sizes)
    if tile_starts is None:
        starts = jnp.arange(sizes["M"], dtype=jnp.int32)[None] * block_q
        forced = sinks + local + max(1, -(-block_q // block_kv))
    else:
        match_shape("tile_starts", tile_starts, "BM", sizes)
        starts = tile_starts
        # A tile may start inside a block.
        forced = sinks + local + 1 + -(-(block_q - 1) // block_kv)
    if capacity < min(forced, sizes["J"]):
        raise ValueError(
            f"capacity must hold a tile's own blocks and the sinks, {forced} blocks; "
            f"it is {capacity}."
        )
    blocks = jnp.arange(sizes["J"], dtype=jnp.int32)[None, None, None]
    first_own = (starts // block_kv)[:, None, :, None]
    last_own = ((starts + block_q - 1) // block_kv)[:, None, :, None]
    own = (blocks >= first_own - local) & (blocks <= last_own)
    sink = (blocks < sinks) & (blocks <= last_own) if causal else blocks < sinks
    open_ = (blocks < first_own) if causal else jnp.ones_like(own)
    if wanted is not None:
        open_ = open_ & wanted
    limit = jnp.finfo(jnp.float32).max
    rank = jax.lax.stop_gradient(scores.astype(jnp.float32))
    rank = jnp.where(open_, jnp.minimum(rank, limit), -jnp.inf)
    # Forced blocks outrank every score, so that only the others compete for what room is left.
    rank = jnp.where(own | sink, jnp.inf, rank)
    best, chosen = jax.lax.top_k(rank, min(capacity, sizes["J"]))
    kept = best > -jnp.inf
    if row_limits is not None:
        slots = jnp.arange(best.shape[-1], dtype=jnp.int32)[None, None, None]
        kept &= (best == jnp.inf) | (slots < row_limits[..., None])
    table = _sorted_table(jnp.where(kept, chosen, _UNUSED), block_q, block_kv)
    if wanted is None:
        return Selection(table, jnp.zeros_like(table.counts))
    return Selection(table, (rank > -jnp.inf).sum(-1, dtype=jnp.int32) - table.counts)
