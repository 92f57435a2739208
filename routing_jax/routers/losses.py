"""Auxiliary losses of routers."""

import jax
import jax.numpy as jnp


def balance_loss(probs: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean squared distance of the mean probabilities from uniform; 0 at uniform.

    MoAS, arXiv 2512.20650.

    Args:
      probs: [B,T,E].
      valid: [B,T] bool; other tokens are not counted.

    >>> valid = jnp.ones((1, 2), bool)
    >>> float(balance_loss(jnp.array([[[1.0, 0.0], [0.0, 1.0]]]), valid))
    0.0
    >>> float(balance_loss(jnp.array([[[1.0, 0.0], [1.0, 0.0]]]), valid))
    0.25
    """
    counted = jnp.where(valid[:, :, None], probs, 0).sum((0, 1))
    mean = counted / jnp.maximum(valid.sum(), 1)
    return jnp.mean((mean - 1 / probs.shape[-1]) ** 2)
