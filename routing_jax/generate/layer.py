"""A decoder layer in parts, as functions of its parameters: what stands before and after attention.

Long prompts pass in chunks: queries, keys and values are held whole, the MLP's hidden units never
are. Chunks that no prompt reaches are not computed.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from routing_jax.attention.projections import (
    AttentionWeights,
    project_keys_values,
    project_out,
    project_queries,
)
from routing_jax.models import DecoderConfig
from routing_jax.models.decoder import SwiGLU, make_norm
from routing_jax.models.embedding import embed
from routing_jax.models.gpt import GeluMLP
from routing_jax.routers import LayerRouter, end_tokens, pool_queries

Params = Mapping[str, Any]
QKV = tuple[jax.Array, jax.Array, jax.Array]


def layer_params(params: Params, layer: int) -> Params:
    """One layer's parameters of a model whose layers are all alike; of stacked ones a copy.

    >>> layer_params({"layers_0": {"block_0": {"mlp": 1}}}, 0)
    {'mlp': 1}
    >>> layer_params({"layers": {"block_0": {"mlp": jnp.arange(3)}}}, 2)["mlp"].tolist()
    2
    """
    if "layers" in params:
        return _cut(params["layers"]["block_0"], jnp.int32(layer))
    return params[f"layers_{layer}"]["block_0"]


@jax.jit
def _cut(stacked: Params, layer: jax.Array) -> Params:
    return jax.tree.map(lambda p: p[layer], stacked)


def through_layers(
    params: Params, step: Callable[[Any, tuple], tuple[Any, Any]], held: Any, of_layers: Any
) -> tuple[Any, Any]:
    """`jax.lax.scan` of a step over layers, in one program that copies no weights it could read.

    Stacked parameters are scanned. Of others, each layer is a part of the program; a step that is
    jitted is lowered once for all of them.

    Args:
      params: the model's.
      step: (held, (a layer's parameters, its part of `of_layers`)) -> (held, output).
      held: what the first layer is given.
      of_layers: arrays [L,…]; L may be less than there are layers, to leave out the last.

    Returns:
      (what the last layer leaves, outputs [L,…]).

    >>> params = {f"layers_{i}": {"block_0": jnp.float32(i)} for i in range(3)}
    >>> add = lambda held, own: (held + own[0] * own[1], own[1])
    >>> through_layers(params, add, jnp.float32(1), jnp.array([5.0, 6.0]))[0].tolist()
    7.0
    """
    depth = len(jax.tree.leaves(of_layers)[0])
    if "layers" in params:
        stacked = jax.tree.map(lambda p: p[:depth], params["layers"]["block_0"])
        return jax.lax.scan(step, held, (stacked, of_layers))
    outputs = []
    for layer in range(depth):
        part = jax.tree.map(operator.itemgetter(layer), of_layers)
        held, output = step(held, (layer_params(params, layer), part))
        outputs.append(output)
    return held, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)


def _weights(config: DecoderConfig, params: Params) -> AttentionWeights:
    dtype = jnp.dtype(config.dtype)
    given = {name: w for name, w in params["mixer"].items() if name != "router"}
    kept = ("query_norm", "key_norm")
    return AttentionWeights(**{n: w if n in kept else w.astype(dtype) for n, w in given.items()})


def normalise(config: DecoderConfig, params: Params, name: str, x: jax.Array) -> jax.Array:
    """The norm of that name.

    >>> config = DecoderConfig(width=2)
    >>> params = {"norm": {"scale": jnp.ones(2)}}
    >>> normalise(config, params, "norm", 3 * jnp.ones(2)).round(3).tolist()
    [1.0, 1.0]
    """
    out = make_norm(config, name).apply({"params": params[name]}, x)
    assert isinstance(out, jax.Array)
    return out


def embed_tokens(config: DecoderConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """Tokens [B,T] to [B,T,D] in the compute dtype.

    >>> config = DecoderConfig(dtype="float32")
    >>> embed_tokens(config, {"embedding": jnp.eye(2)}, jnp.array([[1]])).tolist()
    [[[0.0, 1.0]]]
    """
    return embed(params["embedding"].astype(config.dtype), tokens)


def read_out(config: DecoderConfig, params: Params, x: jax.Array) -> jax.Array:
    """The last layer's output [B,D] to logits [B,V] float32.

    >>> config = DecoderConfig(width=2, tie_embeddings=True, norm_eps=0.0, dtype="float32")
    >>> params = {"embedding": jnp.eye(2), "final_norm": {"scale": jnp.ones(2)}}
    >>> read_out(config, params, jnp.array([[1.0, -1.0]])).tolist()
    [[1.0, -1.0]]
    """
    head = params["embedding"].T if config.tie_embeddings else params["head"]
    x = normalise(config, params, "final_norm", x)
    return jnp.einsum("BD,DV->BV", x, head.astype(config.dtype), preferred_element_type=jnp.float32)


def project(config: DecoderConfig, params: Params, x: jax.Array, positions: jax.Array) -> QKV:
    """Queries [B,T,N,H], keys and values [B,T,K,H] of a layer's input x [B,T,D].

    Args:
      config: the model.
      params: the layer's.
      x: [B,T,D].
      positions: [B,T] int32.
    """
    weights, heads = _weights(config, params), config.heads
    h = normalise(config, params, "mixer_norm", x)
    if h.shape[:2] != (1, 1):
        q = project_queries(h, positions, weights, heads)
        return q, *project_keys_values(h, positions, weights, heads)
    # For one row XLA on GPUs writes out each product with the keys' and values' weights and sums
    # them up in other kernels; for two it reads both weights in one matrix product.
    h, positions = (jnp.pad(a, [(0, 1)] + [(0, 0)] * (a.ndim - 1)) for a in (h, positions))
    q = project_queries(h, positions, weights, heads)
    k, v = project_keys_values(h, positions, weights, heads)
    return q[:1], k[:1], v[:1]


def finish(config: DecoderConfig, params: Params, x: jax.Array, attended: jax.Array) -> jax.Array:
    """What a layer adds to x [B,T,D], given its attention's output [B,T,N,H]: the layer's output.

    Args:
      config: the model.
      params: the layer's.
      x: [B,T,D], the layer's input.
      attended: [B,T,N,H].
    """
    x = x + project_out(attended, _weights(config, params))
    if not config.mlp_width:
        return x
    mlp = (SwiGLU if config.mlp == "swiglu" else GeluMLP)(config.mlp_width)
    added = mlp.apply({"params": params["mlp"]}, normalise(config, params, "mlp_norm", x))
    assert isinstance(added, jax.Array)
    return x + added


def project_prompts(
    config: DecoderConfig, params: Params, x: jax.Array, lengths: jax.Array, chunk: int
) -> QKV:
    """`project` of whole prompts, a chunk at a time; 0 in chunks that no prompt reaches.

    Args:
      config: the model.
      params: the layer's.
      x: [B,T,D]; `chunk` divides T.
      lengths: [B] int32, valid tokens of each prompt.
      chunk: tokens of each prompt at a time.
    """
    B, T, _ = x.shape
    dtype = jnp.dtype(config.dtype)
    sizes = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    empty = tuple(jnp.zeros((B, T, heads, config.head_dim), dtype) for heads in sizes)

    def step(i: jax.Array, held: tuple) -> tuple:
        place = jnp.arange(chunk, dtype=jnp.int32)[None] + i * chunk
        part = jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)
        new = project(config, params, part, jnp.broadcast_to(place, (B, chunk)))
        return tuple(_put(old, piece, i * chunk) for old, piece in zip(held, new))

    return jax.lax.fori_loop(0, _chunks(lengths, T, chunk), step, empty)


def finish_prompts(
    config: DecoderConfig,
    params: Params,
    x: jax.Array,
    attended: jax.Array,
    lengths: jax.Array,
    chunk: int,
) -> jax.Array:
    """`finish` of whole prompts, a chunk at a time; x stays in chunks that no prompt reaches.

    Args:
      config: the model.
      params: the layer's.
      x: [B,T,D]; `chunk` divides T.
      attended: [B,T,N,H].
      lengths: [B] int32, valid tokens of each prompt.
      chunk: tokens of each prompt at a time.
    """

    def step(i: jax.Array, x: jax.Array) -> jax.Array:
        part, seen = (
            jax.lax.dynamic_slice_in_dim(a, i * chunk, chunk, axis=1) for a in (x, attended)
        )
        return _put(x, finish(config, params, part, seen), i * chunk)

    return jax.lax.fori_loop(0, _chunks(lengths, x.shape[1], chunk), step, x)


def _chunks(lengths: jax.Array, length: int, chunk: int) -> jax.Array | int:
    # A single chunk is no loop; a GPU's host waits for the device to learn how often others run.
    return 1 if chunk == length else -(-jnp.max(lengths) // chunk)


def _put(whole: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=1)


def _mean_query(weights: AttentionWeights) -> AttentionWeights:
    """Weights of one query head, the mean of all, float32."""
    means = {
        name: jnp.mean(part, axis=-2, keepdims=True, dtype=jnp.float32)
        for name, part in weights._asdict().items()
        if name in ("query", "query_bias") and part is not None
    }
    return weights._replace(**means)


def route_prompts(
    config: DecoderConfig, params: Params, x: jax.Array, lengths: jax.Array
) -> jax.Array:
    """Which prompts this layer attends to in full, by the queries of their ends before RoPE.

    Args:
      config: the model, of 'layer' layers.
      params: the layer's.
      x: [B,T,D], the layer's input.
      lengths: [B] int32, valid tokens of each prompt.

    Returns:
      [B] bool.
    """
    ends, counts = end_tokens(x, lengths, config.layer_router.pool)
    h, weights = normalise(config, params, "mixer_norm", ends), _weights(config, params)
    if not config.qk_norm:
        # Queries without a norm are linear in h: one row and one head stand for all. Their means
        # stay float32: they differ little from prompt to prompt, and routers magnify that. For all
        # heads, weights would have to be as wide, three times the bytes.
        h = pool_queries(h[:, :, None], counts, config.layer_router.pool)[:, None]
        counts = jnp.minimum(counts, 1)
        weights = _mean_query(weights)
    router = LayerRouter(config.layer_router)
    # Rounded products, as accelerators make them of several prompts, could decide otherwise than
    # those of one.
    with jax.default_matmul_precision("highest"):
        queries = project_queries(h, None, weights, config.heads)
        found: Any = router.apply({"params": params["mixer"]["router"]}, queries, counts)
    return found.routing.choice
