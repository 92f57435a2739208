"""From scores of blocks to rows of a table: what each row has room for, and what it lists."""

import jax
import jax.numpy as jnp
import numpy as np

from routing_jax.kernels import Selection, table_from_blocks, table_from_scores
from routing_jax.routers.block_config import BlockRouterConfig


def competing_blocks(config: BlockRouterConfig, own: jax.Array, num_blocks: int) -> jax.Array:
    """The blocks that a router chooses among: before the tile's own and local ones, and no sink.

    Args:
      config: the router.
      own: [B,M] int32, the block that each tile stands in.
      num_blocks: J.

    Returns:
      [B,1,M,J] bool.

    >>> competing_blocks(BlockRouterConfig(sinks=1), jnp.array([[3]]), 5)[0, 0, 0].tolist()
    [False, True, True, False, False]
    """
    blocks = jnp.arange(num_blocks, dtype=jnp.int32)[None, None, None]
    return (blocks >= config.sinks) & (blocks < own[:, None, :, None] - config.local)


def row_limits(
    config: BlockRouterConfig, own: jax.Array, num_blocks: int, scores: jax.Array | None = None
) -> jax.Array:
    """The most blocks that each row lists. It depends on what the row sees, not on the length.

    Args:
      config: the router.
      own: [B,M] int32, the block that each tile stands in.
      num_blocks: J.
      scores: [B,K,M,J] float32, −inf where a block may not be chosen; for budget 'mass' only.

    Returns:
      [B,1,M] int32 ([B,K,M] for budget 'mass').

    >>> config = BlockRouterConfig(fraction=0.25, sinks=0)
    >>> row_limits(config, jnp.arange(8)[None], 8).tolist()
    [[[1, 1, 1, 1, 1, 2, 2, 2]]]
    """
    seen = np.arange(1, num_blocks + 1)
    most = np.full_like(seen, config.blocks)
    if config.budget != "blocks":
        most = np.floor(config.fraction * seen + 0.5).astype(seen.dtype)
    forced = np.minimum(config.forced, seen)
    limits = jnp.asarray(np.maximum(most, forced), jnp.int32)[own][:, None]
    if config.budget != "mass" or scores is None:
        return limits
    competing = competing_blocks(config, own, num_blocks) & (scores > -jnp.inf)
    probs = jax.nn.softmax(jnp.where(competing, scores, -1e30), axis=-1)
    probs = -jnp.sort(-jnp.where(competing, probs, 0.0), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    needed = jnp.sum((before < config.mass) & (probs > 0), axis=-1, dtype=jnp.int32)
    return jnp.minimum(limits, needed + jnp.asarray(forced, jnp.int32)[own][:, None])


def select_blocks(
    config: BlockRouterConfig,
    scores: jax.Array,
    starts: jax.Array,
    wanted: jax.Array | None = None,
) -> Selection:
    """The own block, the local ones and the sinks, then the best others within the budget.

    Args:
      config: the router.
      scores: [B,K,M,J] float32, −inf where a block may not be chosen.
      starts: [B,M] int32, where each tile's first query stands.
      wanted: [B,K,M,J] bool, or None: no other block is listed.

    >>> config = BlockRouterConfig(block_q=8, block_kv=8, sinks=1, budget="blocks", blocks=3)
    >>> scores = jnp.array([[[[0.0, 5, 7, 6, 9, 9]]]])
    >>> select_blocks(config, scores, jnp.array([[32]])).table.indices.tolist()
    [[[[0, 2, 4]]]]
    """
    num_blocks = scores.shape[-1]
    return table_from_scores(
        scores,
        config.capacity(num_blocks),
        block_q=config.block_q,
        block_kv=config.block_kv,
        sinks=config.sinks,
        local=config.local,
        wanted=wanted,
        row_limits=row_limits(config, starts // config.block_kv, num_blocks, scores),
        tile_starts=starts,
    )


def select_candidates(
    config: BlockRouterConfig,
    blocks: jax.Array,
    scores: jax.Array,
    starts: jax.Array,
    num_blocks: int,
) -> Selection:
    """As `select_blocks`, among a few candidates of each row instead of all blocks.

    Args:
      config: the router.
      blocks: [B,K,M,X] int32, distinct where their score is finite.
      scores: [B,K,M,X] float32, −inf for what is no candidate.
      starts: [B,M] int32, where each tile's first query stands.
      num_blocks: J.

    >>> config = BlockRouterConfig(block_q=8, block_kv=8, sinks=1, budget="blocks", blocks=3)
    >>> blocks, scores = jnp.array([[[[2, 1]]]]), jnp.array([[[[7.0, 5.0]]]])
    >>> select_candidates(config, blocks, scores, jnp.array([[32]]), 6).table.indices.tolist()
    [[[[0, 2, 4]]]]
    """
    own = starts // config.block_kv
    back, sinks = (
        jnp.arange(n, dtype=jnp.int32)[None, None, None] for n in (1 + config.local, config.sinks)
    )
    own_and_local = own[:, None, :, None] - back
    first = own_and_local[..., -1:]
    competes = (blocks >= config.sinks) & (blocks < first)
    rank = jnp.where(competes, jax.lax.stop_gradient(scores), -jnp.inf)
    # A sink among the local ones counts once.
    always = jnp.concatenate([own_and_local >= 0, sinks < first], axis=-1)
    forced = jnp.concatenate([own_and_local, sinks + jnp.zeros_like(first)], axis=-1)
    shape = *blocks.shape[:3], config.forced
    ranks = jnp.where(always, jnp.inf, -jnp.inf)
    rank = jnp.concatenate([jnp.broadcast_to(ranks, shape), rank], axis=-1)
    blocks = jnp.concatenate([jnp.broadcast_to(forced, shape), blocks], axis=-1)
    best, chosen = jax.lax.top_k(rank, min(config.capacity(num_blocks), blocks.shape[-1]))
    slots = jnp.arange(best.shape[-1], dtype=jnp.int32)[None, None, None]
    limits = row_limits(config, own, num_blocks)
    listed = (best == jnp.inf) | ((best > -jnp.inf) & (slots < limits[..., None]))
    table = table_from_blocks(
        jnp.take_along_axis(blocks, chosen, axis=-1),
        listed,
        block_q=config.block_q,
        block_kv=config.block_kv,
    )
    return Selection(table, jnp.zeros_like(table.counts))
