"""Scores of key blocks: pooled features, dot products, clusters, and fixed patterns.

Everything is float32, and no product rounds its inputs, as accelerators would: a choice near its
threshold must not flip between prefill and decoding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from routing_jax.kernels.padding import pad_axis
from routing_jax.routers.gates import straight_through

_PART = 256  # of a width, that one program of a product goes through
_MOST = 15.0  # of a weight's logarithm: float32 holds the sums of any block


def weights_along(vectors: jax.Array, direction: jax.Array) -> jax.Array:
    """Weights exp(v·d), between exp(−15) and exp(15), beyond which there is no gradient.

    Args:
      vectors: [...,H] float32.
      direction: [H] float32, or [K,H] for vectors [...,K,H].

    Returns:
      [...] float32.

    >>> weights_along(jnp.array([[1.0, 2.0]]), jnp.zeros(2)).tolist()
    [1.0]
    """
    direction = direction.reshape((1,) * (vectors.ndim - direction.ndim) + direction.shape)
    # No product of matrices, whose rounding would differ between a prompt and a single token.
    along = jnp.sum(vectors * direction, axis=-1)
    return jnp.exp(jnp.clip(along, -_MOST, _MOST))


def means_of(sums: jax.Array, weights: jax.Array) -> jax.Array:
    """What was added up ÷ what it weighs; as it is where that is nothing.

    >>> means_of(jnp.array([[4.0], [0.0]]), jnp.array([2.0, 0.0])).tolist()
    [[2.0], [0.0]]
    """
    return sums / jnp.where(weights > 0, weights, 1.0)[..., None]


def block_sums(
    features: jax.Array,
    valid: jax.Array,
    block_kv: int,
    segment_ids: jax.Array | None = None,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """What each block's keys add up to, and how many they are or how much they weigh.

    Of a block that holds parts of several segments only the last one counts: only its tokens
    have later tiles that could choose the block.

    Args:
      features: [B,S,F].
      valid: [B,S] bool; other tokens count as nothing.
      block_kv: keys a block.
      segment_ids: [B,S] int32 or None.
      weights: [B,S] float32, of the keys; None where all weigh 1.

    Returns:
      ([B,J,F] float32, [B,J] float32).

    >>> sums, sizes = block_sums(jnp.ones((1, 5, 1)), jnp.ones((1, 5), bool), 4)
    >>> sums.ravel().tolist(), sizes.ravel().tolist()
    ([4.0, 1.0], [4.0, 1.0])
    """

    def cut(x):
        num_blocks = -(-x.shape[1] // block_kv)
        x = pad_axis(x, 1, num_blocks * block_kv)
        return x.reshape(x.shape[0], num_blocks, block_kv, *x.shape[2:])

    counts = cut(valid)
    if segment_ids is not None:
        segments = cut(segment_ids)
        counts &= segments == segments[:, :, -1:]
    weighed = counts.astype(jnp.float32)
    if weights is not None:
        weighed *= cut(weights)
    blocks = cut(features.astype(jnp.float32))
    # No product of matrices: a sum reads the features as they are, whatever their dtype.
    return (blocks * weighed[..., None]).sum(axis=2), weighed.sum(axis=2)


def project_few(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Few rows x · W, summed in parts of D.

    A product of few rows and columns is cut into few programs on a GPU, each of which goes through
    all of D; its parts, of a width that is a multiple of 256, go side by side.

    Args:
      x: [B,M,D] float32.
      weights: [D,K,R] float32.

    Returns:
      [B,M,K,R] float32.

    >>> project_few(jnp.ones((1, 2, 512)), jnp.ones((512, 1, 1)))[0, 0].tolist()
    [[512.0]]
    """
    B, M, D = x.shape
    parts = D // _PART if D % _PART == 0 else 1
    x, weights = x.reshape(B, M, parts, -1), weights.reshape(parts, -1, *weights.shape[1:])
    return jnp.einsum("BMPD,PDKR->PBMKR", x, weights, precision="highest").sum(axis=0)


