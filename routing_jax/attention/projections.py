"""Query, key, value and output projections, shared by every mixer that attends."""

from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from routing_jax.attention.rope import apply_rope
from routing_jax.kernels import AttentionImplementation, dense_attention


@dataclass(frozen=True)
class HeadsConfig:
    """The heads of an attention layer: MHA when N = K, MQA when K = 1, GQA between.

    Attributes:
      num_heads: N, query heads.
      num_kv_heads: K, key/value heads; divides N.
      head_dim: H.
      rope_theta: base of the rotary embedding; 0 for no positions.
      implementation: 'cudnn', 'xla', or None for the best one here.
      dropout: of the attention weights, in training.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    implementation: AttentionImplementation | None = None
    dropout: float = 0.0


class AttentionWeights(NamedTuple):
    """query [D,N,H], key [D,K,H], value [D,K,H], out [N,H,D]."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    out: jax.Array


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
    return AttentionWeights(
        query=module.param("query", into, (width, N, H)).astype(dtype),
        key=module.param("key", into, (width, K, H)).astype(dtype),
        value=module.param("value", into, (width, K, H)).astype(dtype),
        out=module.param("out", back, (N, H, width)).astype(dtype),
    )


def project_queries(
    x: jax.Array, positions: jax.Array, weights: AttentionWeights, heads: HeadsConfig
) -> jax.Array:
    """Queries [B,T,N,H] of x [B,T,D], turned to their positions [B,T].

    >>> into = jnp.ones((4, 1, 2))
    >>> weights = AttentionWeights(into, into, into, into.transpose(1, 2, 0))
    >>> heads = HeadsConfig(num_heads=1, num_kv_heads=1, head_dim=2, rope_theta=0)
    >>> project_queries(jnp.ones((1, 1, 4)), jnp.array([[0]]), weights, heads).tolist()
    [[[[4.0, 4.0]]]]
    """
    q = jnp.einsum("BTD,DNH->BTNH", x, weights.query)
    return apply_rope(q, positions, heads.rope_theta) if heads.rope_theta else q


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
    k = jnp.einsum("BTD,DKH->BTKH", x, weights.key)
    v = jnp.einsum("BTD,DKH->BTKH", x, weights.value)
    return (apply_rope(k, positions, heads.rope_theta) if heads.rope_theta else k), v


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
