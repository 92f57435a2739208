"""Convolution everywhere: the cheap mixer, alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from routing_jax.attention.cache import LayerCache, push_history
from routing_jax.attention.mixer import LayerReport, Mode, attention_work, check_mode, visible_pairs
from routing_jax.attention.projections import HeadsConfig
from routing_jax.kernels import causal_conv


def conv_kernel(module: nn.Module, conv_width: int, width: int, dtype: jnp.dtype) -> jax.Array:
    """Declares a depthwise kernel [W,D] as a float32 parameter, cast to the compute dtype.

    Args:
      module: the Linen module in whose compact method this is called.
      conv_width: W.
      width: D.
      dtype: compute dtype.

    >>> class Layer(nn.Module):
    ...     @nn.compact
    ...     def __call__(self):
    ...         return conv_kernel(self, 4, 8, jnp.bfloat16)
    >>> kernel, variables = Layer().init_with_output(jax.random.key(0))
    >>> kernel.shape, kernel.dtype.name, variables["params"]["conv"].dtype.name
    ((4, 8), 'bfloat16', 'float32')
    """
    init = nn.initializers.normal(conv_width**-0.5)
    return module.param("conv", init, (conv_width, width)).astype(dtype)


def conv_branch(
    x: jax.Array,
    kernel: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array | None,
    cache: LayerCache | None,
) -> tuple[jax.Array, LayerCache | None]:
    """The convolution of x [B,T,D], and the cache with x pushed into its history.

    Args:
      x: [B,T,D].
      kernel: [W,D], the last row for the token itself.
      positions: [B,T] int32, −1 for padding.
      segment_ids: [B,T] int32 or None.
      cache: with history [B,W−1,D], or None.

    >>> cache = LayerCache(history=jnp.full((1, 1, 1), 5.0))
    >>> x, kernel = jnp.ones((1, 2, 1)), jnp.ones((2, 1))
    >>> y, cache = conv_branch(x, kernel, jnp.array([[0, 1]]), None, cache)
    >>> y.ravel().tolist(), cache.history.ravel().tolist()
    ([6.0, 2.0], [1.0])
    """
    history = None if cache is None else cache.history
    y = causal_conv(x, kernel, history=history, segment_ids=segment_ids)
    if cache is not None:
        cache = cache._replace(history=push_history(cache.history, x, positions))
    return y, cache


class CausalConv(nn.Module):
    """Causal depthwise convolution over the last W tokens.

    `__call__(x [B,T,D], positions [B,T], segment_ids [B,T] | None, cache, rng, mode)
    -> (y [B,T,D], cache, LayerReport)`.
    """

    heads: HeadsConfig  # of the attention that the cost is measured against
    conv_width: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        cache: LayerCache | None = None,
        rng: jax.Array | None = None,
        mode: Mode = "eval",
    ) -> tuple[jax.Array, LayerCache | None, LayerReport]:
        """Mixes the tokens of x [B,T,D]; see the class."""
        check_mode(mode)
        kernel = conv_kernel(self, self.conv_width, x.shape[-1], x.dtype)
        y, cache = conv_branch(x, kernel, positions, segment_ids, cache)
        pairs = visible_pairs(positions, segment_ids).sum()
        dense = attention_work(jnp.maximum(pairs, 1), self.heads.num_heads, self.heads.head_dim)
        tokens = jnp.sum(positions >= 0, dtype=jnp.float32)  # their work would overflow int32
        work = tokens * (self.conv_width * x.shape[-1])
        zero = jnp.float32(0)
        report = LayerReport(
            cost=work / dense,
            kv_cost=zero,
            usage=zero,
            aux=zero,
            choice=jnp.zeros_like(positions, bool),
        )
        return y, cache, report
