"""Layer-major prefill into paged memory: each layer reads whole prompts and decides what to keep.

A layer's router reads the queries of a prompt's last tokens, which exist once the whole prompt has
passed the layer below. So a host loop calls one compiled step a layer; which layer it is, and what
is decided there, are values, not programs. Prompts so short that sparse attention would see all of
them are not routed: they cost what they cost a model without routers. What is decided without a
router holds for them too, and for what follows.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from routing_jax.attention.page_pool import (
    NO_PAGE,
    PagePool,
    new_pool,
    pages_needed,
    prompt_pages,
    return_pages,
    take_pages,
)
from routing_jax.generate.config import ServingConfig
from routing_jax.generate.layer import (
    Params,
    embed_tokens,
    finish_prompts,
    layer_params,
    project_prompts,
    read_out,
    route_prompts,
)
from routing_jax.kernels import block_sparse_attention, dense_attention
from routing_jax.models import DecoderConfig
from routing_jax.routers import block_sums, layer_table, mean_key_scores

ROUTED, SPARSE, DENSE = -1, 0, 1
"""Who decides a layer: its router, or nobody."""


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
      sums: [P,K,H] float32, of the keys of each page; None where no layer searches them.
    """

    keys: jax.Array
    values: jax.Array
    pool: PagePool
    tables: jax.Array
    whole: jax.Array
    searches: jax.Array
    lengths: jax.Array
    sums: jax.Array | None = None


def empty_memory(config: DecoderConfig, serving: ServingConfig) -> PagedMemory:
    """Memory without a sequence.

    >>> empty_memory(DecoderConfig(layers="full*2"), ServingConfig(pages=4)).keys.shape
    (4, 128, 1, 64)
    """
    L, B = len(config.mixers), serving.sequences
    shape = (serving.pages, serving.page_size, config.num_kv_heads, config.head_dim)
    return PagedMemory(
        jnp.zeros(shape, config.dtype),
        jnp.zeros(shape, config.dtype),
        new_pool(serving.pages),
        jnp.full((L, B, serving.slots), NO_PAGE, jnp.int32),
        jnp.zeros((L, B), bool),
        jnp.zeros((L, B), bool),
        jnp.zeros(B, jnp.int32),
        jnp.zeros((shape[0], *shape[2:])) if config.sparse.answers == "topk" else None,
    )


