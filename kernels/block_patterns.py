"""Tables that do not depend on the input: dense, windows, sinks, strides, global blocks.

They are small arithmetic inside jit and have B = K = 1. Query t and key s stand at positions t
and s; windows and strides count whole key blocks.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from routing_jax.kernels.block_selection import table_from_blocks, union_tables
from routing_jax.kernels.block_table import DENSE, BlockTable, ceil_div


def _own_blocks(num_queries: int, num_keys: int, block_q: int, block_kv: int):
    """[M] the first and the last key block in which each tile's queries stand, and J."""
    for name, value in (
        ("num_queries", num_queries),
        ("num_keys", num_keys),
        ("block_q", block_q),
        ("block_kv", block_kv),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; it is {value}.")
    starts = np.arange(ceil_div(num_queries, block_q)) * block_q
    last = np.minimum(starts + block_q, num_queries) - 1
    return starts // block_kv, last // block_kv, ceil_div(num_keys, block_kv)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}; it is {value}.")


def dense_table(num_queries: int, num_keys: int, *, block_q: int, block_kv: int) -> BlockTable:
    """Every tile attends to every visible block: full attention, with nothing listed.

    Args:
      num_queries: T.
      num_keys: S.
      block_q: queries a tile.
      block_kv: keys a block.

    Raises:
      ValueError: a size below 1.

    >>> dense_table(20, 20, block_q=8, block_kv=8).counts.tolist()
    [[[-1, -1, -1]]]
    """
    tiles = len(_own_blocks(num_queries, num_keys, block_q, block_kv)[0])
    counts = jnp.full((1, 1, tiles), DENSE, jnp.int32)
    return BlockTable(counts, jnp.zeros((1, 1, tiles, 1), jnp.int32), block_q, block_kv)


def window_table(
    num_queries: int,
    num_keys: int,
    window: int,
    *,
    block_q: int,
    block_kv: int,
    causal: bool = True,
) -> BlockTable:
    """A sliding window: each tile's own blocks and `window` blocks before them.

    Args:
      num_queries: T.
      num_keys: S.
      window: blocks before the own ones, and after them too when not causal.
      block_q: queries a tile.
      block_kv: keys a block.
      causal: whether later keys are hidden.

    Raises:
      ValueError: a size below 1 or a window below 0.

    >>> table = window_table(32, 32, 1, block_q=8, block_kv=8)
    >>> table.counts.tolist(), table.indices[0, 0].tolist()
    ([[[1, 2, 2, 2]]], [[0, 0], [0, 1], [1, 2], [2, 3]])
    """
    _at_least("window", window, 0)
    first, last, num_blocks = _own_blocks(num_queries, num_keys, block_q, block_kv)
    low = np.maximum(first - window, 0)
    high = np.minimum(last + (0 if causal else window), num_blocks - 1)
    lengths = np.maximum(high - low + 1, 0)
    slots = jnp.arange(max(1, int(lengths.max())), dtype=jnp.int32)[None]
    counts = jnp.asarray(lengths, jnp.int32)[:, None]
    blocks = jnp.where(slots < counts, jnp.asarray(low, jnp.int32)[:, None] + slots, 0)
    return BlockTable(counts[None, None, :, 0], blocks[None, None], block_q, block_kv)


def sink_window_table(
    num_queries: int,
    num_keys: int,
    window: int,
    *,
    sinks: int,
    block_q: int,
    block_kv: int,
    causal: bool = True,
) -> BlockTable:
    """A sliding window plus the first blocks of the sequence (StreamingLLM, arXiv 2309.17453).

    Args:
      num_queries: T.
      num_keys: S.
      window: blocks before the own ones, and after them too when not causal.
      sinks: how many first blocks every tile lists, once they are not in the future.
      block_q: queries a tile.
      block_kv: keys a block.
      causal: whether later keys are hidden.

    Raises:
      ValueError: a size or `sinks` below 1, or a window below 0.

    >>> sink_window_table(32, 32, 0, sinks=1, block_q=8, block_kv=8).indices[0, 0].tolist()
    [[0, 0], [0, 1], [0, 2], [0, 3]]
    """
    _at_least("sinks", sinks, 1)
    local = window_table(
        num_queries, num_keys, window, block_q=block_q, block_kv=block_kv, causal=causal
    )
    _, _, num_blocks = _own_blocks(num_queries, num_keys, block_q, block_kv)
    first = _columns(
        range(min(sinks, num_blocks)), num_queries, num_keys, block_q, block_kv, causal
    )
    return union_tables(first, local)


def strided_table(
    num_queries: int,
    num_keys: int,
    stride: int,
    *,
    block_q: int,
    block_kv: int,
    causal: bool = True,
) -> BlockTable:
    """Each tile's own blocks and every `stride`-th block counted from its first own one.

    The strided pattern of Sparse Transformers (arXiv 1904.10509), by blocks.

    Args:
      num_queries: T.
      num_keys: S.
      stride: blocks from one listed block to the next.
      block_q: queries a tile.
      block_kv: keys a block.
      causal: whether later keys are hidden.

    Raises:
      ValueError: a size or stride below 1.

    >>> table = strided_table(32, 32, 2, block_q=8, block_kv=8)
    >>> table.counts.tolist(), table.indices[0, 0, :, :2].tolist()
    ([[[1, 1, 2, 2]]], [[0, 0], [1, 0], [0, 2], [1, 3]])
    """
    _at_least("stride", stride, 1)
    first, _, num_blocks = _own_blocks(num_queries, num_keys, block_q, block_kv)
    own = jnp.asarray(first, jnp.int32)[:, None]
    steps = jnp.arange(ceil_div(num_blocks, stride), dtype=jnp.int32)[None] * stride
    blocks = own % stride + steps
    listed = (blocks < num_blocks) & ((blocks <= own) if causal else True)
    strided = table_from_blocks(
        blocks[None, None], listed[None, None], block_q=block_q, block_kv=block_kv
    )
    local = window_table(
        num_queries, num_keys, 0, block_q=block_q, block_kv=block_kv, causal=causal
    )
    return union_tables(strided, local)


def global_table(
    num_queries: int,
    num_keys: int,
    blocks: Sequence[int],
    *,
    block_q: int,
    block_kv: int,
    causal: bool = True,
) -> BlockTable:
    """Some blocks that every tile attends to and whose own queries attend to everything.

    The global tokens of Longformer and BigBird (arXiv 2004.05150, 2007.14062), by blocks. A tile
    that holds queries of a global block is dense. Unite it with a window for the local part.

    Args:
      num_queries: T.
      num_keys: S.
      blocks: the global key blocks.
      block_q: queries a tile.
      block_kv: keys a block.
      causal: whether later keys are hidden.

    Raises:
      ValueError: a size below 1, no block, or a block outside [0, J).

    >>> table = global_table(32, 32, [1], block_q=8, block_kv=8)
    >>> table.counts.tolist(), table.indices[0, 0].tolist()
    ([[[0, -1, 1, 1]]], [[0], [1], [1], [1]])
    """
    first, last, num_blocks = _own_blocks(num_queries, num_keys, block_q, block_kv)
    chosen = sorted(set(blocks))
    if not chosen or chosen[0] < 0 or chosen[-1] >= num_blocks:
        raise ValueError(f"blocks must name key blocks in [0, {num_blocks}); it is {blocks}.")
    table = _columns(chosen, num_queries, num_keys, block_q, block_kv, causal)
    held = [any(lo <= block <= hi for block in chosen) for lo, hi in zip(first, last)]
    counts = jnp.where(jnp.asarray(held)[None, None], DENSE, table.counts)
    return dataclasses.replace(table, counts=counts)


def _columns(
    blocks: Sequence[int],
    num_queries: int,
    num_keys: int,
    block_q: int,
    block_kv: int,
    causal: bool,
) -> BlockTable:
    """The same ascending blocks for every tile, those of its future left out."""
    _, last, _ = _own_blocks(num_queries, num_keys, block_q, block_kv)
    columns = jnp.asarray(list(blocks), jnp.int32)[None]
    limit = jnp.asarray(last, jnp.int32)[:, None]
    listed = (columns <= limit) if causal else jnp.ones((len(last), len(blocks)), bool)
    table_blocks = jnp.where(listed, columns, 0)[None, None]
    counts = listed.sum(axis=1, dtype=jnp.int32)[None, None]
    return BlockTable(counts, table_blocks, block_q, block_kv)
