"""Block routing: each tile of queries attends to the key blocks that its router lists.

The work is that of the listed blocks in every mode; nothing is computed to be masked away, so
'masked' is the same as 'eval'. Decoding keeps a tile's row until the next tile begins.
"""

import warnings
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from routing_jax.attention.cache import LayerCache, write_kv
from routing_jax.attention.mixer import LayerReport, Mode, attention_work, check_mode
from routing_jax.attention.per_shard import block_attention_over_batch_and_heads
from routing_jax.attention.projections import (
    HeadsConfig,
    make_attention_weights,
    project_keys_values,
    project_out,
    project_queries,
)
from routing_jax.kernels import (
    block_sparse_decode,
    contiguous_pages,
    dense_attention,
    listed_pages,
)
from routing_jax.kernels.block_table import visible_blocks
from routing_jax.kernels.padding import pad_axis
from routing_jax.routers import (
    BlockRouter,
    BlockRouterConfig,
    BlockRouting,
    KeyBlocks,
    TileQueries,
    block_divergence,
    block_features,
    block_router_work,
    competing_blocks,
    means_of_sums,
    pooled_attention,
    router_inputs,
    some_tiles,
    with_weights,
)


class BlockMemory(NamedTuple):
    """What a block-routed layer remembers beside keys and values.

    Attributes:
      sums: [B,J,F] float32, the router's features summed over each block so far, and what they
        weigh where pooling is learned.
      counts: [B,K] int32, how many blocks the current tile's row lists.
      blocks: [B,K,C] int32, which.
      bias: [B,K,C] float32, what is added to their logits.
    """

    sums: jax.Array
    counts: jax.Array
    blocks: jax.Array
    bias: jax.Array


def empty_block_memory(
    router: BlockRouterConfig, heads: HeadsConfig, batch: int, num_blocks: int, width: int
) -> BlockMemory:
    """The memory of sequences that have no token yet.

    Args:
      router: the layer's router.
      heads: head counts and sizes.
      batch: B.
      num_blocks: J, the most blocks a sequence may fill.
      width: D.

    >>> memory = empty_block_memory(BlockRouterConfig(), HeadsConfig(4, 2, 8), 3, 16, 32)
    >>> memory.sums.shape, memory.blocks.shape
    ((3, 16, 32), (3, 2, 4))
    """
    K, C = heads.num_kv_heads, router.capacity(num_blocks)
    x, keys = jnp.zeros((batch, num_blocks, width)), (batch, num_blocks, K, heads.head_dim)
    weights = jnp.zeros((batch, num_blocks)) if router.pooling == "learned" else None
    return BlockMemory(
        sums=with_weights(block_features(router, x, jnp.zeros(keys)), weights),
        counts=jnp.zeros((batch, K), jnp.int32),
        blocks=jnp.zeros((batch, K, C), jnp.int32),
        bias=jnp.zeros((batch, K, C)),
    )


def block_routed_cost(
    listed: jax.Array,
    visible: jax.Array,
    router_work: jax.Array,
    heads: HeadsConfig,
    tile_pairs: int,
) -> LayerReport:
    """Counts what a block-routed layer spends: whole tiles, as full attention would pay them.

    Args:
      listed: [B,K,M] float32, blocks that each row visits; 0 for a tile without queries.
      visible: [B,M] int32, blocks that full attention would visit.
      router_work: scalar, the router's multiply-adds.
      heads: head counts and sizes.
      tile_pairs: query–key pairs of one tile and block.

    Returns:
      The report without `choice`; usage is the share of the visible blocks that is visited.

    >>> listed, visible = jnp.array([[[1.0, 1.0]]]), jnp.array([[1, 2]])
    >>> report = block_routed_cost(listed, visible, jnp.float32(0), HeadsConfig(1, 1, 8), 64)
    >>> round(float(report.cost), 3)
    0.667
    """
    seen = jnp.maximum(visible.sum(), 1).astype(jnp.float32)
    share = listed.sum() / (listed.shape[1] * seen)
    dense = attention_work(seen * tile_pairs, heads.num_heads, heads.head_dim)
    return LayerReport(
        cost=share + router_work / dense,
        kv_cost=share * (heads.num_kv_heads / heads.num_heads),
        usage=share,
        aux=jnp.float32(0),
        choice=jnp.zeros((), bool),
    )


