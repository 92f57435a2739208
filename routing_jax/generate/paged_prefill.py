"""Prefill into paged memory: each layer reads whole prompts and decides what to keep.

A layer's router reads the queries of a prompt's last tokens, which exist once the whole prompt has
passed the layer below. So a host loop calls one compiled step a layer; which layer it is, and what
is decided there, are values, not programs. Prompts so short that sparse attention would see all of
them are not routed: they cost what they cost a model without routers. What is decided without a
router holds for them too, and for what follows.

So all is decided of short prompts before the first layer is read, and one program reads all layers:
a GPU is done with a layer of few tokens before the host could have called the next.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from routing_jax.attention.page_pool import NO_PAGE, pages_needed, prompt_pages, take_pages
from routing_jax.generate.config import ServingConfig
from routing_jax.generate.layer import (
    Params,
    embed_tokens,
    finish_prompts,
    layer_params,
    project_prompts,
    read_out,
    route_prompts,
    through_layers,
)
from routing_jax.generate.paged_memory import PagedMemory
from routing_jax.kernels import block_sparse_attention, contiguous_pages, dense_attention
from routing_jax.models import DecoderConfig
from routing_jax.routers import layer_table, search_keys, search_scores

ROUTED, SPARSE, DENSE = -1, 0, 1
"""Who decides a layer: its router, or nobody."""

_Held = tuple[jax.Array, jax.Array, jax.Array | None]
"""Keys, values and the channels that are searched, of a PagedMemory."""


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
    dense = jnp.broadcast_to(decision == DENSE, (B,))
    if "layer" in config.mixers:
        routed = route_prompts(config, params, x, lengths) | (lengths <= config.sparse.reach)
        dense = jnp.where(decision == ROUTED, routed, dense)
    memory, target = _make_room(
        config, serving, layer[None], dense[None], T, lengths, limits, rows, memory
    )
    held = memory.keys, memory.values, memory.narrow
    x, held = _read_layer(config, serving, params, dense, target[0], lengths, x, held)
    return x, _with_held(memory, held)


@functools.partial(jax.jit, static_argnames=("config", "serving"), donate_argnames=("memory",))
def prefill_short(
    config: DecoderConfig,
    serving: ServingConfig,
    params: Params,
    decisions: jax.Array,
    tokens: jax.Array,
    lengths: jax.Array,
    limits: jax.Array,
    rows: jax.Array,
    memory: PagedMemory,
) -> tuple[jax.Array, PagedMemory]:
    """`prefill_prompts` of prompts that no router reads, all layers in one program.

    Args:
      config: the model.
      serving: the sizes.
      params: the model's.
      decisions: [L] int32; ROUTED is DENSE here.
      tokens: [B,T] int32, T whole pages and at most `config.sparse.reach`.
      lengths: [B] int32, valid tokens of each prompt.
      limits: [B] int32, the most tokens that each sequence will have.
      rows: [B] int32, which sequence of the memory each becomes.
      memory: is donated.

    Returns:
      ([B,V] logits after each prompt's last token, the memory).
    """
    (B, T), layers = tokens.shape, jnp.arange(len(decisions), dtype=jnp.int32)
    dense = jnp.broadcast_to((decisions != SPARSE)[:, None], (len(decisions), B))
    # Of all layers at once: many small computations a layer would be seen beside a short prompt.
    memory, target = _make_room(config, serving, layers, dense, T, lengths, limits, rows, memory)
    target = jax.lax.optimization_barrier(target)  # or each write would work it out for itself

    def read(past: tuple[jax.Array, _Held], of_layer: tuple) -> tuple[tuple, None]:
        own, (dense, target) = of_layer
        past = _read_layer(config, serving, own, dense, target, lengths, *past)
        # Or layers' values would be written after the last one, and all be kept until then.
        return jax.lax.optimization_barrier(past), None

    past = embed_tokens(config, params, tokens), (memory.keys, memory.values, memory.narrow)
    (x, held), _ = through_layers(params, read, past, (dense, target))
    return _end(config, params, x, lengths), _with_held(memory, held)


def _make_room(
    config: DecoderConfig,
    serving: ServingConfig,
    layers: jax.Array,
    dense: jax.Array,
    length: int,
    lengths: jax.Array,
    limits: jax.Array,
    rows: jax.Array,
    memory: PagedMemory,
) -> tuple[PagedMemory, jax.Array]:
    """Takes the pages of prompts padded to `length` in layers [n], `dense` [n,B] of which are.

    Returns (the memory, [n,B·J] int32: the page of each block, each layer's without a double; of
    blocks that are not kept it is past the pool's end).
    """
    sparse, (n, B) = config.sparse, dense.shape
    whole = dense if sparse.forgets else jnp.ones_like(dense)
    counts = pages_needed(limits[None], whole, sparse).reshape(-1)
    pool, pages = take_pages(memory.pool, counts, serving.slots)
    target = prompt_pages(
        pages, jnp.tile(lengths, n), whole.reshape(-1), length // serving.page_size, sparse
    ).reshape(n, -1)
    # Each page that is not kept has a place of its own past the end, so that no two are the same.
    beyond = serving.pages + jnp.arange(target.shape[1], dtype=jnp.int32)
    at = layers[:, None], rows[None]
    memory = memory._replace(
        pool=pool,
        tables=memory.tables.at[at].set(pages.reshape(n, B, -1)),
        whole=memory.whole.at[at].set(whole),
        searches=memory.searches.at[at].set(sparse.searched_after(dense)),
        lengths=memory.lengths.at[rows].set(lengths),
    )
    return memory, jnp.where(target == NO_PAGE, beyond[None], target)


@functools.partial(jax.jit, static_argnames=("config", "serving"))  # lowered once for all layers
def _read_layer(
    config: DecoderConfig,
    serving: ServingConfig,
    params: Params,
    dense: jax.Array,
    target: jax.Array,
    lengths: jax.Array,
    x: jax.Array,
    held: _Held,
) -> tuple[jax.Array, _Held]:
    """A layer's output, and the pages with its keys and values written where `target` says."""
    B, T, _ = x.shape
    page_size, sparse = serving.page_size, config.sparse
    chunk = serving.chunk_of(B, T)
    q, k, v = project_prompts(config, params, x, lengths, chunk)

    place = jnp.arange(T, dtype=jnp.int32)[None]
    starts = jnp.arange(0, T, sparse.block_q, dtype=jnp.int32)[None]
    narrow = scores = None
    if sparse.searches:
        narrow, pages = search_keys(sparse, k), contiguous_pages(B, T // page_size)
        places = jnp.where(sparse.searched(dense)[:, None], starts, -1)
        scores = search_scores(sparse, q[:, :: sparse.block_q], narrow, pages, places)
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

    def write(held: jax.Array, new: jax.Array) -> jax.Array:
        blocks = new.reshape(-1, *held.shape[1:])
        return held.at[target].set(blocks, mode="drop", unique_indices=True)

    keys, values, held_narrow = held
    if held_narrow is not None:
        assert narrow is not None  # a memory has such channels where the model searches
        held_narrow = write(held_narrow, narrow)
    held = write(keys, k), write(values, v), held_narrow
    return finish_prompts(config, params, x, attended, lengths, chunk), held


def _with_held(memory: PagedMemory, held: _Held) -> PagedMemory:
    keys, values, narrow = held
    return memory._replace(keys=keys, values=values, narrow=narrow)


@functools.partial(jax.jit, static_argnames=("config",))
def _begin(config: DecoderConfig, params: Params, tokens: jax.Array) -> jax.Array:
    return embed_tokens(config, params, tokens)


@functools.partial(jax.jit, static_argnames=("config",))
def _end(config: DecoderConfig, params: Params, x: jax.Array, lengths: jax.Array) -> jax.Array:
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return read_out(config, params, last[:, 0])


def reads_at_once(config: DecoderConfig, length: int) -> bool:
    """Whether prompts padded to so many tokens are read by one program over all layers.

    >>> from routing_jax.routers import SparseModeConfig
    >>> config = DecoderConfig(sparse=SparseModeConfig(sink=128, window=1024))
    >>> reads_at_once(config, 1024), reads_at_once(config, 2048)
    (True, False)
    """
    return length <= config.sparse.reach


def prefill_prompts(
    config: DecoderConfig,
    serving: ServingConfig,
    params: Params,
    decisions: Sequence[int] | jax.Array,
    tokens: jax.Array,
    lengths: jax.Array,
    limits: jax.Array,
    rows: jax.Array,
    memory: PagedMemory,
    progress: Callable[[int], None] | None = None,
) -> tuple[jax.Array, PagedMemory]:
    """Reads prompts into the memory: layer by layer, or all layers at once where none is routed.

    Args:
      config: the model.
      serving: the sizes.
      params: the model's.
      decisions: [L], who decides each layer: ROUTED, SPARSE or DENSE. Layers without one are left
        out.
      tokens: [B,T] int32, padded at the end to `serving.bucket`. Where T is at most
        `config.sparse.reach`, no layer is routed.
      lengths: [B] int32, valid tokens of each prompt, at least 1.
      limits: [B] int32, the most tokens that each sequence will have.
      rows: [B] int32, which sequence of the memory each becomes; none of them may be in use.
      memory: is donated.
      progress: called with the layers done so far. It waits for them, one layer late. Not called
        where layers are read at once.

    Returns:
      ([B,V] logits after each prompt's last token, the memory).
    """
    decided = jnp.asarray(decisions, jnp.int32)
    if reads_at_once(config, tokens.shape[1]):
        return prefill_short(
            config, serving, params, decided, tokens, lengths, limits, rows, memory
        )
    x = _begin(config, {"embedding": params["embedding"]}, tokens)
    before = None
    # Numbers cut out on the device; made by the host, each would be a transfer of its own.
    numbers = zip(jnp.arange(len(decisions), dtype=jnp.int32), decided)
    for done, (layer, decision) in enumerate(numbers):
        x, memory = prefill_layer(
            config,
            serving,
            layer_params(params, done),
            layer,
            decision,
            x,
            lengths,
            limits,
            rows,
            memory,
        )
        if progress is not None:
            jax.block_until_ready(before)
            before = jnp.copy(memory.pool.available)  # the memory itself is given away
            progress(done)
    return _end(config, {n: p for n, p in params.items() if "layers" not in n}, x, lengths), memory
