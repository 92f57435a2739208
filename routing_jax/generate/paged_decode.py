"""Decoding from paged memory: one compiled step for all layers and whatever they decided.

Tokens are chosen by a program of their own, so that another way of choosing them compiles no layer.

Scanned layers (config.scan) compile once for all. Unrolled ones take longer to compile, but each
layer's weights are arrays of their own: cut out of stacked ones, they are copied wherever a product
can't read them in place, and decoding is bound by the bytes of weights, keys and values.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from routing_jax.attention.page_pool import NO_PAGE, held_pages, slot_of_block
from routing_jax.attention.page_search import near_pages, search_pages
from routing_jax.generate.config import ServingConfig
from routing_jax.generate.layer import (
    Params,
    embed_tokens,
    finish,
    project,
    read_out,
    through_layers,
)
from routing_jax.generate.paged_memory import PagedMemory
from routing_jax.generate.sampling import Sampling, choose_tokens
from routing_jax.kernels import PageList, block_sparse_decode, dense_pages, where_pages
from routing_jax.models import DecoderConfig
from routing_jax.routers import slow_channels


@functools.partial(jax.jit, static_argnames=("config", "serving"), donate_argnames=("memory",))
def read_tokens(
    config: DecoderConfig,
    serving: ServingConfig,
    params: Params,
    tokens: jax.Array,
    memory: PagedMemory,
) -> tuple[jax.Array, PagedMemory]:
    """Reads one token of each sequence: its keys and values join the memory. Compiled once.

    Args:
      config: the model.
      serving: the sizes.
      params: the model's.
      tokens: [B] int32; ignored where the memory holds no sequence.
      memory: what came before; is donated.

    Returns:
      ([B,V] logits, the memory).
    """
    sparse = config.sparse
    positions, used = memory.lengths, memory.lengths > 0
    lengths = jnp.where(used, positions + 1, 0)
    # Of all layers at once: many small computations a layer would take as long as the layer.
    slots = slot_of_block((positions // sparse.block_kv)[None], memory.whole, sparse)
    target = jnp.take_along_axis(memory.tables, slots[:, :, None], axis=2)[:, :, 0]
    target = jnp.where(used[None] & (target != NO_PAGE), target, serving.pages)
    find = held_pages if memory.narrow is None else near_pages
    lists = jax.vmap(lambda table, whole: find(table, lengths, whole, sparse))(
        memory.tables, memory.whole
    )
    every = _Pages(target, lists, memory.tables, memory.whole, memory.searches)

    def read(held: tuple, of_layer: tuple) -> tuple[tuple, jax.Array | None]:
        own, pages = of_layer
        return _read_layer(config, serving, own, lengths, pages, memory.narrow, *held)

    held = embed_tokens(config, params, tokens[:, None]), memory.keys, memory.values
    (x, keys, values), added = through_layers(params, read, held, every)
    narrow = memory.narrow
    if narrow is not None:
        # Once for all layers, as no search reads the newest page. All of them must have been made,
        # or the channels would be copied for those that might come later.
        x, added = jax.lax.optimization_barrier((x, added))
        offset = jnp.broadcast_to(positions % serving.page_size, target.shape)
        narrow = narrow.at[target, :, offset].set(added, mode="drop")
    logits = read_out(config, params, x[:, 0])
    return logits, memory._replace(keys=keys, values=values, narrow=narrow, lengths=lengths)


class _Pages(NamedTuple):
    """What a layer holds of each sequence; with L in front, of all layers.

    Attributes:
      target: [B] int32, the page of the newest token; P where there is none.
      lists: what it attends to in any case: all that is held, or sink and window.
      table: [B,C] int32.
      whole: [B] bool.
      searches: [B] bool.
    """

    target: jax.Array
    lists: PageList
    table: jax.Array
    whole: jax.Array
    searches: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "serving"))  # lowered once for all layers
def _read_layer(
    config: DecoderConfig,
    serving: ServingConfig,
    params: Params,
    lengths: jax.Array,
    held: _Pages,
    narrow: jax.Array | None,
    x: jax.Array,
    keys: jax.Array,
    values: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array | None]:
    target, pages, table, whole, searches = held
    positions = jnp.maximum(lengths - 1, 0)
    offset = positions % serving.page_size
    q, k, v = project(config, params, x, positions[:, None])
    keys = keys.at[target, offset].set(k[:, 0], mode="drop")
    values = values.at[target, offset].set(v[:, 0], mode="drop")
    added = None
    if narrow is not None:
        added = slow_channels(k[:, 0], narrow.shape[-1])
        pages = search_pages(pages, table, q[:, 0], narrow, lengths, searches, config.sparse)
        if config.sparse.rereads:
            everything = dense_pages(table, lengths, serving.page_size)
            pages = where_pages(whole & ~searches, everything, pages)
    attended = block_sparse_decode(q, keys, values, pages, lengths, implementation=serving.decoding)
    assert isinstance(attended, jax.Array)  # no log-sum-exp was asked for
    return (finish(config, params, x, attended), keys, values), added


def decode_tokens(
    config: DecoderConfig,
    serving: ServingConfig,
    params: Params,
    tokens: jax.Array,
    sampling: Sampling | None,
    memory: PagedMemory,
) -> tuple[jax.Array, PagedMemory]:
    """`read_tokens`, then the next token of each sequence.

    Args:
      config: the model.
      serving: the sizes.
      params: the model's.
      tokens: [B] int32, the newest token of each sequence.
      sampling: how the next ones are chosen; None takes the most likely.
      memory: is donated.

    Returns:
      ([B] int32, the memory).
    """
    logits, memory = read_tokens(config, serving, params, tokens, memory)
    return choose_tokens(logits, sampling, memory.lengths), memory
