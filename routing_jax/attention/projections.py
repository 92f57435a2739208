"""Query, key, value and output projections, shared by every mixer that attends."""

from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from routing_jax.attention.norm import rms_norm
from routing_jax.kernels import AttentionImplementation, apply_rope, dense_attention


@dataclass(frozen=True)
class HeadsConfig:
    """The heads of an attention layer: MHA when N = K, MQA when K = 1, GQA between.

    Attributes:
      num_heads: N, query heads.
      num_kv_heads: K, key/value heads; divides N.
      head_dim: H.
      rope_theta: base of the rotary embedding; 0 for no positions.
      implementation: 'cudnn', 'xla', or None for the best one here.
      rope_factors: H/2 divisors of the rotary frequencies, for long contexts; empty for none.
      qkv_bias: add a bias to queries, keys and values, as Qwen2 does.
      qk_norm: RMS-normalise queries and keys head by head before they turn, as Qwen3 does.
      norm_eps: of that normalisation.
      dropout: of the attention weights, in training.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    implementation: AttentionImplementation | None = None
    rope_factors: tuple[float, ...] = ()
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-6
    dropout: float = 0.0


class AttentionWeights(NamedTuple):
    """The projections; a field that the heads do without is None.

    Attributes:
      query: [D,N,H].
      key: [D,K,H].
      value: [D,K,H].
      out: [N,H,D].
      query_bias: [N,H].
      key_bias: [K,H].
      value_bias: [K,H].
      query_norm: [H], scale of the queries' RMSNorm.
      key_norm: [H].
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    out: jax.Array
    query_bias: jax.Array | None = None
    key_bias: jax.Array | None = None
    value_bias: jax.Array | None = None
    query_norm: jax.Array | None = None
    key_norm: jax.Array | None = None


def make_attention_weights(
    module: nn.Module, heads: HeadsConfig, width: int, dtype: jnp.dtype
) -> AttentionWeights:
    """Declares the projections as float32 parameters of `module`, cast to the compute dtype.

    Args:
      module: the Linen module in whose compact method this is called.
      heads: head counts and sizes.
      width: D.
      dtype: compute dtype.

    >>> class Layer(nn.Module):
    ...     @nn.compact
    ...     def __call__(self):
    ...         return make_attention_weights(self, HeadsConfig(4, 2, 8), 16, jnp.bfloat16)
    >>> weights, _ = Layer().init_with_output(jax.random.key(0))
    >>> weights.query.shape, weights.key.shape, weights.out.shape
    ((16, 4, 8), (16, 2, 8), (4, 8, 16))
    """
    N, K, H = heads.num_heads, heads.num_kv_heads, heads.head_dim
    into = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=(1, 2))
    back = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=(0, 1), out_axis=2)
    weights = AttentionWeights(
        query=module.param("query", into, (width, N, H)).astype(dtype),
        key=module.param("key", into, (width, K, H)).astype(dtype),
        value=module.param("value", into, (width, K, H)).astype(dtype),
        out=module.param("out", back, (N, H, width)).astype(dtype),
    )
    if heads.qkv_bias:
        zeros = nn.initializers.zeros
        weights = weights._replace(
            query_bias=module.param("query_bias", zeros, (N, H)).astype(dtype),
            key_bias=module.param("key_bias", zeros, (K, H)).astype(dtype),
            value_bias=module.param("value_bias", zeros, (K, H)).astype(dtype),
        )
    if heads.qk_norm:
        ones = nn.initializers.ones
        weights = weights._replace(
            query_norm=module.param("query_norm", ones, (H,)),
            key_norm=module.param("key_norm", ones, (H,)),
        )
    return weights


def _project(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None, scale: jax.Array | None, eps: float
) -> jax.Array:
    y = jnp.einsum("BTD,DNH->BTNH", x, weight)
    if bias is not None:
        y += bias[None, None]
    return y if scale is None else rms_norm(y, scale, eps)


def turn(x: jax.Array, positions: jax.Array | None, heads: HeadsConfig) -> jax.Array:
    """Queries or keys [B,T,N,H] turned to their positions [B,T]; as they are where None.

    >>> one = jnp.ones((1, 1, 1, 2))
    >>> turn(one, jnp.array([[0]]), HeadsConfig(1, 1, 2)).ravel().tolist()
    [1.0, 1.0]
    """
    if not heads.rope_theta or positions is None:
        return x
    return apply_rope(x, positions, heads.rope_theta, heads.rope_factors)


def project_queries(
    x: jax.Array, positions: jax.Array | None, weights: AttentionWeights, heads: HeadsConfig
) -> jax.Array:
    """Queries [B,T,N,H] of x [B,T,D], turned to their positions [B,T]; not turned where None.

    >>> into = jnp.ones((4, 1, 2))
    >>> weights = AttentionWeights(into, into, into, into.transpose(1, 2, 0))
    >>> heads = HeadsConfig(num_heads=1, num_kv_heads=1, head_dim=2, rope_theta=0)
    >>> project_queries(jnp.ones((1, 1, 4)), jnp.array([[0]]), weights, heads).tolist()
    [[[[4.0, 4.0]]]]
    """
    q = _project(x, weights.query, weights.query_bias, weights.query_norm, heads.norm_eps)
    return turn(q, positions, heads)


def project_keys_values(
    x: jax.Array, positions: jax.Array, weights: AttentionWeights, heads: HeadsConfig
) -> tuple[jax.Array, jax.Array]:
    """Keys and values [B,T,K,H] of x [B,T,D], keys turned to their positions [B,T].

    >>> into = jnp.ones((4, 1, 2))
    >>> weights = AttentionWeights(into, into, 2 * into, into.transpose(1, 2, 0))
    >>> heads = HeadsConfig(num_heads=1, num_kv_heads=1, head_dim=2, rope_theta=0)
    >>> k, v = project_keys_values(jnp.ones((1, 1, 4)), jnp.array([[0]]), weights, heads)
    >>> k.ravel().tolist(), v.ravel().tolist()
    ([4.0, 4.0], [8.0, 8.0])
    """
    k = _project(x, weights.key, weights.key_bias, weights.key_norm, heads.norm_eps)
    v = _project(x, weights.value, weights.value_bias, None, heads.norm_eps)
    return turn(k, positions, heads), v


def project_out(y: jax.Array, weights: AttentionWeights) -> jax.Array:
    """Head outputs [B,T,N,H] to the model's width [B,T,D].

    >>> into = jnp.ones((4, 1, 2))
    >>> weights = AttentionWeights(into, into, into, into.transpose(1, 2, 0))
    >>> project_out(jnp.ones((1, 1, 1, 2)), weights).ravel().tolist()
    [2.0, 2.0, 2.0, 2.0]
    """
    return jnp.einsum("BTNH,NHD->BTD", y, weights.out)


def attend_everywhere(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    heads: HeadsConfig,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Dense causal attention as the heads are configured; with a layer's key, its dropout too.

    Args:
      q: [B,T,N,H].
      k: [B,T,K,H].
      v: [B,T,K,H].
      segment_ids: [B,T] int32 or None.
      heads: implementation and dropout.
      rng: the layer's PRNG key in training, else None.

    >>> q = jnp.ones((1, 4, 2, 8))
    >>> attend_everywhere(q, q, q, None, HeadsConfig(2, 2, 8)).shape
    (1, 4, 2, 8)
    """
    return dense_attention(
        q,
        k,
        v,
        segment_ids=segment_ids,
        implementation=heads.implementation,
        dropout_rate=heads.dropout,
        # The router draws from the layer's key itself.
        dropout_rng=None if rng is None else jax.random.fold_in(rng, 1),
    )