class BlockRouted(nn.Module):
    """Attention of each tile of queries to the blocks that a router lists for it.

    `__call__(x [B,T,D], positions [B,T], segment_ids [B,T] | None, cache, rng, mode)
    -> (y [B,T,D], cache, LayerReport)`. A request for 'intermediates' gets `head_usage` [K], the
    share of visible blocks that each kv head visits, and `dropped`, blocks a row that a gate or
    cluster wanted in vain.
    """

    heads: HeadsConfig
    router: BlockRouterConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        cache: LayerCache | None = None,
        rng: jax.Array | None = None,
        mode: Mode = "eval",
    ) -> tuple[jax.Array, LayerCache | None, LayerReport]:
        """Mixes the tokens of x [B,T,D]; see the class."""
        check_mode(mode)
        heads = self.heads
        weights = make_attention_weights(self, heads, x.shape[-1], x.dtype)
        q = project_queries(x, positions, weights, heads)
        k, v = project_keys_values(x, positions, weights, heads)
        if cache is not None:
            cache = write_kv(cache, k, v, positions)
        if mode == "decode":
            assert cache is not None  # the decoder refuses this mode without one
            y, cache, report = self._step(x, q, k, positions, cache)
        else:
            noise = rng if mode == "train" else None
            y, cache, report = self._whole(x, q, k, v, positions, segment_ids, cache, noise, mode)
        return project_out(y, weights), cache, report._replace(choice=positions >= 0)

    def _whole(self, x, q, k, v, positions, segment_ids, cache, noise, mode):
        cfg, T = self.router, positions.shape[1]
        # A token's place in its row says which keys it sees; positions may restart in a packed row.
        index = jnp.arange(T, dtype=jnp.int32)[None]
        places = jnp.where(positions >= 0, index, -1)
        num_blocks = -(-T // cfg.block_kv)
        # A prompt may be short, as its sequence grows; so may what has no block to choose.
        short = cfg.budget == "blocks" and cfg.blocks > num_blocks > cfg.forced
        if short and cache is None and not self.is_initializing():
            warnings.warn(
                f"blocks.blocks is {cfg.blocks}; {T} tokens are only {num_blocks} blocks of "
                f"{cfg.block_kv}: every row is dense.",
                stacklevel=2,
            )
        router = BlockRouter(cfg, self.heads.num_kv_heads, name="router")
        tiles, blocks, sums = router_inputs(
            cfg, x, q, k, positions >= 0, segment_ids, router.weights(x)
        )
        routing = router(tiles, blocks, noise)

        if cfg.is_dense(num_blocks) and routing.bias is None:
            implementation = self.heads.implementation
            y = dense_attention(q, k, v, segment_ids=segment_ids, implementation=implementation)
        else:
            y = block_attention_over_batch_and_heads(
                q, k, v, routing.table, routing.bias, places, segment_ids, cfg.implementation
            )
        visible = visible_blocks(routing.table, T, T, q_positions=places)
        report = self._report(routing, visible, jnp.sum(positions >= 0), num_blocks, x.shape[-1])
        if cfg.distil and mode == "train":
            some = some_tiles(tiles.starts.shape[1], cfg.distil, noise)
            target = pooled_attention(
                q,
                k,
                block_q=cfg.block_q,
                block_kv=cfg.block_kv,
                segment_ids=segment_ids,
                chosen=some,
            )
            open_ = competing_blocks(cfg, tiles.starts // cfg.block_kv, num_blocks)
            open_ &= (visible > 0)[:, None, :, None]
            logits = routing.routing.logits
            aux = block_divergence(logits[:, :, some], target, open_[:, :, some])
            report = report._replace(aux=aux)
        if cache is not None:
            last = jnp.maximum(places.max(axis=1), 0) // cfg.block_q
            row = _rows_at(routing, last, cache.memory)
            sums = pad_axis(sums, 1, cache.memory.sums.shape[1])
            cache = cache._replace(memory=row._replace(sums=sums))
        return y, cache, report

    def _step(self, x, q, k, positions, cache):
        cfg, place = self.router, positions[:, 0]
        memory: BlockMemory = cache.memory
        B, num_blocks = memory.sums.shape[:2]
        live = place >= 0
        block = jnp.where(live, place // cfg.block_kv, num_blocks)
        router = BlockRouter(cfg, self.heads.num_kv_heads, parent=None)
        params = self.variables["params"].get("router", {})
        features = block_features(cfg, x, k)[:, 0].astype(jnp.float32)
        if cfg.pooling == "learned":
            weights: Any = router.apply({"params": params}, x, method="weights")
            features = with_weights(features * weights, weights[:, 0])
        sums = memory.sums.at[jnp.arange(B), block].add(features, mode="drop")
        memory = memory._replace(sums=sums)
        begins = live & (place % cfg.block_q == 0)

        def reroute() -> BlockMemory:
            # Only blocks that were complete before count, so that a mean divides by their size.
            starts = jnp.maximum(place, 0)[:, None]
            blocks = KeyBlocks(means_of_sums(cfg, sums))
            routing: Any = router.apply({"params": params}, TileQueries(x, q, starts), blocks)
            row = _rows_at(routing, jnp.zeros(B, jnp.int32), memory)
            return jax.tree.map(
                lambda new, old: jnp.where(begins.reshape(-1, *[1] * (new.ndim - 1)), new, old),
                row,
                memory,
            )

        memory = jax.lax.cond(jnp.any(begins), reroute, lambda: memory)

        def pool(cached):
            return cached.reshape(-1, cfg.block_kv, *cached.shape[2:]).astype(q.dtype)

        y = block_sparse_decode(
            q,
            pool(cache.keys),
            pool(cache.values),
            listed_pages(contiguous_pages(B, num_blocks), memory.counts, memory.blocks),
            place + 1,
            block_bias=memory.bias if cfg.gated else None,
        )
        listed = jnp.where(live[:, None], memory.counts, 0).astype(jnp.float32)[..., None]
        visible = jnp.where(live, place // cfg.block_kv + 1, 0)[:, None]
        work = self._work(live.sum(), begins.sum(), num_blocks, x.shape[-1])
        report = block_routed_cost(listed, visible, work, self.heads, cfg.block_kv)
        return y, cache._replace(memory=memory), report

    def _work(self, tokens, tiles, num_blocks: int, width: int) -> jax.Array:
        return block_router_work(
            self.router,
            tokens=tokens,
            tiles=tiles,
            blocks=num_blocks,
            width=width,
            kv_heads=self.heads.num_kv_heads,
            head_dim=self.heads.head_dim,
        )

    def _report(
        self, routing: BlockRouting, visible, tokens, num_blocks: int, width: int
    ) -> LayerReport:
        cfg, (B, M) = self.router, visible.shape
        live = (visible > 0)[:, None]
        shape = B, self.heads.num_kv_heads, M
        listed = jnp.broadcast_to(jnp.where(live, routing.listed, 0), shape)
        work = self._work(tokens, jnp.sum(visible > 0), num_blocks, width)
        report = block_routed_cost(listed, visible, work, self.heads, cfg.block_q * cfg.block_kv)
        share = listed.sum(axis=(0, 2)) / jnp.maximum(visible.sum(), 1)
        self.sow("intermediates", "head_usage", share)
        rows = jnp.maximum(jnp.sum(live), 1)
        self.sow("intermediates", "dropped", jnp.where(live, routing.dropped, 0).sum() / rows)
        return report._replace(aux=routing.aux)


def _rows_at(routing: BlockRouting, tile: jax.Array, memory: BlockMemory) -> BlockMemory:
    """The rows of one tile a sequence, in a memory's shapes; its sums stay.

    Args:
      routing: rows of M tiles.
      tile: [B] int32, which of them.
      memory: for its shapes.
    """
    (B, K), C = memory.counts.shape, memory.blocks.shape[-1]
    table = routing.table
    M = table.num_tiles
    at = tile[:, None, None]

    def of_tile(rows):  # [b,k,M,c] -> [B,K,C]
        rows = jnp.broadcast_to(rows, (B, K, M, rows.shape[-1]))
        row = jnp.take_along_axis(rows, at[..., None], axis=2)[:, :, 0]
        return pad_axis(row[..., :C], 2, C)

    counts = jnp.broadcast_to(table.counts, (B, K, M))
    bias = memory.bias if routing.bias is None else of_tile(routing.bias)
    return memory._replace(
        counts=jnp.take_along_axis(counts, at, axis=2)[..., 0],
        blocks=of_tile(table.indices),
        bias=bias,
    )
