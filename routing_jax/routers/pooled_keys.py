"""A few keys for a whole block: means of its parts, plain or with weights that are learned.

A mean of 128 keys says little of the one that a query looks for; eight means of 16 say most of it.
What is kept of a block are sums, so a token that is decoded adds its own.

With weights, each kv head learns a direction d, and a key k weighs exp(H k·d): keys that are looked
for stand out, those of filler fade. H is there for d to come far at the learning rate of a router's
matrices. Like the learned poolings of NSA and SeerAttention (arXiv 2502.11089, 2410.13276), in H
numbers a head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from routing_jax.kernels.padding import pad_axis
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
      blocks: the sizes in front, such as (B, J, Z) for Z sums of each block.
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
    keys: jax.Array,
    valid: jax.Array,
    block_kv: int,
    means: int,
    direction: jax.Array | None = None,
) -> tuple[KeySums, jax.Array]:
    """The sums of each block, and the few keys that stand for it.

    Args:
      keys: [B,T,K,H]; the direction alone gets a gradient.
      valid: [B,T] bool; other tokens count as nothing.
      block_kv: keys a block.
      means: Z, parts of a block with a mean each; divides block_kv.
      direction: as `weighed` takes it.

    Returns:
      (KeySums of [B,J,Z,K,...], [B,J,Z,K,H] float32; 0 for a part without tokens).

    >>> keys, valid = jnp.arange(4.0).reshape(1, 4, 1, 1), jnp.ones((1, 4), bool)
    >>> pooled_keys(keys, valid, 4, 2)[1].ravel().tolist()
    [0.5, 2.5]
    >>> heavy = pooled_keys(keys, valid, 4, 2, jnp.full((1, 1), 9.0))[1]
    >>> heavy.ravel().round(2).tolist()
    [1.0, 2.5]
    """
    B, T = valid.shape
    blocks, size = -(-T // block_kv), block_kv // means
    each = weighed(jax.lax.stop_gradient(keys), direction)

    def add(features: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = block_sums(features.reshape(B, T, -1), valid, size)
        sums, sizes = (pad_axis(x, 1, blocks * means) for x in found)
        shape = B, blocks, means
        return sums.reshape(*shape, *features.shape[2:]), sizes.reshape(*shape, 1)

    sums, sizes = add(each.keys)
    if each.weights is None:
        return KeySums(sums), means_of(sums, sizes)
    weights, _ = add(each.weights)
    return KeySums(sums, weights), means_of(sums, weights)
