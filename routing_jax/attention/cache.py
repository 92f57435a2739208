"""What decoding remembers of a layer.

A cache is contiguous: row b of `keys` holds sequence b's keys at their positions. Keys and values
are kept for every token, attended or not, since any later token may attend to them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class LayerCache(NamedTuple):
    """One layer's memory; a field that the layer does not need is None.

    Attributes:
      keys: [B,S,K,H].
      values: [B,S,K,H].
      history: [B,W−1,D], the convolution's last inputs, oldest first.
      summary: [B,R] float32, the token router's recurrent summary.
      memory: what else the mixer remembers: a BlockMemory, LayerMemory or LinearMemory.
    """

    keys: Any = None
    values: Any = None
    history: Any = None
    summary: Any = None
    memory: Any = None


def write_kv(
    cache: LayerCache, keys: jax.Array, values: jax.Array, positions: jax.Array
) -> LayerCache:
    """The cache with new keys and values at their positions; padding is not written.

    Args:
      cache: with keys and values [B,S,K,H].
      keys: [B,T,K,H].
      values: [B,T,K,H].
      positions: [B,T] int32; −1 marks padding.

    >>> cache = LayerCache(jnp.zeros((1, 4, 1, 1)), jnp.zeros((1, 4, 1, 1)))
    >>> one = jnp.ones((1, 1, 1, 1))
    >>> write_kv(cache, one, one, jnp.array([[2]])).keys.ravel().tolist()
    [0.0, 0.0, 1.0, 0.0]
    """
    rows = jnp.arange(positions.shape[0])[:, None]
    target = jnp.where(positions < 0, cache.keys.shape[1], positions)
    return cache._replace(
        keys=cache.keys.at[rows, target].set(keys.astype(cache.keys.dtype), mode="drop"),
        values=cache.values.at[rows, target].set(values.astype(cache.values.dtype), mode="drop"),
    )


def push_history(history: jax.Array, x: jax.Array, positions: jax.Array) -> jax.Array:
    """The last W−1 inputs after x, whose valid tokens come first in each row.

    Args:
      history: [B,W−1,D], the inputs before x.
      x: [B,T,D].
      positions: [B,T] int32; −1 marks padding, after the valid tokens.

    >>> history, x = jnp.zeros((1, 2, 1)), jnp.ones((1, 3, 1))
    >>> push_history(history, x, jnp.array([[0, -1, -1]])).ravel().tolist()
    [0.0, 1.0]
    """
    joined = jnp.concatenate([history, x.astype(history.dtype)], axis=1)
    valid = jnp.sum(positions >= 0, axis=1)
    index = valid[:, None] + jnp.arange(history.shape[1])[None]
    return jnp.take_along_axis(joined, index[:, :, None], axis=1)
