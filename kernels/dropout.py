"""Dropout: values zeroed at random in training, the others scaled up to keep the mean."""

import jax
import jax.numpy as jnp

_LEVELS = 1 << 16  # 16 random bits a value: a rate right to 1e-5


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
    kept = jax.random.bits(rng, x.shape, jnp.uint16) >= round(rate * _LEVELS)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)
