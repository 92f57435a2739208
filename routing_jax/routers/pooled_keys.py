"""One key for a whole block: the mean of its keys, or a mean with weights that are learned.

A mean of 128 keys says little of the one that a query looks for. Here each kv head learns a
direction d, and a key k weighs exp(H k·d): keys that are looked for stand out, those of filler
fade. H is there for d to come far at the learning rate of a router's matrices. What is kept of a
block are sums, so a token that is decoded adds its own. Like the learned poolings of NSA and
SeerAttention (arXiv 2502.11089, 2410.13276), in H numbers a head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from routing_jax.routers.block_scores import block_sums, means_of, weights_along


class KeySums(NamedTuple):
    """Keys added up, by their weights.

    Attributes:
      keys: [...,K,H] float32, keys times weights.
      weights: [...,K] float32, or None where all keys weigh the same.
    """

    keys: jax.Array
    weights: jax.Array | None = None


def no_keys(blocks: tuple[int, ...], kv_heads: int, head_dim: int, learned: bool) -> KeySums:
    """The sums of blocks that hold nothing yet.

    Args:
      blocks: the sizes in front, such as (B, J).
      kv_heads: K.
      head_dim: H.
      learned: whether keys will have weights.

    >>> jax.tree.map(jnp.shape, no_keys((5,), 2, 8, True))
    KeySums(keys=(5, 2, 8), weights=(5, 2))
    """
    shape = (*blocks, kv_heads)
    return KeySums(jnp.zeros((*shape, head_dim)), jnp.zeros(shape) if learned else None)


def weighed(keys: jax.Array, direction: jax.Array | None = None) -> KeySums:
    """Each key by its weight: what it adds to the sums of its block.

    Args:
      keys: [...,K,H].
      direction: [K,H] float32, of the heaviest keys; None for weights of 1. A weight stays between
        exp(−15) and exp(15), where it has no gradient.

    >>> found = weighed(jnp.array([[1.0, 2.0]]), jnp.zeros((1, 2)))
    >>> found.keys.tolist(), found.weights.tolist()
    ([[1.0, 2.0]], [1.0])
    """
    keys = keys.astype(jnp.float32)
    if direction is None:
        return KeySums(keys)
    weights = weights_along(keys, direction * keys.shape[-1])
    return KeySums(keys * weights[..., None], weights)


def pooled_keys(
    keys: jax.Array, valid: jax.Array, block_kv: int, direction: jax.Array | None = None
) -> tuple[KeySums, jax.Array]:
    """The sums of each block, and its one key.

    Args:
      keys: [B,T,K,H]; the direction alone gets a gradient.
      valid: [B,T] bool; other tokens count as nothing.
      block_kv: keys a block.
      direction: as `weighed` takes it.

    Returns:
      (KeySums of [B,J,K,...], [B,J,K,H] float32; 0 for a block without tokens).

    >>> keys = jnp.arange(4.0).reshape(1, 4, 1, 1)
    >>> pooled_keys(keys, jnp.ones((1, 4), bool), 2)[1].ravel().tolist()
    [0.5, 2.5]
    >>> heavy = pooled_keys(keys, jnp.ones((1, 4), bool), 2, jnp.full((1, 1), 9.0))[1]
    >>> heavy.ravel().round(2).tolist()
    [1.0, 2.5]
    """
    B, T, K, H = keys.shape
    parts = weighed(jax.lax.stop_gradient(keys), direction)
    sums, sizes = block_sums(parts.keys.reshape(B, T, K * H), valid, block_kv)
    sums = sums.reshape(B, -1, K, H)
    if parts.weights is None:
        return KeySums(sums), means_of(sums, sizes[..., None])
    weights, _ = block_sums(parts.weights, valid, block_kv)
    return KeySums(sums, weights), means_of(sums, weights)
