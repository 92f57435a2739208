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


def query_segments(positions: jax.Array, segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The segment of each query, which is the one found at its position.

    Args:
      positions: [B,T] int32; −1 for a query that sees nothing.
      segment_ids: [B,S].

    Returns:
      (positions, segments), each [B,T]: a query past S has no segment, and gets position −1.

    >>> positions, segments = query_segments(jnp.array([[1, 2, 3]]), jnp.array([[7, 7, 8]]))
    >>> positions.tolist(), segments[0, :2].tolist()
    ([[1, 2, -1]], [7, 8])
    """
    positions = jnp.where(positions < segment_ids.shape[1], positions, -1)
    return positions, jnp.take_along_axis(segment_ids, jnp.maximum(positions, 0), axis=1)
