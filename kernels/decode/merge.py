"""The softmax over all pages of a list from those over its parts."""

import jax
import jax.numpy as jnp


def merge_splits(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The softmax over all keys from the softmaxes over each split's: exact but for rounding.

    Args:
      outs: [B,K,splits,R,H] float32, the mean of each split's values.
      lses: [B,K,splits,R] float32, the log-sum-exp of its logits; −inf where it has no key.

    Returns:
      [B,K,R,H] and [B,K,R], float32; 0 and −inf where no split has a key.

    >>> outs, lses = jnp.array([1.0, 5.0, 0.0]), jnp.array([0.0, jnp.log(3.0), -jnp.inf])
    >>> out, lse = merge_splits(outs.reshape(1, 1, 3, 1, 1), lses.reshape(1, 1, 3, 1))
    >>> round(float(out[0, 0, 0, 0]), 5), round(float(jnp.exp(lse[0, 0, 0])), 5)
    (4.0, 4.0)
    """
    maximum = lses.max(axis=2)
    shift = jnp.where(maximum == -jnp.inf, 0.0, maximum)  # −inf − −inf would be nan
    weights = jnp.exp(lses - shift[:, :, None])
    total = weights.sum(axis=2)
    out = (weights[..., None] * outs).sum(axis=2)
    return out / jnp.where(total == 0, 1.0, total)[..., None], shift + jnp.log(total)
