"""What the serving benchmark runs: a model of random weights, in pages or as it was published."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from routing_jax.attention.page_pool import NO_PAGE, pages_needed, take_pages
from routing_jax.evals.benchmarks.serve_path_config import ServePathConfig, Who, dense_layers
from routing_jax.generate.config import ServingConfig
from routing_jax.generate.layer import (
    Params,
    embed_tokens,
    finish,
    finish_prompts,
    layer_params,
    project,
    project_prompts,
    read_out,
)
from routing_jax.generate.paged_memory import PagedMemory, empty_memory
from routing_jax.generate.paged_prefill import DENSE, SPARSE, reads_at_once
from routing_jax.kernels import default_implementation, dense_attention
from routing_jax.models import DecoderConfig, init_params


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(key: jax.Array, scale: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return (jax.random.normal(key, shape, dtype) * scale).astype(dtype)


def _random(shapes: Any, seed: int, compute: str) -> Any:
    """Arrays of those shapes, of a size that keeps activations near 1; norms are 1."""

    def fill(number: int, path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name, dtype = path[-1].key, "float32" if "router" in jax.tree_util.keystr(path) else compute
        if name in ("scale", "query_norm", "key_norm"):
            return jnp.ones(leaf.shape, dtype)
        fan_in = leaf.size // leaf.shape[-1] if name == "out" else leaf.shape[0]
        scale = jnp.asarray(1.0 if name == "embedding" else fan_in**-0.5, dtype)
        return _normal(jax.random.fold_in(jax.random.key(seed), number), scale, leaf.shape, dtype)

    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    return jax.tree.unflatten(tree, [fill(i, *leaf) for i, leaf in enumerate(leaves)])


def random_model(config: ServePathConfig) -> Params:
    """Weights of the model in its compute dtype, those of its routers in float32."""
    shapes = jax.eval_shape(lambda: init_params(config.model_of("routed"), jax.random.key(0)))
    return _random(shapes, config.seed, config.decoder.dtype)


def _depth(model: DecoderConfig) -> int:
    return len(model.mixers)


class Size(NamedTuple):
    """How much is served.

    Attributes:
      batch: sequences.
      length: tokens of each.
      sparse_share: of the layers; 0 for all dense.
    """

    batch: int
    length: int
    sparse_share: float


def decisions(config: ServePathConfig, size: Size) -> list[int]:
    """What is decided for each layer, whatever its router says."""
    pattern = dense_layers(_depth(config.decoder), size.sparse_share)
    return [DENSE if dense else SPARSE for dense in pattern]


def serving(config: ServePathConfig, size: Size) -> ServingConfig:
    """Paged memory with just the pages that these sequences hold."""
    limit = size.length + _made(config)
    whole = _whole(config, size)
    pages = int(pages_needed(jnp.full(whole.shape, limit), whole, config.decoder.sparse).sum())
    return ServingConfig(
        pages=pages * size.batch,
        sequences=size.batch,
        length=limit,
        page_size=config.block,
        chunk=config.chunk,
        decoding=config.attention,
    )


def _whole(config: ServePathConfig, size: Size) -> jax.Array:
    """[L] bool, which layers keep everything."""
    dense = jnp.array([decision == DENSE for decision in decisions(config, size)])
    return dense if config.decoder.sparse.forgets else jnp.ones_like(dense)


def _made(config: ServePathConfig) -> int:
    """Tokens that all samples of decoding make, the one that warms up too."""
    return config.steps * (config.repeats + 1)


def kv_bytes(config: ServePathConfig, size: Size, who: Who) -> int:
    """Bytes of keys and values, and of what pages are found by, before any is made."""
    model = config.model_of(who)
    vector = model.num_kv_heads * model.head_dim
    token = 2 * vector * jnp.dtype(model.dtype).itemsize
    if who == "dense":
        return size.batch * (size.length + _made(config)) * _depth(model) * token
    sizes = serving(config, size)
    return sizes.pages * (sizes.page_size * token + searched_bytes(model))


def searched_bytes(model: DecoderConfig) -> int:
    """Bytes that a page is found by, some channels of its keys."""
    if model.sparse.answers != "topk":
        return 0
    key = model.num_kv_heads * model.sparse.channels_of(model.head_dim)
    return model.sparse.block_kv * key * jnp.dtype(model.dtype).itemsize


def filled_memory(config: ServePathConfig, size: Size, who: Who) -> PagedMemory:
    """Memory as a prefill leaves it, of random keys and values: a page repeated."""
    sizes, model = serving(config, size), config.model_of(who)
    memory = empty_memory(model, sizes)
    limits = jnp.full(size.batch, sizes.length, jnp.int32)
    pool, tables = memory.pool, []
    wholes = jnp.broadcast_to(_whole(config, size)[:, None], memory.whole.shape)
    for whole in wholes:
        pool, pages = take_pages(pool, pages_needed(limits, whole, model.sparse), sizes.slots)
        tables.append(pages)
    dense = jnp.array([decision == DENSE for decision in decisions(config, size)])
    searches = jnp.broadcast_to(model.sparse.searched_after(dense)[:, None], wholes.shape)
    key = jax.random.key(config.seed)
    page = jax.random.normal(key, memory.keys.shape[1:], memory.keys.dtype)
    # In place: there may be no room for a pool twice.
    fill = jax.jit(lambda held: held + page[None], donate_argnums=0)
    scatter = jax.jit(
        lambda held: held + jax.random.normal(key, held.shape, held.dtype), donate_argnums=0
    )
    narrow = memory.narrow
    if narrow is not None:  # of their own, so that pages all over the pool are found
        narrow = scatter(narrow)
    return PagedMemory(
        fill(memory.keys),
        fill(memory.values),
        pool,
        jnp.stack(tables),
        wholes,
        searches,
        jnp.full(size.batch, size.length, jnp.int32),
        narrow,
    )


def held_bytes(memory: PagedMemory) -> int:
    """Bytes of the pages that the tables list, and of what they are found by."""
    arrays = jax.tree.leaves((memory.keys, memory.values, memory.narrow))
    page = sum(array.nbytes // array.shape[0] for array in arrays)
    return page * int((memory.tables != NO_PAGE).sum())


@functools.partial(jax.jit, static_argnames=("config", "chunk"), donate_argnames=("x",))
def _dense_layer(
    config: DecoderConfig, chunk: int, params: Params, x: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v = project_prompts(config, params, x, lengths, chunk)
    attended = dense_attention(q, k, v)
    return finish_prompts(config, params, x, attended, lengths, chunk), k, v


_embed = jax.jit(embed_tokens, static_argnums=0)
_read_out = jax.jit(read_out, static_argnums=0)
_Read = tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]


def dense_prefill(
    config: DecoderConfig, params: Params, tokens: jax.Array, chunk: int, layers: int
) -> _Read:
    """The model as it was published: prompts of one length, every layer dense.

    One program a layer, or for prompts that paged memory reads so (`reads_at_once`) one in all.

    Args:
      config: the model.
      params: its parameters.
      tokens: [B,T] int32; `chunk` divides T.
      chunk: tokens that pass a projection or an MLP together.
      layers: how many there are, or the first few to warm up.

    Returns:
      ([B,V] logits, keys and values [B,T,K,H] of each layer).
    """
    read = _dense_at_once if reads_at_once(config, tokens.shape[1]) else _dense_layers
    return read(config, params, tokens, chunk, layers)


def _dense_layers(
    config: DecoderConfig, params: Params, tokens: jax.Array, chunk: int, layers: int
) -> _Read:
    lengths = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
    whole = {name: part for name, part in params.items() if "layers" not in name}
    x = _embed(config, whole, tokens)
    cache = []
    for layer in range(layers):
        x, k, v = _dense_layer(config, chunk, layer_params(params, layer), x, lengths)
        cache.append((k, v))
    return _read_out(config, whole, x[:, -1]), cache


_dense_at_once = jax.jit(_dense_layers, static_argnames=("config", "chunk", "layers"))


class DenseCache(NamedTuple):
    """Contiguous keys and values.

    Attributes:
      layers: keys and values [B,S,K,H] of each layer.
      lengths: [B] int32.
    """

    layers: Sequence[tuple[jax.Array, jax.Array]]
    lengths: jax.Array


def filled_cache(config: ServePathConfig, size: Size) -> DenseCache:
    """A cache as a prefill leaves it, of random keys and values."""
    model = config.decoder
    shape = (model.num_kv_heads, model.head_dim)
    token = jax.random.normal(jax.random.key(config.seed), shape, model.dtype)
    whole = (size.batch, size.length + _made(config), *shape)
    make = jax.jit(
        lambda: jnp.broadcast_to(token[None, None], whole) + jnp.zeros(whole, model.dtype)
    )
    layers = [(make(), make()) for _ in range(_depth(model))]
    return DenseCache(layers, jnp.full(size.batch, size.length, jnp.int32))


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def dense_decode(
    config: DecoderConfig, params: Params, tokens: jax.Array, cache: DenseCache
) -> tuple[jax.Array, DenseCache]:
    """One greedy token a sequence from a contiguous cache, by the backend's own attention.

    Args:
      config: the model.
      params: its parameters.
      tokens: [B] int32.
      cache: is donated.

    Returns:
      ([B] int32, the cache).
    """
    implementation = default_implementation(jnp.dtype(config.dtype))
    rows, lengths = jnp.arange(tokens.shape[0]), cache.lengths + 1
    x = embed_tokens(config, params, tokens[:, None])
    layers = []
    for layer, (keys, values) in enumerate(cache.layers):
        own = layer_params(params, layer)
        q, k, v = project(config, own, x, cache.lengths[:, None])
        keys = keys.at[rows, cache.lengths].set(k[:, 0], mode="drop")
        values = values.at[rows, cache.lengths].set(v[:, 0], mode="drop")
        attended = jax.nn.dot_product_attention(
            q, keys, values, key_value_seq_lengths=lengths, implementation=implementation
        )
        x = finish(config, own, x, attended)
        layers.append((keys, values))
    best = jnp.argmax(read_out(config, params, x[:, 0]), axis=-1).astype(jnp.int32)
    return best, DenseCache(layers, lengths)
