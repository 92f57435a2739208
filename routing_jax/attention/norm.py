"""Root-mean-square normalisation (Zhang & Sennrich 2019)."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Normalises the last dimension to x / rms(x) · scale, computed in float32.

    Args:
      x: […, D].
      scale: [D].
      eps: added to the mean square.

    Returns:
      […, D] in x's dtype.

    >>> rms_norm(jnp.array([3.0, -3.0]), jnp.array([1.0, 2.0]), 0.0).tolist()
    [1.0, -2.0]
    """
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)
