"""Decoding by search: a token reads sink, window and the pages that it finds by their mean keys.

Beside the pool stand sums of each page's keys, a few vectors a kv head, one for each part of it: of
16 tokens each, in float32, an eighth of the bytes of 16-bit keys. Prefill writes the sums and every
token adds its key, so nothing is read twice; a page competes once it has left the window, when all
of its tokens are in. So parts of all pages that do are full, and a sum is as many times its mean.
"""

import jax
import jax.numpy as jnp

from routing_jax.attention.page_pool import slot_of_block
from routing_jax.kernels import PageList
from routing_jax.routers import (
    SparseModeConfig,
    log_shares,
    searchable_blocks,
    streaming_table,
)


def add_to_sums(
    sums: jax.Array, pages: jax.Array, offsets: jax.Array, added: jax.Array, mean_of: int
) -> jax.Array:
    """The sums of pages, with a key more in some.

    Args:
      sums: [P,Z,K,H] float32.
      pages: int32 of any shape, each page once; P or more for none.
      offsets: int32 of that shape, the key's place in its page; with the first key of a part, what
        was there is forgotten.
      added: [...,K,H] float32, the keys.
      mean_of: keys of each part.

    >>> sums, one = 2 * jnp.ones((3, 2, 1, 1)), jnp.ones((2, 1, 1))
    >>> add_to_sums(sums, jnp.array([0, 2]), jnp.array([5, 4]), one, 4)[..., 0, 0].tolist()
    [[2.0, 3.0], [2.0, 2.0], [2.0, 1.0]]
    """
    part, old = offsets // mean_of, offsets % mean_of > 0
    before = jnp.where(old[..., None, None], sums.at[pages, part].get(mode="clip"), 0)
    return sums.at[pages, part].set(before + added, mode="drop")


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
    sums: jax.Array,
    lengths: jax.Array,
    searches: jax.Array,
    sparse: SparseModeConfig,
) -> PageList:
    """Some sequences' lists with the pages that their newest queries find, for each kv head.

    Reads Z·K·H float32 of each page that has left the window: 32 MiB of 1,024 pages with 8 sums
    for each of 8 heads of 128, or 11 µs at 3 TB/s. Nothing as large is written.

    Args:
      near: what `near_pages` lists.
      table: [B,C] int32, the page of each block, of the layers that search.
      q: [B,N,H], the newest token's queries; those of a group choose together.
      sums: [P,Z,K,H] float32, of all pages' keys.
      lengths: [B] int32, tokens of each sequence, the newest included.
      searches: [B] bool; other sequences keep their lists.
      sparse: sink and window, and how many blocks are to be found.

    >>> sparse = SparseModeConfig(retrieval="topk", sink=2, window=2, blocks=1, means=1,
    ...                           block_q=2, block_kv=2)
    >>> table, length, yes = jnp.array([[0, 3, 1, 2]]), jnp.array([8]), jnp.array([True])
    >>> near = near_pages(table, length, yes, sparse)
    >>> sums, q = jnp.array([9.0, 2.0, 9.0, 1.0]).reshape(4, 1, 1, 1), jnp.ones((1, 1, 1))
    >>> found = search_pages(near, table, q, sums, length, yes, sparse)
    >>> found.counts.tolist(), found.blocks.tolist(), found.pages.tolist()
    ([[3]], [[[0, 3, 2]]], [[[0, 2, 1]]])
    """
    B, C = table.shape
    K, H = sums.shape[2:]
    query = q.astype(jnp.float32).reshape(B, K, 1, 1, -1, H) * (H**-0.5 / sparse.mean_of)
    competes = searchable_blocks(sparse, lengths - 1, C) & searches[:, None]
    # What need not be read is one page's sum, again and again.
    pages = jnp.where(competes, table, 0)[:, None]
    heads = jnp.arange(K, dtype=jnp.int32)[None, :, None]
    # A sum of products, no dot: it compiles into one loop over what is gathered, and a layer that
    # no sequence searches writes no copy of one page again and again.
    logits = jnp.sum(sums.at[pages, :, heads].get(mode="clip")[..., None, :] * query, axis=-1)
    logits = jnp.moveaxis(jax.nn.logsumexp(logits, axis=3), -1, 0)
    scores = log_shares(logits, competes[:, None])
    # Only these few are sorted out: with sink and window among them, GPUs would sort all.
    most = min(sparse.blocks, C)
    _, blocks = jax.lax.top_k(scores.reshape(B * K, C), most)
    blocks = blocks.reshape(B, K, most)
    found = jnp.minimum(jnp.sum(competes, axis=1, dtype=jnp.int32), most)
    pages = jnp.take_along_axis(table[:, None], blocks, axis=2, mode="clip")

    def join(near: jax.Array, found: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.broadcast_to(near, (B, K, near.shape[2])), found], axis=2)

    # Where any page competes, sink and window fill their slots.
    counts = jnp.broadcast_to(near.counts + found[:, None], (B, K))
    return PageList(counts, join(near.pages, pages), join(near.blocks, blocks))
