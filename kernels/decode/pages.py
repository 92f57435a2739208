"""Which pages of a KV pool each sequence reads when it decodes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from routing_jax.kernels.checks import check_dtype, match_shape, refuse_rows, values_to_check


class PageList(NamedTuple):
    """For each sequence and kv head, the pages of a pool to attend to, and where they belong.

    A page is a key block: page `pages[…,c]` of the pool holds the keys at positions
    blocks[…,c]·page_size onwards of the sequence. K may be 1 and then stands for every head.
    Without a pool of its own, a contiguous cache [B,S,K,H] is one by reshaping it to
    [B·J,page_size,K,H]: sequence b's block j is then page b·J + j.

    Attributes:
      counts: [B,K] int32, how many pages are listed.
      pages: [B,K,C] int32, where in the pool; slots past the count are ignored.
      blocks: [B,K,C] int32, which block of the sequence the page holds; no block twice.
    """

    counts: jax.Array
    pages: jax.Array
    blocks: jax.Array


def contiguous_pages(batch: int, blocks_per_sequence: int) -> jax.Array:
    """The page table of a contiguous cache reshaped to a pool.

    Args:
      batch: B.
      blocks_per_sequence: J = S / page_size.

    Returns:
      [B,J] int32.

    >>> contiguous_pages(2, 3).tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    return jnp.arange(batch * blocks_per_sequence, dtype=jnp.int32).reshape(batch, -1)


def dense_pages(page_table: jax.Array, lengths: jax.Array, page_size: int) -> PageList:
    """Every page that a sequence has filled, for all heads: dense attention.

    Args:
      page_table: [B,J] int32, the page that holds each block of the sequence.
      lengths: [B] int32, keys of each sequence.
      page_size: keys a page.

    Raises:
      ValueError: shapes that do not fit.

    >>> dense_pages(jnp.array([[5, 3, 9]]), jnp.array([70]), 64).counts.tolist()
    [[2]]
    """
    sizes = match_shape("page_table", page_table, "BJ", {})
    match_shape("lengths", lengths, "B", sizes)
    blocks = jnp.broadcast_to(jnp.arange(sizes["J"], dtype=jnp.int32)[None], page_table.shape)
    counts = jnp.minimum(-(-lengths // page_size), sizes["J"]).astype(jnp.int32)
    return PageList(counts[:, None], page_table[:, None], blocks[:, None])


def listed_pages(page_table: jax.Array, counts: jax.Array, blocks: jax.Array) -> PageList:
    """The pages of listed blocks, such as one tile's row of a BlockTable.

    Args:
      page_table: [B,J] int32, the page that holds each block of the sequence.
      counts: [B,K] int32, how many blocks are listed; not −1: see `where_pages` for dense ones.
      blocks: [B,K,C] int32, the listed blocks.

    Raises:
      ValueError: shapes that do not fit.

    >>> listed_pages(jnp.array([[5, 3, 9]]), jnp.array([[2]]), jnp.array([[[0, 2]]])).pages.tolist()
    [[[5, 9]]]
    """
    sizes = match_shape("page_table", page_table, "BJ", {})
    sizes = match_shape("counts", counts, "BK", sizes)
    match_shape("blocks", blocks, "BKC", sizes)
    pages = jnp.take_along_axis(page_table[:, None], blocks, axis=2, mode="clip")
    return PageList(counts, pages, blocks)


def where_pages(condition: jax.Array, first: PageList, second: PageList) -> PageList:
    """One list's rows for some sequences and another's for the rest, such as dense and sparse.

    Args:
      condition: [B] bool, whether a sequence takes its rows from `first`.
      first: a list.
      second: a list of as many sequences; its K may differ where one is 1.

    Returns:
      A list with the larger K and the larger C.

    >>> dense = dense_pages(jnp.array([[0, 1], [2, 3]]), jnp.array([128, 128]), 64)
    >>> own = jnp.array([[[1]], [[3]]])
    >>> short = PageList(jnp.array([[1], [1]]), own, own % 2)
    >>> where_pages(jnp.array([True, False]), dense, short).counts.tolist()
    [[2], [1]]
    """
    capacity = max(first.pages.shape[2], second.pages.shape[2])

    def widen(x):
        return x if x.ndim == 2 else jnp.pad(x, ((0, 0), (0, 0), (0, capacity - x.shape[2])))

    def choose(a, b):
        a, b = widen(a), widen(b)
        return jnp.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return PageList(*map(choose, first, second))


def check_pages(pages: PageList, *, batch: int, kv_heads: int, pool_size: int) -> None:
    """Refuses a list that does not fit the arrays it is used with.

    Values are checked where they are concrete, or under `checked`, as in `check_table`.

    Args:
      pages: the list.
      batch: B.
      kv_heads: K.
      pool_size: pages in the pool.

    Raises:
      ValueError: a shape or dtype that does not fit, a count outside [0, C], a listed page
        outside the pool, a negative block, or a block listed twice in a row.

    >>> one = jnp.ones((1, 1, 1), jnp.int32)
    >>> check_pages(PageList(one[..., 0], one, one), batch=1, kv_heads=1, pool_size=1)
    Traceback (most recent call last):
    ...
    ValueError: pages.pages must lie in [0, 1); row (0, 0) lists [1].
    """
    sizes = match_shape("pages.counts", pages.counts, "BK", {"B": batch})
    sizes = match_shape("pages.pages", pages.pages, "BKC", sizes)
    match_shape("pages.blocks", pages.blocks, "BKC", sizes)
    for name, array in pages._asdict().items():
        check_dtype(f"pages.{name}", array, ("int32",))
    if sizes["K"] not in (1, kv_heads):
        raise ValueError(
            f"pages' K must be 1 or that of the pool, {kv_heads}; "
            f"its counts [B,K] have shape {pages.counts.shape}."
        )
    found = values_to_check(*pages)
    if found is None:
        return
    xp, (counts, physical, blocks) = found
    listed = xp.arange(sizes["C"])[None, None] < counts[..., None]
    order = xp.sort(xp.where(listed, blocks, np.iinfo(np.int32).max), axis=-1)
    repeated = listed[..., 1:] & (order[..., 1:] == order[..., :-1])

    def listing(array):
        return lambda row: f"lists {array[row][: counts[row]].tolist()}"

    refuse_rows(
        (counts < 0) | (counts > sizes["C"]),
        f"pages.counts must lie in [0, {sizes['C']}]",
        lambda row: f"counts {counts[row]}",
    )
    refuse_rows(
        (listed & ((physical < 0) | (physical >= pool_size))).any(-1),
        f"pages.pages must lie in [0, {pool_size})",
        listing(physical),
    )
    refuse_rows(
        (listed & (blocks < 0)).any(-1) | repeated.any(-1),
        "pages.blocks must be distinct and not negative",
        listing(blocks),
    )
