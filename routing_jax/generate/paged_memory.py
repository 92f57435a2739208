"""What is remembered of all sequences, in pages of one pool; and how it is forgotten."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from routing_jax.attention.page_pool import NO_PAGE, PagePool, new_pool, return_pages
from routing_jax.generate.config import ServingConfig
from routing_jax.models import DecoderConfig


class PagedMemory(NamedTuple):
    """What is remembered of all sequences.

    Attributes:
      keys: [P,page_size,K,H].
      values: [P,page_size,K,H].
      pool: which pages are free.
      tables: [L,B,C] int32, the pages that a layer of a sequence owns; −1 for none.
      whole: [L,B] bool, whether it keeps everything, and attends to it from now on or searches it.
      searches: [L,B] bool, whether its tokens search what it keeps, each by its own query.
      lengths: [B] int32, tokens whose keys are held; 0 where there is no sequence.
      narrow: [P,K,page_size,R], the channels of keys by which pages are found; None where no token
        searches.
    """

    keys: jax.Array
    values: jax.Array
    pool: PagePool
    tables: jax.Array
    whole: jax.Array
    searches: jax.Array
    lengths: jax.Array
    narrow: jax.Array | None = None


def empty_memory(config: DecoderConfig, serving: ServingConfig) -> PagedMemory:
    """Memory without a sequence.

    >>> empty_memory(DecoderConfig(layers="full*2"), ServingConfig(pages=4)).keys.shape
    (4, 128, 1, 64)
    """
    L, B = len(config.mixers), serving.sequences
    held = (serving.pages, serving.page_size, config.num_kv_heads, config.head_dim)
    narrow = None
    if config.sparse.answers == "topk":
        channels = config.sparse.channels_of(config.head_dim)
        narrow = jnp.zeros((held[0], held[2], held[1], channels), config.dtype)
    return PagedMemory(
        jnp.zeros(held, config.dtype),
        jnp.zeros(held, config.dtype),
        new_pool(serving.pages),
        jnp.full((L, B, serving.slots), NO_PAGE, jnp.int32),
        jnp.zeros((L, B), bool),
        jnp.zeros((L, B), bool),
        jnp.zeros(B, jnp.int32),
        narrow,
    )


@functools.partial(jax.jit, donate_argnames=("memory",))
def forget(memory: PagedMemory, leaving: jax.Array) -> PagedMemory:
    """The memory without some sequences, whose pages are free again.

    Args:
      memory: is donated.
      leaving: [B] bool.

    >>> memory = empty_memory(DecoderConfig(layers="full"), ServingConfig(pages=4, sequences=2))
    >>> int(forget(memory, jnp.array([True, False])).pool.available)
    4
    """
    pages = jnp.where(leaving[None, :, None], memory.tables, NO_PAGE)
    return memory._replace(
        pool=return_pages(memory.pool, pages),
        tables=jnp.where(leaving[None, :, None], NO_PAGE, memory.tables),
        lengths=jnp.where(leaving, 0, memory.lengths),
    )
