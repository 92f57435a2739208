"""Rotary position embedding (Su et al. 2021), in the half-split layout of Llama."""

import chex
import jax
import jax.numpy as jnp
import numpy as np


def llama3_factors(
    head_dim: int, theta: float, factor: float, low: float, high: float, length: int
) -> tuple[float, ...]:
    """Llama 3.1's long-context divisors: slow pairs turn `factor` times slower, fast ones do not.

    A pair that turns fewer than `low` times within `length` tokens is slowed in full, one that
    turns more than `high` times not at all; between, the frequency is interpolated.

    Args:
      head_dim: H.
      theta: base of the rotary embedding.
      factor: how many times longer the context has become.
      low: turns, see above.
      high: turns, above `low`.
      length: tokens of the context before.

    Raises:
      ValueError: a factor that is not above 0, or `low` not below `high`.

    Returns:
      H/2 divisors, as `apply_rope` takes them.

    >>> llama3_factors(4, 10_000.0, 8.0, 1.0, 4.0, 256)
    (1.0, 8.0)
    """
    if not (factor > 0 and low < high):
        raise ValueError(
            f"Llama 3's RoPE has factor {factor}, low {low} and high {high}; the factor must be "
            "above 0, and low below high."
        )
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = length * frequency / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return tuple((1 / (kept + (1 - kept) / factor)).tolist())


def apply_rope(
    x: jax.Array,
    positions: jax.Array,
    theta: float = 10_000.0,
    factors: tuple[float, ...] = (),
) -> jax.Array:
    """Turns each pair (x_i, x_{i+H/2}) by the angle position·theta^(−2i/H) / factor_i.

    Args:
      x: [B,T,N,H], H even.
      positions: [B,T] int32.
      theta: the longest wavelength's base.
      factors: H/2 numbers that slow the pairs for long contexts; empty for none.

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
    if factors:
        frequency /= jnp.array(factors, jnp.float32)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency[None, None, None]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(
        x.dtype
    )
