"""Block routing: each tile of queries chooses the key blocks that it attends to.

MoBA's rule (arXiv 2502.13189) and what it is compared with, in one module: the kinds differ in
their scores alone, and all rows are made of scores by the same budget.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from routing_jax.kernels import BlockTable, apply_rope
from routing_jax.routers.block_budget import (
    competing_blocks,
    row_limits,
    select_blocks,
    select_candidates,
)
from routing_jax.routers.block_config import FIXED, BlockRouterConfig
from routing_jax.routers.block_scores import (
    against_even,
    assign_clusters,
    block_sums,
    dot_scores,
    effective_number,
    means_of,
    pattern_scores,
    project_few,
    weights_along,
)
from routing_jax.routers.coarse_to_fine import beam_scores, beam_search, score_listed
from routing_jax.routers.gates import binary_entropy, binary_gate, straight_through
from routing_jax.routers.routing import Routing

# By which a gate's logit falls for each doubling of the distance, before training: with the usual
# bias, gates a thousand blocks away are still open.
_SLOPE = 0.2
# By which gates that nothing else of theirs could close move these two numbers: Adam's steps are as
# long for one number as for each of a projection's thousands, which add up.
_STRIDE = 32.0


class TileQueries(NamedTuple):
    """What a block router may know of each tile: its first query, and nothing behind it.

    Attributes:
      x: [B,M,D], the layer's input at the tile's first query.
      q: [B,M,N,H], that query itself.
      starts: [B,M] int32, where it stands; multiples of block_q.
      segments: [B,M] int32, its segment, or None.
    """

    x: jax.Array
    q: jax.Array
    starts: jax.Array
    segments: jax.Array | None = None


class KeyBlocks(NamedTuple):
    """What a block router may know of each key block.

    Attributes:
      means: [B,J,F] float32, the mean of `block_features` over the block's keys, or a weighted
        one; read only of blocks that were complete before a tile.
      segments: [B,J] int32, the segment of the block's last key, or None.
    """

    means: jax.Array
    segments: jax.Array | None = None


class BlockRouting(NamedTuple):
    """A block router's output.

    Attributes:
      routing: Routing with choice a BlockTable, probs and logits [B,K,M,J] float32 ([B,K,M,C],
        of the listed blocks, where not every block is scored). K is 1 for fixed patterns without
        gates.
      bias: [B,K,M,C] float32 to be added to the logits of each listed block, or None.
      listed: [B,K,M] float32, how many blocks a row lists without noise; where gates decide,
        with the gradient of their probabilities, and by mass with that of how many blocks the
        row's softmax is spread over.
      dropped: [B,K,M] int32, how many blocks a gate or cluster wanted and the budget left out.
      aux: scalar, to be weighted and added by the trainer; see `BlockRouter`.
    """

    routing: Routing
    bias: jax.Array | None
    listed: jax.Array
    dropped: jax.Array
    aux: jax.Array

    @property
    def table(self) -> BlockTable:
        """The blocks chosen."""
        return self.routing.choice


def block_features(config: BlockRouterConfig, x: jax.Array, keys: jax.Array) -> jax.Array:
    """What is pooled over each block's keys.

    A projection of pooled inputs is the pooled projection, so inputs are pooled first: cheaper.

    Args:
      config: the router.
      x: [B,T,D], the layer's input.
      keys: [B,T,K,H].

    Returns:
      [B,T,F]; F is D, K·H for kind 'pooled', and 0 for fixed patterns.

    >>> x, keys = jnp.ones((1, 4, 6)), jnp.ones((1, 4, 2, 8))
    >>> block_features(BlockRouterConfig(kind="pooled"), x, keys).shape
    (1, 4, 16)
    """
    if config.kind == "pooled":
        return jax.lax.stop_gradient(keys.reshape(*keys.shape[:2], -1))
    if config.kind in FIXED:
        return x[..., :0]
    return x if config.kind in ("learned", "clusters") else jax.lax.stop_gradient(x)


def with_weights(features: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Features that were added up, and behind them what they weigh where pooling is learned.

    Args:
      features: [...,F] float32, times their weights.
      weights: [...] float32, or None.

    >>> with_weights(jnp.ones((2, 3)), jnp.ones(2)).shape
    (2, 4)
    """
    if weights is None:
        return features
    return jnp.concatenate([features, weights[..., None]], axis=-1)


