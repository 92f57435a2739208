"""Where a query looks for blocks: the share of attention that each would have by its mean keys.

NSA's rule (arXiv 2502.11089): a query attends to means of parts of a block instead of to keys, and
a block counts with what falls to its parts, the heads of a kv head together. With one mean a block
and one query head it ranks as MoBA does (arXiv 2502.13189). Only blocks that compete are weighed
against each other: sink and window are read in any case.
"""

import jax
import jax.numpy as jnp

from routing_jax.kernels.padding import pad_axis
from routing_jax.routers.block_scores import block_sums, means_of
from routing_jax.routers.sparse_modes import SparseModeConfig

_NEVER = -1e30  # of blocks that do not compete, whose logarithm would be −inf


def pooled_keys(
    keys: jax.Array, valid: jax.Array, block_kv: int, means: int
) -> tuple[jax.Array, jax.Array]:
    """The few keys that stand for a block, means of its parts, and the sums that they are made of.

    A mean of 128 keys says little of the one that a query looks for; eight means of 16 say most of
    it. Sums are what is kept of a block, so that a token that is decoded adds its own key.

    Args:
      keys: [B,T,K,H]; they get no gradient.
      valid: [B,T] bool; other tokens count as nothing.
      block_kv: keys a block.
      means: Z, parts of a block with a mean each; divides block_kv.

    Returns:
      (sums, means), [B,J,Z,K,H] float32 both; 0 for a part without tokens.

    >>> keys, valid = jnp.arange(4.0).reshape(1, 4, 1, 1), jnp.ones((1, 4), bool)
    >>> [x.ravel().tolist() for x in pooled_keys(keys, valid, 4, 2)]
    [[1.0, 5.0], [0.5, 2.5]]
    """
    B, T, K, H = keys.shape
    J = -(-T // block_kv)
    sums, sizes = block_sums(
        jax.lax.stop_gradient(keys).reshape(B, T, K * H), valid, block_kv // means
    )
    found = (pad_axis(x, 1, J * means) for x in (sums, means_of(sums, sizes)))
    sums, pooled = (x.reshape(B, J, means, K, H) for x in found)
    return sums, pooled


def searchable_blocks(config: SparseModeConfig, places: jax.Array, num_blocks: int) -> jax.Array:
    """Which blocks a query may find: those behind the sink and before its window.

    Args:
      config: the sizes of sink and window.
      places: [...] int32, where the queries stand; −1 for none.
      num_blocks: J.

    Returns:
      [...,J] bool.

    >>> config = SparseModeConfig(sink=8, window=16, block_q=8, block_kv=8)
    >>> searchable_blocks(config, jnp.array([39]), 5).tolist()
    [[False, True, True, False, False]]
    """
    block = jnp.arange(num_blocks, dtype=jnp.int32).reshape((1,) * places.ndim + (-1,))
    end = places // config.block_kv + 1 - config.window_blocks
    return (block >= config.sink_blocks) & (block < end[..., None])


def log_shares(logits: jax.Array, competes: jax.Array) -> jax.Array:
    """Log of each block's share of a softmax, mean over heads.

    Args:
      logits: [G,...,J] float32, of each head.
      competes: bool, broadcast against [...,J], of as many axes.

    Returns:
      [...,J] float32; of blocks that do not compete, less than of any other.

    >>> logits = jnp.log(jnp.array([[3.0, 1.0, 9.0], [1.0, 3.0, 9.0]]))
    >>> jnp.exp(log_shares(logits, jnp.array([True, True, False]))).round(3).tolist()
    [0.5, 0.5, 0.0]
    """
    shares = jax.nn.log_softmax(jnp.where(competes[None], logits, _NEVER), axis=-1)
    found = jax.nn.logsumexp(shares, axis=0) - jnp.log(len(logits))
    return jnp.where(competes, found, _NEVER)


def search_scores(
    config: SparseModeConfig, queries: jax.Array, means: jax.Array, places: jax.Array
) -> jax.Array:
    """By what blocks are found: the log of a block's share of attention, by its mean keys.

    Args:
      config: the sizes of sink and window.
      queries: [B,M,N,H], the first query of each tile; they get no gradient.
      means: [B,J,Z,K,H], the mean keys of each block.
      places: [B or 1,M] int32, where those queries stand.

    Returns:
      [B,K,M,J] float32.

    >>> config = SparseModeConfig(sink=1, window=1, means=1, block_q=1, block_kv=1)
    >>> means = jnp.array([0.0, 0.0, jnp.log(3.0), 0.0]).reshape(1, 4, 1, 1, 1)
    >>> found = search_scores(config, jnp.ones((1, 1, 1, 1)), means, jnp.array([[3]]))
    >>> jnp.exp(found).ravel().round(2).tolist()
    [0.0, 0.25, 0.75, 0.0]
    """
    B, M, N, H = queries.shape
    J, K = means.shape[1], means.shape[3]
    queries = jax.lax.stop_gradient(queries.astype(jnp.float32)) * H**-0.5
    queries = queries.reshape(B, M, K, N // K, H)

    # Part by part: logits of all of them would be as many times the memory.
    def add(total: jax.Array, keys: jax.Array) -> tuple[jax.Array, None]:
        logits = jnp.einsum("BMKGH,BJKH->GBKMJ", queries, keys, precision="highest")
        return jnp.logaddexp(total, logits), None

    empty = jnp.full((N // K, B, K, M, J), _NEVER)
    parts = jnp.moveaxis(means.astype(jnp.float32), 2, 0)
    logits, _ = jax.lax.scan(add, empty, parts)
    return log_shares(logits, searchable_blocks(config, places, J)[:, None])