@functools.partial(jax.jit, static_argnames=("config", "serving"), donate_argnames=("x", "memory"))
def prefill_layer(
    config: DecoderConfig,
    serving: ServingConfig,
    params: Params,
    layer: jax.Array,
    decision: jax.Array,
    x: jax.Array,
    lengths: jax.Array,
    limits: jax.Array,
    rows: jax.Array,
    memory: PagedMemory,
) -> tuple[jax.Array, PagedMemory]:
    """One layer over whole prompts; compiled once for all layers and all that they decide.

    Args:
      config: the model.
      serving: the sizes.
      params: of this layer.
      layer: which layer it is.
      decision: ROUTED (in a model of 'layer' layers), SPARSE or DENSE.
      x: [B,T,D], the layer's input; T is whole pages.
      lengths: [B] int32, valid tokens of each prompt.
      limits: [B] int32, the most tokens that each sequence will have.
      rows: [B] int32, which sequence of the memory each becomes.
      memory: must have pages enough; the engine sees to that.

    Returns:
      (the layer's output, the memory with the layer's keys and values).
    """
    B, T, _ = x.shape
    page_size, sparse = serving.page_size, config.sparse
    chunk = serving.chunk_of(B, T)
    dense = jnp.broadcast_to(decision == DENSE, (B,))
    if "layer" in config.mixers:
        routed = lengths <= sparse.reach
        if sparse.reach < T:
            routed |= route_prompts(config, params, x, lengths)
        dense = jnp.where(decision == ROUTED, routed, dense)
    q, k, v = project_prompts(config, params, x, lengths, chunk)

    place = jnp.arange(T, dtype=jnp.int32)[None]
    starts = jnp.arange(0, T, sparse.block_q, dtype=jnp.int32)[None]
    scores = sums = None
    if sparse.searches:
        sums, sizes = block_sums(k.reshape(B, T, -1), place < lengths[:, None], page_size)
        sums = sums.reshape(B, -1, *k.shape[2:])
        means = sums / jnp.maximum(sizes, 1)[..., None, None]
        scores = mean_key_scores(q[:, :: sparse.block_q], means)
    if sparse.reach < T:
        attended = block_sparse_attention(
            q,
            k,
            v,
            layer_table(sparse, dense, starts, lengths, scores),
            q_positions=jnp.where(place < lengths[:, None], place, -1),
            implementation=sparse.implementation,
        )
        assert isinstance(attended, jax.Array)  # no log-sum-exp was asked for
    else:
        attended = dense_attention(q, k, v)  # padding comes after all that a query sees

    whole = dense if sparse.forgets else jnp.ones_like(dense)
    counts = pages_needed(limits, whole, sparse)
    pool, pages = take_pages(memory.pool, counts, serving.slots)
    target = prompt_pages(pages, lengths, whole, T // page_size, sparse).reshape(-1)
    # Each page that is not kept has a place of its own past the end, so that no two are the same.
    beyond = serving.pages + jnp.arange(target.shape[0], dtype=jnp.int32)
    target = jnp.where(target == NO_PAGE, beyond, target)

    def write(held: jax.Array, new: jax.Array) -> jax.Array:
        blocks = new.reshape(-1, *held.shape[1:])
        return held.at[target].set(blocks, mode="drop", unique_indices=True)

    if memory.sums is not None:
        assert sums is not None  # a memory has sums where the model searches
        memory = memory._replace(sums=write(memory.sums, sums))

    memory = memory._replace(
        keys=write(memory.keys, k),
        values=write(memory.values, v),
        pool=pool,
        tables=memory.tables.at[layer, rows].set(pages),
        whole=memory.whole.at[layer, rows].set(whole),
        searches=memory.searches.at[layer, rows].set(sparse.searched_after(dense)),
        lengths=memory.lengths.at[rows].set(lengths),
    )
    return finish_prompts(config, params, x, attended, lengths, chunk), memory


@functools.partial(jax.jit, static_argnames=("config",))
def _begin(config: DecoderConfig, params: Params, tokens: jax.Array) -> jax.Array:
    return embed_tokens(config, params, tokens)


@functools.partial(jax.jit, static_argnames=("config",))
def _end(config: DecoderConfig, params: Params, x: jax.Array, lengths: jax.Array) -> jax.Array:
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return read_out(config, params, last[:, 0])


def prefill_prompts(
    config: DecoderConfig,
    serving: ServingConfig,
    params: Params,
    decisions: Sequence[int],
    tokens: jax.Array,
    lengths: jax.Array,
    limits: jax.Array,
    rows: jax.Array,
    memory: PagedMemory,
    progress: Callable[[int], None] | None = None,
) -> tuple[jax.Array, PagedMemory]:
    """Reads prompts into the memory, layer by layer.

    Args:
      config: the model.
      serving: the sizes.
      params: the model's.
      decisions: who decides each layer: ROUTED, SPARSE or DENSE. Layers without one are left out.
      tokens: [B,T] int32, padded at the end to `serving.bucket`.
      lengths: [B] int32, valid tokens of each prompt, at least 1.
      limits: [B] int32, the most tokens that each sequence will have.
      rows: [B] int32, which sequence of the memory each becomes; none of them may be in use.
      memory: is donated.
      progress: called with the layers done so far. It waits for them, one layer late.

    Returns:
      ([B,V] logits after each prompt's last token, the memory).
    """
    x = _begin(config, {"embedding": params["embedding"]}, tokens)
    before = None
    for layer, decision in enumerate(decisions):
        x, memory = prefill_layer(
            config,
            serving,
            layer_params(params, layer),
            jnp.int32(layer),
            jnp.int32(decision),
            x,
            lengths,
            limits,
            rows,
            memory,
        )
        if progress is not None:
            jax.block_until_ready(before)
            before = jnp.copy(memory.pool.available)  # the memory itself is given away
            progress(layer)
    return _end(config, {n: p for n, p in params.items() if "layers" not in n}, x, lengths), memory


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
