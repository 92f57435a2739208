"""Where a query looks for blocks: the share of attention that each would have by a few channels.

RoPE turns some channels so slowly that they say what a key is, wherever it stands; what the others
add is mostly about places nearby, which sink and window hold. So a query is multiplied with all
keys, but with a quarter of their channels, and a block counts with what would fall to its keys, the
heads of a kv head together. Means of keys, as MoBA (arXiv 2502.13189) and NSA (arXiv 2502.11089)
have them, hide the one key that a query looks for. Only blocks that compete are weighed against
each other: sink and window are read in any case.
"""

import jax
import jax.numpy as jnp

from routing_jax.kernels import block_logsumexp
from routing_jax.kernels.padding import cut
from routing_jax.routers.sparse_modes import SparseModeConfig

_NEVER = -1e30  # of blocks that do not compete, whose logarithm would be −inf


def slow_channels(x: jax.Array, channels: int) -> jax.Array:
    """The channels that RoPE turns slowest: of both halves of a head the last.

    Args:
      x: [...,H].
      channels: R, even and at most H.

    Returns:
      [...,R].

    >>> slow_channels(jnp.arange(8), 4).tolist()
    [2, 3, 6, 7]
    """
    half, some = x.shape[-1] // 2, channels // 2
    return jnp.concatenate([x[..., half - some : half], x[..., x.shape[-1] - some :]], axis=-1)


def search_keys(config: SparseModeConfig, keys: jax.Array) -> jax.Array:
    """What is searched of a sequence's keys: a few channels, a kv head's keys of a block together.

    Args:
      config: how many channels, and the blocks' size.
      keys: [B,T,K,H].

    Returns:
      [B·J,K,block_kv,R]: pages, a sequence's blocks one after another (`contiguous_pages`); 0 past
      a sequence's end.

    >>> search_keys(SparseModeConfig(), jnp.ones((2, 200, 3, 64))).shape
    (4, 3, 128, 16)
    """
    blocks = cut(slow_channels(keys, config.channels_of(keys.shape[-1])), 1, config.block_kv)
    return blocks.reshape(-1, *blocks.shape[2:]).swapaxes(1, 2)


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
    return (block >= config.sink_blocks) & (block < _end(config, places)[..., None])


def _end(config: SparseModeConfig, places: jax.Array) -> jax.Array:
    return places // config.block_kv + 1 - config.window_blocks


def log_shares(logits: jax.Array) -> jax.Array:
    """Log of each block's share of a softmax, mean over heads.

    Args:
      logits: [...,G,J] float32, of each head; −inf of blocks that do not compete.

    Returns:
      [...,J] float32; of blocks that do not compete, less than of any other.

    >>> logits = jnp.log(jnp.array([[3.0, 1.0, 0.0], [1.0, 3.0, 0.0]]))
    >>> jnp.exp(log_shares(logits)).round(3).tolist()
    [0.5, 0.5, 0.0]
    """
    shares = jax.nn.log_softmax(jnp.maximum(logits, _NEVER), axis=-1)
    found = jax.nn.logsumexp(shares, axis=-2) - jnp.log(logits.shape[-2])
    return jnp.where(logits[..., 0, :] > -jnp.inf, found, _NEVER)


def search_scores(
    config: SparseModeConfig,
    queries: jax.Array,
    keys: jax.Array,
    pages: jax.Array,
    places: jax.Array,
) -> jax.Array:
    """By what blocks are found: the log of a block's share of attention, by a few channels.

    Args:
      config: the sizes of sink and window.
      queries: [B,M,N,H], the first query of each tile; they get no gradient.
      keys: [P,K,block_kv,R], what `search_keys` keeps of each page; they get no gradient.
      pages: [B,J] int32, the page of each block; read only where a block competes.
      places: [B or 1,M] int32, where those queries stand; −1 for queries that do not search.

    Returns:
      [B,K,M,J] float32.

    >>> config = SparseModeConfig(sink=1, window=1, channels=2, block_q=1, block_kv=1)
    >>> keys = jnp.array([0.0, 0.0, jnp.log(3.0), 0.0])[:, None] * 2**-0.5
    >>> keys = jnp.broadcast_to(keys, (4, 2)).reshape(4, 1, 1, 2)
    >>> places, pages = jnp.array([[3]]), jnp.arange(4)[None]
    >>> found = search_scores(config, jnp.ones((1, 1, 1, 2)), keys, pages, places)
    >>> jnp.exp(found).ravel().round(2).tolist()
    [0.0, 0.25, 0.75, 0.0]
    """
    B, M, N, H = queries.shape
    K, J = keys.shape[1], pages.shape[1]
    queries, keys = jax.lax.stop_gradient((slow_channels(queries, keys.shape[-1]), keys))
    ends = jnp.broadcast_to(_end(config, places), (B, M))
    first = config.sink_blocks
    logits = block_logsumexp(queries, keys, pages, ends, first=first, scale=H**-0.5)
    return log_shares(logits.reshape(B, M, K, N // K, J)).swapaxes(1, 2)