def means_of_sums(config: BlockRouterConfig, sums: jax.Array) -> jax.Array:
    """The means of complete blocks from what `with_weights` added up.

    Args:
      config: the router.
      sums: [B,J,F] float32.

    Returns:
      [B,J,F], or [B,J,F−1] where the last feature is what the others weigh; something finite of
      blocks that hold nothing.

    >>> sums = jnp.array([[[32.0, 64.0]]])
    >>> means_of_sums(BlockRouterConfig(block_kv=64), sums).tolist()
    [[[0.5, 1.0]]]
    >>> means_of_sums(BlockRouterConfig(block_kv=64, pooling="learned"), sums).tolist()
    [[[0.5]]]
    """
    if config.pooling == "mean":
        return sums / config.block_kv
    return means_of(sums[..., :-1], sums[..., -1])


def router_inputs(
    config: BlockRouterConfig,
    x: jax.Array,
    q: jax.Array,
    k: jax.Array,
    valid: jax.Array,
    segment_ids: jax.Array | None = None,
    weights: jax.Array | None = None,
) -> tuple[TileQueries, KeyBlocks, jax.Array]:
    """What a router reads of whole sequences: every tile's first query, every block's mean.

    Args:
      config: the router.
      x: [B,T,D], the layer's input.
      q: [B,T,N,H].
      k: [B,T,K,H].
      valid: [B,T] bool; other tokens are not pooled.
      segment_ids: [B,T] int32 or None.
      weights: [B,T] float32, of the tokens: `BlockRouter.weights`.

    Raises:
      ValueError: weights where pooling is not learned, or none where it is.

    Returns:
      (the tiles, the blocks, [B,J,F] float32, what each block's features add up to, and weigh).

    >>> x, heads = jnp.ones((1, 6, 3)), jnp.ones((1, 6, 1, 2))
    >>> config = BlockRouterConfig(block_q=2, block_kv=4)
    >>> tiles, blocks, _ = router_inputs(config, x, heads, heads, jnp.ones((1, 6), bool))
    >>> tiles.starts.tolist(), blocks.means.shape
    ([[0, 2, 4]], (1, 2, 3))
    """
    if (weights is None) != (config.pooling == "mean"):
        given = "not given" if weights is None else "given"
        raise ValueError(f"weights are {given}; blocks.pooling is {config.pooling!r}.")
    B, T = valid.shape
    num_blocks = -(-T // config.block_kv)
    features = block_features(config, x, k)
    sums, sizes = block_sums(features, valid, config.block_kv, segment_ids, weights)
    starts = jnp.arange(0, T, config.block_q, dtype=jnp.int32)[None]
    ends = jnp.minimum(jnp.arange(1, num_blocks + 1) * config.block_kv, T) - 1
    tiles = TileQueries(
        x[:, :: config.block_q],
        q[:, :: config.block_q],
        jnp.broadcast_to(starts, (B, starts.shape[1])),
        None if segment_ids is None else segment_ids[:, :: config.block_q],
    )
    blocks = KeyBlocks(
        means_of(sums, sizes),
        None if segment_ids is None else segment_ids[:, ends],
    )
    return tiles, blocks, with_weights(sums, None if weights is None else sizes)


def block_router_work(
    config: BlockRouterConfig,
    *,
    tokens: Any,
    tiles: Any,
    blocks: int,
    width: int,
    kv_heads: int,
    head_dim: int,
) -> Any:
    """Multiply-adds of a block router: pooling, projections, scores; of plain numbers a float.

    What training adds (noise, the map that an indexer is distilled from) is not counted.

    Args:
      config: the router.
      tokens: scalar, keys that are pooled.
      tiles: rows made, over the whole batch.
      blocks: key blocks of each sequence that are scored, J.
      width: D.
      kv_heads: K.
      head_dim: H.

    >>> config = BlockRouterConfig(kind="pooled")
    >>> work = dict(tokens=128, tiles=2, blocks=2, width=8, kv_heads=1, head_dim=4)
    >>> block_router_work(config, **work)  # 128·4 to pool, 2·2·4 to score
    528.0
    """
    # Floats from the start: over a batch of long sequences, int32 would wrap around.
    tokens, rows = 1.0 * tokens, 1.0 * tiles
    if config.kind in FIXED:
        return 0 * tokens
    scored = blocks
    if config.fanout:
        listed = config.capacity(blocks)
        scored = beam_scores(blocks, config.fanout, listed) + listed
    if config.feature_width is None:
        return (tokens + rows * scored) * (kv_heads * head_dim)
    per_row = (width + scored) * kv_heads * config.feature_width
    pooled = tokens * (2 if config.pooling == "learned" else 1)  # weighed, and added up
    # Every block is projected once, and its features are pooled again at each level of a tree.
    return (
        pooled * width
        + rows * per_row
        + tokens / config.block_kv * (width * kv_heads * config.feature_width)
    )


class _Weights(nn.Module):
    """What each token of x [B,T,D] weighs, [B,T] float32; parameter `direction`, 0 at first."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        direction = self.param("direction", nn.initializers.zeros, x.shape[-1:])
        return weights_along(x.astype(jnp.float32), direction)


class BlockRouter(nn.Module):
    """Scores key blocks for each tile and lists the best; parameters `query`, `key` (and `bias`).

    A window with gates has `bias` and `slope`: a head's gates close with log2 of the distance.
    Learned pooling has `pool`, which `weights` reads.

    `__call__(TileQueries, KeyBlocks, rng) -> BlockRouting`. With `rng`, gates and clusters are
    noisy, as in training. The auxiliary loss is minus the gates' mean entropy for budget 'gates'
    and, for clusters, how unevenly they are filled; 0 for all others. Where an indexer is distilled
    its divergence takes that place, from its layer, which has the queries and keys that it wants.
    """

    config: BlockRouterConfig
    num_kv_heads: int

    def setup(self):
        """Makes what weighs tokens, if they are weighed."""
        if self.config.pooling == "learned":
            self.pool = _Weights()

    def weights(self, x: jax.Array) -> jax.Array | None:
        """What each token of x [B,T,D] weighs in its block, [B,T] float32; None for all alike."""
        if self.config.pooling == "mean":
            return None
        return self.pool(jax.lax.stop_gradient(x) if self.config.kind == "indexer" else x)

    @nn.compact
    def __call__(
        self, tiles: TileQueries, blocks: KeyBlocks, rng: jax.Array | None = None
    ) -> BlockRouting:
        """Routes the tiles; see the class."""
        cfg = self.config
        num_blocks = blocks.means.shape[1]
        own = tiles.starts // cfg.block_kv
        allowed = competing_blocks(cfg, own, num_blocks)
        if tiles.segments is not None and blocks.segments is not None:
            same = tiles.segments[:, None, :, None] == blocks.segments[:, None, None]
            allowed &= same
        zero = jnp.float32(0)

        if cfg.kind in FIXED and not cfg.gated:
            room = row_limits(cfg, own, num_blocks)[:, 0] - jnp.minimum(cfg.forced, own + 1)
            number = tiles.starts // cfg.block_q
            scores = pattern_scores(cfg.kind, number, own - cfg.local, num_blocks, room)
            return self._select(tiles, allowed, scores, None, None, zero)

        if cfg.kind not in FIXED:
            queries, keys = self._features(tiles, blocks)
        if cfg.kind == "clusters":
            clusters = assign_clusters(queries, keys, rng, cfg.temperature)
            return self._select(
                tiles, allowed, clusters.scores, clusters.together, clusters.bias, clusters.aux
            )
        stride = 1.0 if cfg.kind == "learned" else _STRIDE
        bias = self._of_heads("bias", cfg.bias, stride) if cfg.gated else zero
        if cfg.fanout:
            return self._search(tiles, blocks, queries, keys, bias)
        if cfg.kind in FIXED:
            back = own[:, None, :, None] - jnp.arange(num_blocks)[None, None, None]
            scores = bias - self._of_heads("slope", _SLOPE, stride) * jnp.log2(jnp.maximum(back, 1))
        else:
            scores = dot_scores(queries, keys)
            if cfg.kind == "indexer" and cfg.gated:
                scores = against_even(scores, allowed)
            scores += bias
        gate = jax.nn.log_sigmoid(scores) if cfg.gated else None
        if cfg.budget != "gates":
            made = self._select(tiles, allowed, scores, None, gate, zero)
            if cfg.budget != "mass":
                return made
            soft = jnp.minimum(cfg.forced, own + 1)[:, None] + effective_number(scores, allowed)
            return made._replace(listed=straight_through(made.listed, soft))

        gates = binary_gate(scores, rng, cfg.temperature)
        some = jnp.broadcast_to(allowed, scores.shape)
        entropy = jnp.sum(jnp.where(some, binary_entropy(scores), 0)) / jnp.maximum(some.sum(), 1)
        made = self._select(tiles, allowed, scores, gates.choice, gate, -entropy)
        forced = jnp.minimum(cfg.forced, own + 1)[:, None]
        opens = forced + jnp.sum(some & (scores > 0), axis=-1)
        opens = jnp.minimum(opens, row_limits(cfg, own, num_blocks))
        soft = forced + jnp.sum(jnp.where(some, gates.probs, 0), axis=-1)
        return made._replace(listed=straight_through(opens, soft))

    def _of_heads(self, name: str, start: float, stride: float) -> jax.Array:
        """A number of each kv head, [1,K,1,1], `stride` times the parameter.

        The parameter's gradient is the number's: a longer one would only be clipped, and with it
        the whole model's.
        """
        init = nn.initializers.constant(start / stride)
        own = self.param(name, init, (self.num_kv_heads,))
        return (own + jax.lax.stop_gradient((stride - 1) * own))[None, :, None, None]

    def _features(self, tiles: TileQueries, blocks: KeyBlocks) -> tuple[jax.Array, jax.Array]:
        """Queries [B,M,K,R] and pooled keys [B,J,K,R], float32."""
        cfg, K, R = self.config, self.num_kv_heads, self.config.feature_width
        if R is None:
            q = jax.lax.stop_gradient(tiles.q.astype(jnp.float32))
            q = q.reshape(*q.shape[:2], K, -1, q.shape[-1]).mean(axis=3)
            return q, blocks.means.reshape(*blocks.means.shape[:2], K, -1)
        D = tiles.x.shape[-1]
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=(1, 2))
        query, key = (self.param(name, init, (D, K, R)) for name in ("query", "key"))
        x = tiles.x.astype(jnp.float32)
        if cfg.kind in ("indexer", "random"):
            x = jax.lax.stop_gradient(x)
        if cfg.kind == "random":
            query, key = jax.lax.stop_gradient((query, key))
        queries, keys = project_few(x, query), project_few(blocks.means, key)
        if cfg.kind == "clusters":
            return queries, keys
        # What a block holds says little of how near it is, and attention looks near first.
        places = jnp.arange(keys.shape[1], dtype=jnp.int32)[None]
        return apply_rope(queries, tiles.starts // cfg.block_kv), apply_rope(keys, places)

    def _select(self, tiles, allowed, scores, wanted, bias, aux) -> BlockRouting:
        """Rows from scores [B,K,M,J] of all blocks."""
        ranked = jnp.where(allowed, scores, -jnp.inf)
        table, dropped = select_blocks(self.config, ranked, tiles.starts, wanted)
        if bias is not None:
            bias = self._of_chosen(tiles, table, jnp.take_along_axis(bias, table.indices, axis=-1))
        if self.config.gated and self.config.kind != "clusters":
            probs = jax.nn.sigmoid(scores)
        else:
            probs = jnp.where(allowed, jax.nn.softmax(jnp.where(allowed, scores, -1e30)), 0.0)
        listed = table.counts.astype(jnp.float32)
        return BlockRouting(Routing(table, probs, scores), bias, listed, dropped, aux)

    def _search(self, tiles, blocks, queries, keys, bias) -> BlockRouting:
        """Rows from a search that scores few blocks."""
        cfg, num_blocks = self.config, keys.shape[1]
        own = tiles.starts // cfg.block_kv
        beam = cfg.capacity(num_blocks)
        with_stop = jax.lax.stop_gradient((queries, keys))  # the choice has no gradient
        found, scores = beam_search(*with_stop, own, fanout=cfg.fanout, beam=beam)
        if tiles.segments is not None and blocks.segments is not None:
            at = jnp.minimum(found, num_blocks - 1).reshape(found.shape[0], -1)
            theirs = jnp.take_along_axis(blocks.segments, at, axis=1).reshape(found.shape)
            scores = jnp.where(theirs == tiles.segments[:, None, :, None], scores, -jnp.inf)
        table, dropped = select_candidates(cfg, found, scores, tiles.starts, num_blocks)
        logits = score_listed(queries.swapaxes(1, 2), keys, table.indices) + bias
        gate = None
        if cfg.kind == "learned":
            gate = self._of_chosen(tiles, table, jax.nn.log_sigmoid(logits))
        routing = Routing(table, jax.nn.sigmoid(logits), logits)
        listed = table.counts.astype(jnp.float32)
        return BlockRouting(routing, gate, listed, dropped, jnp.float32(0))

    def _of_chosen(self, tiles: TileQueries, table: BlockTable, bias: jax.Array) -> jax.Array:
        """The bias of slots whose block was chosen: forced blocks and empty slots have none."""
        slots = jnp.arange(table.capacity, dtype=jnp.int32)[None, None, None]
        own = (tiles.starts // self.config.block_kv)[:, None, :, None]
        chosen = (table.indices >= self.config.sinks) & (table.indices < own - self.config.local)
        return jnp.where(chosen & (slots < table.counts[..., None]), bias, 0.0)
