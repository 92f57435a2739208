"""One pool of pages for the keys and values of all layers and sequences.

A page is a key block of one layer of one sequence, so listing blocks is listing pages. A dense
layer keeps a page a block. A sparse one that forgets keeps as many pages as it sees blocks, those
of the sink and of the window: the window's are a ring, in which the block that enters takes the
page of the block that leaves. Which pages a layer of a sequence owns stands in a table, slot by
slot; a free page is on the pool's stack and in no table.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from routing_jax.kernels import PageList
from routing_jax.kernels.checks import refuse_rows, values_to_check
from routing_jax.routers import SparseModeConfig

NO_PAGE = -1  # what a table holds where it owns nothing


class PagePool(NamedTuple):
    """Which pages are free.

    Attributes:
      free: [P] int32, a stack; the first `available` entries are the free pages.
      available: scalar int32.
    """

    free: jax.Array
    available: jax.Array


def new_pool(pages: int) -> PagePool:
    """A pool whose pages are all free.

    >>> int(new_pool(8).available)
    8
    """
    return PagePool(jnp.arange(pages, dtype=jnp.int32), jnp.int32(pages))


def take_pages(pool: PagePool, counts: jax.Array, slots: int) -> tuple[PagePool, jax.Array]:
    """Takes pages for each sequence.

    Args:
      pool: where from.
      counts: [B] int32, pages wanted, at most `slots` each.
      slots: C, of a table's row.

    Returns:
      (the pool, [B,C] int32 pages; −1 past the count).

    Raises:
      ValueError: more are wanted than are free, where counts are concrete. Under jit the caller has
        to know; what is not there is −1.

    >>> pool, pages = take_pages(new_pool(4), jnp.array([1, 2]), 3)
    >>> pages.tolist(), int(pool.available)
    ([[3, -1, -1], [2, 1, -1]], 1)
    """
    ends = jnp.cumsum(counts)
    found = values_to_check(ends, pool.available)
    if found is not None:
        _, (known, free) = found
        refuse_rows(
            known > free,
            "the pages wanted must be free",
            lambda row: f"is short of {free} free ones",
        )
    slot = jnp.arange(slots, dtype=jnp.int32)[None]
    place = pool.available - 1 - ((ends - counts)[:, None] + slot)
    wanted = (slot < counts[:, None]) & (place >= 0)
    pages = jnp.where(wanted, pool.free[jnp.maximum(place, 0)], NO_PAGE)
    taken = wanted.sum(dtype=jnp.int32)
    return pool._replace(available=pool.available - taken), pages


def return_pages(pool: PagePool, pages: jax.Array) -> PagePool:
    """Gives pages back.

    Args:
      pool: where to.
      pages: int32 of any shape, each page once; −1 is none.

    >>> pool, pages = take_pages(new_pool(4), jnp.array([2]), 2)
    >>> int(return_pages(pool, pages).available)
    4
    """
    pages = pages.reshape(-1)
    listed = pages != NO_PAGE
    place = pool.available + jnp.cumsum(listed, dtype=jnp.int32) - 1
    place = jnp.where(listed, place, pool.free.shape[0])
    return PagePool(
        pool.free.at[place].set(pages, mode="drop"), pool.available + listed.sum(dtype=jnp.int32)
    )


def pages_needed(lengths: jax.Array, whole: jax.Array, sparse: SparseModeConfig) -> jax.Array:
    """How many pages hold so many tokens.

    Args:
      lengths: int32, tokens.
      whole: bool of a shape that broadcasts with it, whether the layer keeps them all.
      sparse: what it keeps otherwise.

    >>> sparse = SparseModeConfig(sink=8, window=24, block_q=8, block_kv=8)
    >>> pages_needed(jnp.array([100, 100]), jnp.array([True, False]), sparse).tolist()
    [13, 4]
    """
    blocks = -(-lengths // sparse.block_kv)
    return jnp.where(whole, blocks, jnp.minimum(blocks, sparse.sink_blocks + sparse.window_blocks))


def slot_of_block(block: jax.Array, whole: jax.Array, sparse: SparseModeConfig) -> jax.Array:
    """Which slot of a row holds a block, while it is held.

    Args:
      block: int32, which block of the sequence.
      whole: bool that broadcasts with it.
      sparse: what is kept of other layers.

    >>> sparse = SparseModeConfig(sink=8, window=24, block_q=8, block_kv=8)
    >>> slot_of_block(jnp.arange(8), jnp.array([False]), sparse).tolist()
    [0, 1, 2, 3, 1, 2, 3, 1]
    """
    ring = sparse.sink_blocks + (block - sparse.sink_blocks) % sparse.window_blocks
    return jnp.where(whole | (block < sparse.sink_blocks), block, ring)


def prompt_pages(
    table: jax.Array, lengths: jax.Array, whole: jax.Array, blocks: int, sparse: SparseModeConfig
) -> jax.Array:
    """Where each block of a prompt is kept.

    Args:
      table: [B,C] int32, the pages that a layer owns.
      lengths: [B] int32, tokens of each prompt.
      whole: [B] bool, whether the layer keeps them all.
      blocks: J, of the padded prompt.
      sparse: what is kept otherwise.

    Returns:
      [B,J] int32; −1 for blocks that are not kept.

    >>> table, sparse = jnp.array([[9, 8, 7, 6, 5]] * 2), SparseModeConfig(
    ...     sink=2, window=4, block_q=2, block_kv=2)
    >>> prompt_pages(table, jnp.array([9, 9]), jnp.array([True, False]), 6, sparse).tolist()
    [[9, 8, 7, 6, 5, -1], [9, -1, -1, 8, 7, -1]]
    """
    block = jnp.arange(blocks, dtype=jnp.int32)[None]
    filled = -(-lengths // sparse.block_kv)[:, None]
    seen = whole[:, None] | (block < sparse.sink_blocks)
    seen |= block >= filled - sparse.window_blocks
    slot = slot_of_block(block, whole[:, None], sparse)
    pages = jnp.take_along_axis(table, jnp.minimum(slot, table.shape[1] - 1), axis=1)
    return jnp.where(seen & (block < filled), pages, NO_PAGE)


def held_pages(
    table: jax.Array, lengths: jax.Array, whole: jax.Array, sparse: SparseModeConfig
) -> PageList:
    """The pages that a sequence's newest token attends to: all that the layer still holds.

    Where it forgets, those are the blocks that `streaming_table` lists for the token's tile:
    prefill and decoding agree.

    Args:
      table: [B,C] int32, the pages that a layer owns.
      lengths: [B] int32, tokens of each sequence, the newest included; 0 for none.
      whole: [B] bool, whether the layer keeps them all.
      sparse: what it keeps otherwise.

    >>> table = jnp.array([[9, 8, 7]])
    >>> sparse = SparseModeConfig(sink=2, window=4, block_q=2, block_kv=2)
    >>> held_pages(table, jnp.array([9]), jnp.array([False]), sparse).blocks.tolist()
    [[[0, 3, 4]]]
    """
    slot = jnp.arange(table.shape[1], dtype=jnp.int32)[None]
    newest = (lengths[:, None] - 1) // sparse.block_kv
    ring = newest - (newest - slot) % sparse.window_blocks
    blocks = jnp.where(whole[:, None] | (slot < sparse.sink_blocks), slot, ring)
    counts = pages_needed(lengths, whole, sparse).astype(jnp.int32)
    blocks = jnp.where(slot < counts[:, None], blocks, 0)
    return PageList(counts[:, None], table[:, None], blocks[:, None])