def dot_scores(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Scores q · k / √R of every tile and block.

    Args:
      queries: [B,M,K,R].
      keys: [B,J,K,R].

    Returns:
      [B,K,M,J] float32.

    >>> float(dot_scores(jnp.ones((1, 1, 1, 4)), jnp.ones((1, 1, 1, 4)))[0, 0, 0, 0])
    2.0
    """
    scores = jnp.einsum("BMKR,BJKR->BKMJ", queries, keys, precision="highest")
    return scores * queries.shape[-1] ** -0.5


def against_even(scores: jax.Array, allowed: jax.Array) -> jax.Array:
    """Log of each block's share of a row's softmax, beside that of a row where all are even.

    Distillation fixes a row's scores but for a constant, which the sign of a gate depends on.

    Args:
      scores: [B,K,M,J] float32.
      allowed: bool, broadcast against them; no other block counts.

    Returns:
      [B,K,M,J] float32; of blocks that are not allowed, something finite.

    >>> scores = jnp.array([7.0, 7.0 - jnp.log(3.0), 0.0])
    >>> shares = jnp.exp(against_even(scores, jnp.array([True, True, False])))
    >>> [round(float(share), 2) for share in shares[:2]]
    [1.5, 0.5]
    """
    total = jax.nn.logsumexp(jnp.where(allowed, scores, -1e30), axis=-1, keepdims=True)
    count = jnp.sum(allowed, axis=-1, keepdims=True)
    return jnp.where(count > 0, scores - total + jnp.log(jnp.maximum(count, 1)), scores)


def effective_number(scores: jax.Array, allowed: jax.Array) -> jax.Array:
    """How many blocks a row's softmax is spread over, e to its entropy; 0 of none.

    Args:
      scores: [B,K,M,J] float32.
      allowed: bool, broadcast against them; others have no share.

    Returns:
      [B,K,M] float32.

    >>> two = effective_number(jnp.array([[[[5.0, 5.0, 9.0]]]]), jnp.array([True, True, False]))
    >>> round(two.item(), 3)
    2.0
    """
    logs = jax.nn.log_softmax(jnp.where(allowed, scores, -1e30), axis=-1)
    entropy = -jnp.sum(jnp.where(allowed, jnp.exp(logs) * logs, 0.0), axis=-1)
    return jnp.where(jnp.any(allowed, axis=-1), jnp.exp(entropy), 0.0)


class Clusters(NamedTuple):
    """Which blocks share a cluster with each tile.

    Attributes:
      together: [B,K,M,J] bool.
      scores: [B,K,M,J] float32, log-probability that they do, noise-free.
      bias: [B,K,M,J] float32, 0 with the gradient of the noisy log-probability.
      aux: scalar, E · Σ p̄², the mean of tiles' and of blocks': 1 where clusters are equally full of
        either, E where one holds everything.
    """

    together: jax.Array
    scores: jax.Array
    bias: jax.Array
    aux: jax.Array


def assign_clusters(
    queries: jax.Array, keys: jax.Array, rng: jax.Array | None, temperature: float
) -> Clusters:
    """Assigns tiles and blocks to clusters by Gumbel-softmax, straight-through.

    Jang et al. 2017 for the assignment; blocks of one cluster attend to one another as tokens of
    one do in the Routing Transformer (arXiv 2003.05997).

    Args:
      queries: [B,M,K,E], logits of the tiles.
      keys: [B,J,K,E], logits of the blocks.
      rng: a PRNG key for Gumbel noise, or None for none.
      temperature: of the soft assignment that gives the gradient.

    >>> one = jax.nn.one_hot(jnp.array([[[0], [1]]]), 2) * 9
    >>> assign_clusters(one, one, None, 1.0).together[0, 0].tolist()
    [[True, False], [False, True]]
    """

    def log_together(queries, keys):
        tiles, blocks = (jax.nn.log_softmax(x, axis=-1) for x in (queries, keys))
        # log Σ_e exp(a+b) by a matrix product of what is at most 1: nothing as large as M×J×E.
        shares = jnp.exp(tiles), jnp.exp(blocks)
        share = jnp.einsum("BMKE,BJKE->BKMJ", *shares, precision="highest")
        return jnp.log(jnp.maximum(share, 1e-20))

    scores = log_together(queries, keys)
    noisy = [queries, keys]
    if rng is not None:
        rngs = jax.random.split(rng)
        noisy = [x + jax.random.gumbel(r, x.shape) for x, r in zip(noisy, rngs)]
    of_tiles, of_blocks = (jnp.argmax(x, axis=-1).swapaxes(1, 2) for x in noisy)
    soft = log_together(*(x / temperature for x in noisy))
    # Of each by itself: tiles could fill half of the clusters evenly, and blocks the others.
    shares = jnp.stack([jax.nn.softmax(x, axis=-1).mean(axis=(0, 1)) for x in (queries, keys)])
    return Clusters(
        together=of_tiles[..., None] == of_blocks[:, :, None],
        scores=scores,
        bias=straight_through(jnp.zeros_like(soft), soft),
        aux=queries.shape[-1] * jnp.sum(shares * shares, axis=-1).mean(),
    )


def pattern_scores(
    kind: str, tiles: jax.Array, first: jax.Array, num_blocks: int, room: jax.Array
) -> jax.Array:
    """Scores that make a fixed pattern of whatever a row has room for.

    window: nearest first. strided: every s-th block back from what is always listed, s as small as
    the room allows (Sparse Transformers, arXiv 1904.10509). bigbird: half the room for the nearest,
    half for blocks drawn once and for all (arXiv 2007.14062).

    Args:
      kind: one of these three.
      tiles: [B,M] int32, the number of each tile in its sequence.
      first: [B,M] int32, the block that each tile stands in, or the first of its local ones; later
        ones are not chosen by score.
      num_blocks: J.
      room: [B,M] int32, blocks that a row may list besides those that it always lists.

    Returns:
      [B,1,M,J] float32.

    >>> at = jnp.array([[5]])
    >>> scores = pattern_scores("strided", at, at, 6, jnp.array([[2]]))
    >>> jnp.argsort(-scores[0, 0, 0])[:3].tolist()  # the first one, then every third
    [5, 2, 4]
    """
    blocks = jnp.arange(num_blocks, dtype=jnp.int32)[None, None]
    back = first[..., None] - blocks
    nearest = -back.astype(jnp.float32)
    if kind == "window":
        scores = nearest
    elif kind == "strided":
        stride = -(-first // jnp.maximum(room, 1))
        scores = nearest + jnp.where(back % jnp.maximum(stride, 1)[..., None] == 0, num_blocks, 0)
    else:
        drawn = _mixed(tiles[..., None], blocks)
        scores = jnp.where(back <= room[..., None] // 2, num_blocks + nearest, drawn)
    return scores[:, None]


def _mixed(tiles: jax.Array, blocks: jax.Array) -> jax.Array:
    """[B,M,J] in (−1, 0], as good as random and the same whenever it is asked for."""
    x = tiles.astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
    x = x ^ (blocks.astype(jnp.uint32) * jnp.uint32(0x85EBCA6B))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # Wellons' integer hash
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return -(x >> 8).astype(jnp.float32) / (1 << 24)
