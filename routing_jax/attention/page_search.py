"""Decoding by search: a token reads sink, window and the pages that it finds by a few channels.

Beside the pool stands a narrow one with those channels of every key, a quarter of them, in which a
kv head's keys of a page lie together: an eighth of the bytes of keys and values, read in one piece.
A page competes once it has left the window, when all of its tokens are in.
"""

import jax
import jax.numpy as jnp

from routing_jax.attention.page_pool import slot_of_block
from routing_jax.kernels import PageList, best_blocks
from routing_jax.routers import (
    SparseModeConfig,
    search_scores,
    searchable_blocks,
    streaming_table,
)


def near_pages(
    table: jax.Array, lengths: jax.Array, whole: jax.Array, sparse: SparseModeConfig
) -> PageList:
    """The pages of sink and window of a sequence's newest token, whatever else the layer holds.

    Args:
      table: [B,C] int32, the pages that a layer owns.
      lengths: [B] int32, tokens of each sequence, the newest included; 0 for none.
      whole: [B] bool, whether the layer keeps them all.
      sparse: the sizes of sink and window.

    >>> table = jnp.array([[9, 8, 7, 6, 5]] * 2)
    >>> sparse = SparseModeConfig(sink=2, window=4, block_q=2, block_kv=2)
    >>> found = near_pages(table, jnp.array([9, 9]), jnp.array([True, False]), sparse)
    >>> found.blocks.tolist(), found.pages.tolist()
    ([[[0, 3, 4]], [[0, 3, 4]]], [[[9, 6, 5]], [[9, 8, 7]]])
    """
    row = streaming_table(sparse, jnp.maximum(lengths - 1, 0)[:, None])
    blocks = row.indices[:, :, 0]
    slots = slot_of_block(blocks, whole[:, None, None], sparse)
    pages = jnp.take_along_axis(table[:, None], slots, axis=2, mode="clip")
    return PageList(jnp.where(lengths[:, None] > 0, row.counts[:, :, 0], 0), pages, blocks)


def search_pages(
    near: PageList,
    table: jax.Array,
    q: jax.Array,
    narrow: jax.Array,
    lengths: jax.Array,
    searches: jax.Array,
    sparse: SparseModeConfig,
) -> PageList:
    """Some sequences' lists with the pages that their newest queries find, for each kv head.

    Reads R of 2·H channels of each page that has left the window: 64 MiB of 1,024 pages with 32
    channels for each of 8 heads, or 22 µs at 3 TB/s; of sequences that do not search, nothing.

    Args:
      near: what `near_pages` lists.
      table: [B,C] int32, the page of each block, of the layers that search.
      q: [B,N,H], the newest token's queries; those of a group choose together.
      narrow: [P,K,page_size,R], the channels of all pages' keys that are searched.
      lengths: [B] int32, tokens of each sequence, the newest included.
      searches: [B] bool; other sequences keep their lists.
      sparse: sink and window, and how many blocks are to be found.

    >>> sparse = SparseModeConfig(retrieval="topk", sink=2, window=2, blocks=1, block_q=2,
    ...                           block_kv=2)
    >>> table, length, yes = jnp.array([[0, 3, 1, 2]]), jnp.array([8]), jnp.array([True])
    >>> near = near_pages(table, length, yes, sparse)
    >>> narrow, q = jnp.array([9.0, 2.0, 9.0, 1.0]).reshape(4, 1, 1, 1), jnp.ones((1, 1, 2))
    >>> narrow = jnp.broadcast_to(narrow, (4, 1, 2, 2))
    >>> found = search_pages(near, table, q, narrow, length, yes, sparse)
    >>> found.counts.tolist(), found.blocks.tolist(), found.pages.tolist()
    ([[3]], [[[0, 3, 2]]], [[[0, 2, 1]]])
    """
    B, C = table.shape
    K = narrow.shape[1]
    places = jnp.where(searches, lengths - 1, -1)[:, None]
    scores = search_scores(sparse, q[:, None], narrow, table, places)
    competing = jnp.sum(searchable_blocks(sparse, places[:, 0], C), axis=1, dtype=jnp.int32)
    most = min(sparse.blocks, C)
    blocks = best_blocks(scores[:, :, 0], most)
    found = jnp.minimum(competing, most)
    pages = jnp.take_along_axis(table[:, None], blocks, axis=2, mode="clip")

    def join(near: jax.Array, found: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.broadcast_to(near, (B, K, near.shape[2])), found], axis=2)

    # Where any page competes, sink and window fill their slots.
    counts = jnp.broadcast_to(near.counts + found[:, None], (B, K))
    return PageList(counts, join(near.pages, pages), join(near.blocks, blocks))
