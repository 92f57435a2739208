"""Sequences packed in one row, told apart by segment ids."""

import chex
import jax
import jax.numpy as jnp


def segment_starts(segment_ids: jax.Array) -> jax.Array:
    """Where in its row each token's segment begins.

    Args:
      segment_ids: [B,T] int32; segments are contiguous runs.

    Returns:
      [B,T] int32.

    >>> segment_starts(jnp.array([[0, 0, 1, 1, 1]])).tolist()
    [[0, 0, 2, 2, 2]]
    """
    chex.assert_rank(segment_ids, 2)
    change = segment_ids[:, 1:] != segment_ids[:, :-1]
    begins = jnp.pad(change, ((0, 0), (1, 0)), constant_values=True)
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    return jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
