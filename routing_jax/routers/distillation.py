"""Where dense attention looks, block by block, and how far a router is from it.

The target of SeerAttention's gate (arXiv 2410.13276) and of DeepSeek's indexer: the dense map,
summed over blocks of keys, of whichever query of a tile wants a block most. It is made a few tiles
at a time; no T×S array ever exists.
"""

import jax
import jax.numpy as jnp
import numpy as np

from routing_jax.kernels.padding import pad_axis

_QUERIES = 32  # of small tiles, those that are taken together


def _by_blocks(mass: jax.Array, block_kv: int) -> jax.Array:
    """[...,S] added up by blocks of keys: [...,J]."""
    blocks = -(-mass.shape[-1] // block_kv)
    mass = pad_axis(mass, mass.ndim - 1, blocks * block_kv)
    return mass.reshape(*mass.shape[:-1], blocks, block_kv).sum(axis=-1)


def pooled_attention(
    q: jax.Array,
    k: jax.Array,
    *,
    block_q: int,
    block_kv: int,
    segment_ids: jax.Array | None = None,
    chosen: jax.Array | None = None,
) -> jax.Array:
    """The causal attention map by blocks: how much any query of a tile looks there, at most.

    All query heads of a kv head count. Of one query that needs a block among many that do not, a
    mean would leave next to nothing.

    Args:
      q: [B,T,N,H].
      k: [B,T,K,H].
      block_q: queries a tile.
      block_kv: keys a block.
      segment_ids: [B,T] int32 or None.
      chosen: [M] int32, the tiles of which the map is made; None for all.

    Returns:
      [B,K,M,J] float32; a row sums to 1. No gradient flows through it.

    >>> q = jnp.zeros((1, 4, 1, 2))
    >>> last = pooled_attention(q, q, block_q=2, block_kv=2)[0, 0, 1]  # 2/3 and 1/2 at most
    >>> [round(share, 3) for share in last.tolist()]
    [0.571, 0.429]
    """
    q, k = jax.lax.stop_gradient((q, k))
    B, T, N, H = q.shape
    K = k.shape[2]
    tiles = -(-T // block_q)
    places = jnp.arange(tiles * block_q, dtype=jnp.int32).reshape(tiles, block_q)
    rows = pad_axis(q, 1, tiles * block_q).reshape(B, tiles, block_q, K, N // K, H)
    segments = None
    if segment_ids is not None:
        segments = pad_axis(segment_ids, 1, tiles * block_q).reshape(B, tiles, block_q)
        segments = segments.swapaxes(0, 1)
    keys_at = jnp.arange(T, dtype=jnp.int32)

    def one_tile(args):
        q, at, of_queries = args  # [B,block_q,K,G,H], [block_q], [B,block_q] or None
        logits = jnp.einsum("BQKGH,BSKH->BKGQS", q, k, preferred_element_type=jnp.float32)
        seen = (at[:, None] >= keys_at[None])[None]
        if of_queries is not None and segment_ids is not None:
            seen = seen & (of_queries[:, :, None] == segment_ids[:, None])
        logits = jnp.where(seen[:, None, None], logits * H**-0.5, -jnp.inf)
        live = ((at < T)[None] & seen.any(-1))[:, None, None, :, None]
        mass = jnp.where(live, jax.nn.softmax(jnp.where(live, logits, 0.0), axis=-1), 0.0)
        mass = _by_blocks(mass, block_kv).max(axis=(2, 3))  # of B K G Q J
        return mass / jnp.maximum(mass.sum(axis=-1, keepdims=True), 1e-30)

    together = max(1, _QUERIES // block_q)
    inputs = rows.swapaxes(0, 1), places, segments
    if chosen is not None:
        inputs = jax.tree.map(lambda x: x[chosen], inputs)
    return jnp.moveaxis(jax.lax.map(one_tile, inputs, batch_size=together), 0, 2)


def some_tiles(num_tiles: int, share: float, rng: jax.Array | None) -> jax.Array:
    """A share of the tiles, evenly spaced, the first of them drawn.

    Args:
      num_tiles: M.
      share: in (0, 1].
      rng: a PRNG key; None to begin with the first tile.

    Returns:
      int32, distinct.

    >>> some_tiles(8, 0.25, None).tolist()
    [0, 4]
    """
    number = max(1, round(num_tiles * share))
    first = 0 if rng is None else jax.random.randint(rng, (), 0, num_tiles)
    # By numpy: the product passes what int32 holds where every query is a tile of its own.
    apart = np.arange(number) * num_tiles // number
    return (first + jnp.asarray(apart, jnp.int32)) % num_tiles


def block_divergence(scores: jax.Array, target: jax.Array, open_: jax.Array) -> jax.Array:
    """KL(target ‖ softmax(scores)) over the blocks that compete, in nats, mean over rows.

    Args:
      scores: [B,K,M,J] float32, the router's.
      target: [B,K,M,J] float32, not negative; normalised here over the open blocks.
      open_: bool, broadcast against them: blocks that compete. A row without any counts nothing.

    >>> scores, target = jnp.zeros((1, 1, 1, 2)), jnp.array([[[[1.0, 0.0]]]])
    >>> round(float(block_divergence(scores, target, jnp.ones((1, 1, 1, 2), bool))), 4)  # log 2
    0.6931
    """
    open_ = jnp.broadcast_to(open_, scores.shape)
    target = jnp.where(open_, target, 0.0)
    total = target.sum(axis=-1, keepdims=True)
    target = target / jnp.maximum(total, 1e-30)
    some = open_.any(axis=-1) & (total[..., 0] > 0)
    # Rows without an open block would softmax over nothing, whose gradient is nan.
    logits = jnp.where(open_, scores, jnp.where(some[..., None], -jnp.inf, 0.0))
    log_probs = jnp.where(open_, jax.nn.log_softmax(logits, axis=-1), 0.0)
    terms = jax.scipy.special.xlogy(target, target) - target * log_probs
    return jnp.where(some, terms.sum(axis=-1), 0.0).sum() / jnp.maximum(some.sum(), 1)
