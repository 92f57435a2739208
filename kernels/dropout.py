"""Dropout: values zeroed at random in training, the others scaled up to keep the mean."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

_LEVELS = 1 << 16  # 16 random bits a value: a rate right to 1e-5


def draw_kept(shape: Sequence[int], rate: float, rng: jax.Array) -> jax.Array:
    """Which values are kept: bool of that shape, each false with probability `rate`.

    Args:
      shape: of the values.
      rate: in [0, 1), static.
      rng: a PRNG key.

    >>> 0.7 < float(draw_kept((1000,), 0.25, jax.random.key(0)).mean()) < 0.8
    True
    """
    return jax.random.bits(rng, shape, jnp.uint16) >= round(rate * _LEVELS)


def drop(x: jax.Array, kept: jax.Array, rate: float) -> jax.Array:
    """The kept values of x divided by 1 − rate, 0 in place of the others; x's dtype.

    >>> drop(jnp.ones(2), jnp.array([True, False]), 0.5).tolist()
    [2.0, 0.0]
    """
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def dropout(x: jax.Array, rate: float, rng: jax.Array | None) -> jax.Array:
    """Zeroes values with probability `rate` and divides the others by 1 − rate.

    Args:
      x: any shape.
      rate: in [0, 1), static.
      rng: a PRNG key, or None for x as it is.

    >>> dropped = dropout(jnp.ones(1000), 0.25, jax.random.key(0))
    >>> sorted({round(x, 2) for x in dropped.tolist()}), 0.7 < float((dropped > 0).mean()) < 0.8
    ([0.0, 1.33], True)
    """
    if rng is None or rate == 0:
        return x
    return drop(x, draw_kept(x.shape, rate, rng), rate)
