"""Layer routing: each sequence attends fully or sparsely in this layer, by what its prompt says.

Flux Attention (arXiv 2604.07394). One call over one block table serves the batch: a sequence's rows
are dense or sparse. Training makes a second one, of what was not chosen, for the gradient of its
straight-through gate. Prefill decides, decoding obeys. A prompt so short that sparse attention
would see all of it is routed to full attention, whatever its router says: nothing could be saved
on reading it. A choice that is given is obeyed even then, and holds for what follows the prompt.

Rows of the table are those of tiles. Where tokens after the prompt search each for itself, they are
gathered and attend by rows of their own, so that one pass gives what decoding gives.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from routing_jax.attention.block_routed import block_routed_cost
from routing_jax.attention.cache import LayerCache, write_kv
from routing_jax.attention.mixer import LayerReport, Mode, check_mode
from routing_jax.attention.page_search import near_pages, search_pages
from routing_jax.attention.per_shard import block_attention_over_batch_and_heads
from routing_jax.attention.projections import (
    HeadsConfig,
    make_attention_weights,
    project_keys_values,
    project_out,
    project_queries,
    turn,
)
from routing_jax.attention.searched_answers import search_alone
from routing_jax.kernels import (
    ATTENTION,
    block_sparse_decode,
    contiguous_pages,
    decode_attention,
    dense_pages,
    row_lengths,
    where_pages,
)
from routing_jax.kernels.block_table import visible_blocks
from routing_jax.kernels.padding import pad_axis
from routing_jax.routers import (
    LayerRouter,
    LayerRouterConfig,
    SparseModeConfig,
    binary_entropy,
    layer_table,
    search_keys,
    search_scores,
)


class Prompts(NamedTuple):
    """What layer routers are told of a batch besides its tokens.

    Attributes:
      lengths: [B] int32, tokens of each prompt, by which all is decided; what follows is the
        answer.
      temperature: scalar, of the soft gates in training.
      choice: [L,B] bool, one row of it in a layer: True for full attention, decided elsewhere and
        obeyed however short the prompt. None leaves it to the routers.
    """

    lengths: jax.Array
    temperature: jax.Array | float = 1.0
    choice: jax.Array | None = None


class LayerMemory(NamedTuple):
    """What a layer-routed layer remembers beside keys and values.

    Attributes:
      dense: [B] bool, the sequences that attend fully.
    """

    dense: jax.Array


def layer_routed_cost(
    gate: jax.Array,
    full: jax.Array,
    sparse: jax.Array,
    visible: jax.Array,
    router_work: jax.Array,
    heads: HeadsConfig,
    tile_pairs: int,
) -> LayerReport:
    """Counts what a layer-routed layer spends: whole tiles, as full attention would pay them.

    Args:
      gate: [B] float32, 1 for full attention; its gradient is that of the costs.
      full: [B,K,M], blocks that each row visits where the gate is 1; B and K may be 1. 0 for a
        tile without queries, a fraction for one of which only some queries visit blocks.
      sparse: the same where the gate is 0.
      visible: [B,M] int32, all blocks that a row could visit.
      router_work: scalar, the router's multiply-adds.
      heads: head counts and sizes.
      tile_pairs: query–key pairs of one tile and block.

    Returns:
      The report without `choice`; usage is the share of sequences that attend fully.

    >>> gate, full, sparse = jnp.array([1.0, 0.0]), jnp.array([[[2]]]), jnp.array([[[1]]])
    >>> visible, heads = jnp.array([[2], [2]]), HeadsConfig(1, 1, 8)
    >>> report = layer_routed_cost(gate, full, sparse, visible, 0.0, heads, 64)
    >>> float(report.cost), float(report.usage)
    (0.75, 0.5)
    """
    open_ = gate[:, None, None]
    visits = sparse + open_ * (full - sparse)
    shape = len(gate), heads.num_kv_heads, visible.shape[1]
    report = block_routed_cost(
        jnp.broadcast_to(visits, shape), visible, router_work, heads, tile_pairs
    )
    return report._replace(usage=jnp.mean(gate))


def gated(taken: jax.Array, other: jax.Array, choice: jax.Array, gate: jax.Array) -> jax.Array:
    """The branch that was taken, with the gradient of gate·full + (1 − gate)·sparse.

    A gate is 0 or 1, so the other branch has no gradient of its own: that pass is not made. The
    gate's is a small difference of two large sums, so it is formed from the branches' difference,
    in float32: of two 16-bit sums little but rounding would be left.

    Args:
      taken: [B,T,N,H], full attention where `choice` says so.
      other: [B,T,N,H], the other one; only its value is read.
      choice: [B] bool.
      gate: [B] float32, `choice` with the gradient of the router's probability.

    >>> def y(gate, taken, other):
    ...     return gated(taken, other, jnp.array([False]), gate).sum()
    >>> ones = jnp.ones((1, 1, 1, 1))
    >>> [g.item() for g in jax.grad(y, (0, 1, 2))(jnp.zeros(1), ones, 3 * ones)]
    [2.0, 1.0, 0.0]
    """
    chosen = choice[:, None, None, None]
    more = jnp.where(chosen, taken - other, other - taken)
    more = checkpoint_name(jax.lax.stop_gradient(more), ATTENTION)
    nothing = (gate - jax.lax.stop_gradient(gate))[:, None, None, None]
    return taken + (nothing * more.astype(jnp.float32)).astype(taken.dtype)


class LayerRouted(nn.Module):
    """Full or sparse attention, sequence by sequence.

    `__call__(x [B,T,D], positions [B,T], segment_ids, cache, rng, mode, prompts)
    -> (y [B,T,D], cache, LayerReport)`. Without `prompts` all tokens given are the prompt. A
    request for 'intermediates' gets `gate` [B], 1 for full attention, with the straight-through
    gradient.
    """

    heads: HeadsConfig
    router: LayerRouterConfig
    sparse: SparseModeConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        cache: LayerCache | None = None,
        rng: jax.Array | None = None,
        mode: Mode = "eval",
        prompts: Prompts | None = None,
    ) -> tuple[jax.Array, LayerCache | None, LayerReport]:
        """Mixes the tokens of x [B,T,D]; see the class.

        Raises:
          ValueError: packed sequences, which have no prompt of their own.
        """
        check_mode(mode)
        if segment_ids is not None:
            raise ValueError("segment_ids are given; layer routing takes one sequence a row.")
        weights = make_attention_weights(self, self.heads, x.shape[-1], x.dtype)
        unturned = project_queries(x, None, weights, self.heads)
        q = turn(unturned, positions, self.heads)
        k, v = project_keys_values(x, positions, weights, self.heads)
        if cache is not None:
            cache = write_kv(cache, k, v, positions)
        if mode == "decode":
            assert cache is not None  # the decoder refuses this mode without one
            y, report = self._step(q, positions, cache)
            return project_out(y, weights), cache, report

        if prompts is None:
            prompts = Prompts(jnp.sum(positions >= 0, axis=1, dtype=jnp.int32))
        routing = LayerRouter(self.router, name="router")(
            # What a layer does to its input is no way for the layers below to be taught.
            jax.lax.stop_gradient(unturned),
            prompts.lengths,
            rng if mode == "train" else None,
            prompts.temperature,
        )
        choice, gate = routing.routing.choice, routing.gate
        if prompts.choice is not None:
            choice, gate = prompts.choice, prompts.choice.astype(jnp.float32)
        elif mode != "train":
            short = prompts.lengths <= self.sparse.reach
            choice, gate = choice | short, jnp.where(short, 1.0, gate)
        routing = routing._replace(routing=routing.routing._replace(choice=choice), gate=gate)
        self.sow("intermediates", "gate", routing.gate)
        y, report = self._whole(q, k, v, positions, prompts.lengths, routing, mode)
        if cache is not None:
            cache = cache._replace(memory=LayerMemory(routing.routing.choice))
        return project_out(y, weights), cache, report

    def _whole(self, q, k, v, positions, lengths, routing, mode):
        cfg, T = self.sparse, positions.shape[1]
        starts = jnp.arange(0, T, cfg.block_q, dtype=jnp.int32)[None]
        answers = positions >= lengths[:, None]
        narrow = scores = None
        if cfg.searches:
            narrow, pages = search_keys(cfg, k), contiguous_pages(len(k), -(-T // cfg.block_kv))
            scores = search_scores(cfg, q[:, :: cfg.block_q], narrow, pages, starts)

        def attend(dense, q, k, v):
            y = block_attention_over_batch_and_heads(
                q,
                k,
                v,
                layer_table(cfg, dense, starts, lengths, scores),
                None,
                positions,
                None,
                cfg.implementation,
            )
            if cfg.answers == "full":
                return y
            assert narrow is not None  # such answers are searched for
            return search_alone(cfg, y, q, k, v, narrow, dense, answers, lengths)

        choice, gate = routing.routing.choice, routing.gate
        if mode == "masked":
            full, sparse = (
                attend(jnp.full_like(choice, dense), q, k, v) for dense in (True, False)
            )
            y = jnp.where(choice[:, None, None, None], full, sparse)
        else:
            y = attend(choice, q, k, v)
        if mode == "train":
            y = gated(y, attend(~choice, *jax.lax.stop_gradient((q, k, v))), choice, gate)
        full, sparse = (
            layer_table(cfg, jnp.full_like(choice, dense), starts, lengths, scores)
            for dense in (True, False)
        )
        report = layer_routed_cost(
            gate,
            self._visits(full, jnp.full_like(choice, True), positions, answers),
            self._visits(sparse, jnp.full_like(choice, False), positions, answers),
            visible_blocks(sparse, T, T, q_positions=positions),
            jnp.float32(len(gate) * self._work(T)) + self._work_alone(choice, positions, answers),
            self.heads,
            cfg.block_q * cfg.block_kv,
        )
        return (
            y,
            report._replace(
                aux=-jnp.mean(binary_entropy(routing.routing.logits)),
                choice=choice[:, None] & (positions >= 0),
            ),
        )

    def _visits(self, table, dense, positions, answers):
        """[B,K,M], blocks that each row visits, tokens that search each for itself by their own.

        What their tiles attend to in one pass, and is written over, prefill and decoding never do.
        """
        cfg, T = self.sparse, positions.shape[1]
        alone = cfg.searched_after(dense)[:, None] & answers
        of_tiles = row_lengths(table, T, T, q_positions=jnp.where(alone, -1, positions))
        found = jnp.minimum(positions // cfg.block_kv + 1, table.capacity)
        found = pad_axis(jnp.where(alone, found, 0), 1, table.num_tiles * cfg.block_q)
        found = found.reshape(len(found), 1, -1, cfg.block_q).sum(axis=3)
        return of_tiles + found / cfg.block_q

    def _work_alone(self, choice, positions, answers):
        """Multiply-adds of the searches that tokens after the prompt make, each for itself."""
        cfg = self.sparse
        alone = cfg.searched_after(choice)[:, None] & answers
        seen = jnp.where(alone, positions // cfg.block_kv + 1, 0)
        return jnp.sum(seen, dtype=jnp.float32) * self._weighing()

    def _work(self, num_tokens: int) -> int:
        """Multiply-adds of the decisions for one sequence: the router's, and those of tiles."""
        cfg, heads = self.sparse, self.heads
        work = self.router.work(heads.num_heads, heads.head_dim)
        if cfg.searches:
            tiles, blocks = (-(-num_tokens // size) for size in (cfg.block_q, cfg.block_kv))
            work += tiles * blocks * self._weighing()
        return work

    def _weighing(self) -> int:
        """Multiply-adds of what one query does to one block of a search."""
        cfg, heads = self.sparse, self.heads
        return cfg.block_kv * heads.num_heads * cfg.channels_of(heads.head_dim)

    def _step(self, q, positions, cache):
        cfg, heads, length = self.sparse, self.heads, positions[:, 0] + 1
        dense = cache.memory.dense
        B, S = cache.keys.shape[:2]
        J = S // cfg.block_kv
        visible = -(-length // cfg.block_kv)
        searches = cfg.searched_after(dense)
        work = jnp.float32(0)
        if cfg.rereads and not cfg.forgets and cfg.answers == "full":  # they all do
            y = decode_attention(q, cache.keys, cache.values, length)
            listed = visible[:, None]
        else:
            table = contiguous_pages(B, J)
            pages = near_pages(table, length, jnp.ones_like(dense), cfg)
            if cfg.answers == "topk":
                narrow = search_keys(cfg, cache.keys.astype(q.dtype))
                pages = search_pages(pages, table, q[:, 0], narrow, length, searches, cfg)
                work = jnp.sum(jnp.where(searches, visible, 0)) * jnp.float32(self._weighing())
            if cfg.rereads:
                everywhere = (dense | (not cfg.forgets)) & ~searches
                everything = dense_pages(table, length, cfg.block_kv)
                pages = where_pages(everywhere, everything, pages)

            def pool_of(cached):
                return cached.reshape(-1, cfg.block_kv, *cached.shape[2:]).astype(q.dtype)

            found = block_sparse_decode(
                q, pool_of(cache.keys), pool_of(cache.values), pages, length
            )
            assert isinstance(found, jax.Array)  # no log-sum-exp was asked for
            y, listed = found, pages.counts
        report = layer_routed_cost(
            dense.astype(jnp.float32),
            listed[..., None],
            listed[..., None],
            visible[:, None],
            work,
            heads,
            cfg.block_kv,
        )
        return y, report._replace(choice=dense[:, None] & (positions >= 0))
