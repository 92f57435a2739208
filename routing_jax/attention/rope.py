"""Rotary position embedding (Su et al. 2021), in the half-split layout of Llama."""

import chex
import jax
import jax.numpy as jnp


def apply_rope(x: jax.Array, positions: jax.Array, theta: float = 10_000.0) -> jax.Array:
    """Turns each pair (x_i, x_{i+H/2}) by the angle position·theta^(−2i/H).

    Args:
      x: [B,T,N,H], H even.
      positions: [B,T] int32.
      theta: the longest wavelength's base.

    Returns:
      [B,T,N,H] in x's dtype; computed in float32.

    >>> x = jnp.array([[[[1.0, 0.0]]]])
    >>> [round(v, 3) for v in apply_rope(x, jnp.array([[1]])).ravel().tolist()]
    [0.54, 0.841]
    """
    chex.assert_rank([x, positions], [4, 2])
    H = x.shape[-1]
    if H % 2:
        raise ValueError(f"RoPE needs an even head dim; it is {H}.")
    frequency = theta ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency[None, None, None]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(
        x.dtype
    )
