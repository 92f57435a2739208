"""Mixture of Attention Schemes: each token weighs, or takes, one of MHA, GQA and MQA.

MoAS (arXiv 2512.20650): y = Σ_e g_e·Attention_e(x), with g from a router on the token. As published
the gates are soft and each scheme has its own projections. Here a token may also take one scheme
alone, and the schemes may share one set of projections, nested in each other (`nested_heads`).
Training computes all schemes; evaluation and prefill compute the one that a token takes, but all
where the batch is so small that this is faster; decode reads no more of the cache than that one
needs. Keys and values are made for every token.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from routing_jax.attention.cache import LayerCache, write_kv
from routing_jax.attention.chosen_queries import attend_chosen
from routing_jax.attention.mixer import LayerReport, Mode, attention_work, check_mode, visible_pairs
from routing_jax.attention.nested_heads import (
    absorb_queries,
    head_basis,
    heads_from,
    release_values,
)
from routing_jax.attention.per_shard import over_batch_and_heads
from routing_jax.attention.projections import (
    AttentionWeights,
    HeadsConfig,
    attend_everywhere,
    make_attention_weights,
    project_keys_values,
    project_out,
    project_queries,
)
from routing_jax.kernels import decode_head_runs, map_routed
from routing_jax.routers import (
    Routing,
    SchemeRouter,
    SchemeRouting,
    SchemesConfig,
    balance_loss,
    largest,
    straight_through,
)

# Query–key pairs of a batch, B·T², from which skipping pays. It waits for the host once a scheme:
# with 12 × 256 tokens, 0.8 million pairs, a layer took an H100 0.14 to 0.23 ms longer than all
# schemes did, and all schemes 0.07 ms longer than attention alone.
_SKIPS_FROM = 2**22


class SchemeHeads(NamedTuple):
    """Where the heads of each scheme stand among those that are projected and stored.

    Attributes:
      kv_heads: key/value heads of each scheme.
      projected: all query and key/value heads of the layer, those of one scheme after another's;
        nested, those of the dearest scheme, its keys and values as vectors of the basis.
      basis: of nested key/value heads, [K,K], or None.
    """

    kv_heads: tuple[int, ...]
    projected: HeadsConfig
    basis: np.ndarray | None

    def queries(self, q: jax.Array, scheme: int) -> jax.Array:
        """The scheme's part [...,N,H] of all query heads [...,H]."""
        if self.basis is not None:
            return q
        N = self.projected.num_heads // len(self.kv_heads)
        return q[..., scheme * N : (scheme + 1) * N, :]

    def keys(self, k: jax.Array, scheme: int) -> jax.Array:
        """The scheme's key (or value) heads [B,S,K,H] among all that were projected."""
        count = self.kv_heads[scheme]
        if self.basis is not None:
            return heads_from(k, self.basis, count)
        start = sum(self.kv_heads[:scheme])
        return k[:, :, start : start + count]

    def spread(self, x: jax.Array) -> jax.Array:
        """Key (or value) heads [B,S,E·N,H] for each query head of each scheme, from all of x."""
        E, N = len(self.kv_heads), self.projected.num_heads
        x = x.swapaxes(1, 2)  # as attention wants them: turned once, not part by part
        if self.basis is not None:
            K = len(self.basis)
            makes = np.zeros((K, E * N), np.float32)
            for e, count in enumerate(self.kv_heads):
                each = np.repeat(self.basis[:count, :: K // count], N // count, axis=1)
                makes[:count, e * N : (e + 1) * N] = each
            # A sum, not a product: of matrices this thin it is several kernels a scheme.
            made = jnp.sum(x[:, :, None] * makes[None, :, :, None, None], axis=1)
            return made.astype(x.dtype).swapaxes(1, 2)
        starts = itertools.accumulate(self.kv_heads, initial=0)
        parts = [
            jnp.repeat(x[:, start : start + count], N // E // count, axis=1)
            for start, count in zip(starts, self.kv_heads)
        ]
        return jnp.concatenate(parts, axis=1).swapaxes(1, 2)

    def weights(self, weights: AttentionWeights, scheme: int) -> AttentionWeights:
        """The projections whose queries and outputs are the scheme's."""
        out = jnp.moveaxis(self.queries(jnp.moveaxis(weights.out, 0, -2), scheme), -2, 0)
        bias = weights.query_bias
        return weights._replace(
            query=self.queries(weights.query, scheme),
            query_bias=None if bias is None else self.queries(bias, scheme),
            out=out,
        )


def scheme_heads(heads: HeadsConfig, schemes: SchemesConfig) -> SchemeHeads:
    """The layer's heads.

    Args:
      heads: N and H of each scheme.
      schemes: which there are.

    Raises:
      ValueError: as `SchemesConfig.kv_heads`.

    >>> scheme_heads(HeadsConfig(6, 6, 64), SchemesConfig()).projected.num_kv_heads
    9
    >>> scheme_heads(HeadsConfig(6, 6, 64), SchemesConfig(nested=True)).projected.num_kv_heads
    6
    """
    counts = schemes.kv_heads(heads.num_heads)
    copies, stored = (1, max(counts)) if schemes.nested else (len(counts), sum(counts))
    projected = dataclasses.replace(heads, num_heads=copies * heads.num_heads, num_kv_heads=stored)
    return SchemeHeads(counts, projected, head_basis(counts) if schemes.nested else None)


def mix_schemes(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gates: jax.Array,
    segment_ids: jax.Array | None,
    heads: SchemeHeads,
    rng: jax.Array | None,
) -> jax.Array:
    """All schemes for all tokens, in one attention call, each multiplied by its gate.

    Args:
      q: [B,T,·,H], as projected.
      k: [B,T,·,H].
      v: [B,T,·,H].
      gates: [B,T,E].
      segment_ids: [B,T] int32 or None.
      heads: the layer's heads.
      rng: the layer's PRNG key in training, else None.

    Returns:
      [B,T,·,H], for the output projection.

    >>> heads = scheme_heads(HeadsConfig(2, 2, 4), SchemesConfig("mha,mqa", nested=True))
    >>> q, gates = jnp.ones((1, 3, 2, 4)), jnp.full((1, 3, 2), 0.5)
    >>> mix_schemes(q, q, q, gates, None, heads, None).shape
    (1, 3, 2, 4)
    """
    E = len(heads.kv_heads)
    B, T, N, H = q.shape
    if heads.basis is not None:
        q, N = jnp.tile(q, (1, 1, E, 1)), E * N

    y = attend_everywhere(q, heads.spread(k), heads.spread(v), segment_ids, heads.projected, rng)
    y = y.reshape(B, T, E, N // E, H) * gates[:, :, :, None, None].astype(y.dtype)
    return y.sum(2) if heads.basis is not None else y.reshape(B, T, N, H)


def _ladder(length: int) -> tuple[int, ...]:
    # To T/2, unlike capacity_ladder: the schemes' shares sum to one, so one at most is larger.
    steps = {length * n // 32 for n in (4, 8, 12, 16)}
    return (0, *sorted(steps - {0}), length)


def attend_by_scheme(
    x: jax.Array,
    positions: jax.Array,
    choice: jax.Array,
    segment_ids: jax.Array | None,
    weights: AttentionWeights,
    heads: SchemeHeads,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """For each token the one scheme it takes: query, attention and output projection.

    Args:
      x: [B,T,D], all tokens; keys and values are made from them all.
      positions: [B,T] int32, rising within a segment; −1 for padding at the end.
      choice: [B,T] int32, the scheme taken; −1 for none.
      segment_ids: [B,T] int32 or None.
      weights: the projections.
      heads: the layer's heads.

    Returns:
      ([B,T,D], 0 where none is taken; (keys, values) [B,T,·,H] as projected).

    >>> heads = scheme_heads(HeadsConfig(1, 1, 2), SchemesConfig("mha"))
    >>> into, x = jnp.ones((2, 1, 2)), jnp.ones((1, 3, 2))
    >>> weights = AttentionWeights(into, into, into, into.transpose(1, 2, 0))
    >>> positions, choice = jnp.arange(3)[None], jnp.array([[0, -1, 0]])
    >>> y, _ = attend_by_scheme(x, positions, choice, None, weights, heads)
    >>> y[0, :, 0].round(3).tolist()
    [4.0, 0.0, 4.0]
    """

    def local(x, positions, choice, segment_ids, y, weights, total: Callable):
        k, v = project_keys_values(x, positions, weights, heads.projected)
        for e in range(len(heads.kv_heads)):
            kv = heads.keys(k, e), heads.keys(v, e)
            own = heads.weights(weights, e)

            def attend(x, q_positions, kv=kv, own=own):
                return attend_chosen(
                    x, q_positions, positions, kv, segment_ids, own, heads.projected
                )

            y = map_routed(attend, x, choice == e, y, _ladder(x.shape[1]))
        return y, (k, v)

    # A basis of heads, and a scheme's part of them, want all heads in one place.
    return over_batch_and_heads(
        local,
        x,
        positions,
        choice,
        segment_ids,
        jnp.zeros_like(x),
        weights,
        heads.projected,
        split_heads=False,
    )


def decode_schemes(
    q: jax.Array, cache: LayerCache, positions: jax.Array, gates: jax.Array, heads: SchemeHeads
) -> jax.Array:
    """Attention of one query a sequence, reading for each scheme what it needs of the cache.

    Where a kernel reads the cache (`decode_head_runs`), a sequence reads what its own schemes need,
    and all schemes are one call; nested ones, which lay the same vectors out differently, are one
    each. Elsewhere a scheme that no sequence gives weight is not computed and not read.

    Args:
      q: [B,1,·,H], as projected.
      cache: keys and values [B,S,·,H], as projected.
      positions: [B,1] int32; −1 gives 0.
      gates: [B,1,E]; where 0, a sequence does not take the scheme.
      heads: the layer's heads.

    Returns:
      [B,1,·,H], for the output projection.

    >>> heads = scheme_heads(HeadsConfig(2, 2, 4), SchemesConfig("mha,mqa"))
    >>> cache = LayerCache(jnp.ones((1, 8, 3, 4)), jnp.ones((1, 8, 3, 4)))
    >>> q, gates = jnp.ones((1, 1, 4, 4)), jnp.array([[[0.0, 1.0]]])
    >>> decode_schemes(q, cache, jnp.array([[5]]), gates, heads)[0, 0, :, 0].tolist()
    [0.0, 0.0, 1.0, 1.0]
    """
    lengths, taken = positions[:, 0] + 1, gates[:, 0] != 0
    queries = [heads.queries(q, e) for e in range(len(heads.kv_heads))]
    if heads.basis is None:
        keys, values = cache.keys, cache.values
        parts = decode_head_runs(queries, keys, values, lengths, taken, heads.kv_heads)
    else:
        parts = []
        for e, count in enumerate(heads.kv_heads):
            # As heads of count·H, the first is the scheme's vectors laid end to end.
            k, v = (x.reshape(*x.shape[:2], -1, count * x.shape[3]) for x in cache[:2])
            # The scale is 1/√(count·H) there, and should be 1/√H.
            absorbed = absorb_queries(queries[e], heads.basis, count) * count**0.5
            (y,) = decode_head_runs([absorbed], k, v, lengths, taken[:, e : e + 1], (1,))
            parts.append(release_values(y, heads.basis, count))
    parts = [y * gates[:, :, e, None, None].astype(y.dtype) for e, y in enumerate(parts)]
    if heads.basis is None:
        return jnp.concatenate(parts, axis=2)
    return sum(parts, start=jnp.zeros_like(q))


def scheme_cost(
    routing: Routing,
    positions: jax.Array,
    segment_ids: jax.Array | None,
    num_heads: int,
    head_dim: int,
    schemes: SchemesConfig,
    width: int,
) -> LayerReport:
    """Counts what a layer of schemes spends; hard values, soft gradients.

    Args:
      routing: from the router; choice [B,T] int32, probs and logits [B,T,E].
      positions: [B,T] int32, −1 for padding.
      segment_ids: [B,T] int32 or None.
      num_heads: N.
      head_dim: H.
      schemes: which there are, and how they are chosen.
      width: D.

    Returns:
      LayerReport. usage: the share of tokens that take the dearest scheme, or its mean weight where
      all are weighed; choice: the tokens that take it, or weigh it most; aux: the balance loss.

    >>> logits = jnp.array([[[2.0, 0.0, 0.0], [0.0, 0.0, 2.0]]])
    >>> routing = Routing(jnp.array([[0, 2]]), jax.nn.softmax(logits), logits)
    >>> hard = SchemesConfig(kind="hard")
    >>> report = scheme_cost(routing, jnp.arange(2)[None], None, 6, 64, hard, 384)
    >>> round(float(report.kv_cost), 3), float(report.usage)  # 1 pair of 6 heads, 2 of one
    (0.444, 0.5)
    """
    counts = schemes.kv_heads(num_heads)
    valid = positions >= 0
    probs = jnp.where(valid[:, :, None], routing.probs, 0)
    # Without noise: in training, what the layer would spend if it were used as it is now.
    preferred = largest(routing.logits)
    taken = jax.nn.one_hot(preferred, len(counts)) * valid[:, :, None]
    weighed = straight_through(taken, probs) if schemes.one_each else probs
    computed = weighed if schemes.one_each else jnp.broadcast_to(valid[:, :, None], probs.shape)
    pairs = visible_pairs(positions, segment_ids)
    seen = jnp.maximum(pairs.sum(), 1)  # a batch of nothing but padding spends 0, not 0/0
    pairs_of = jnp.sum(computed * pairs[:, :, None], axis=(0, 1))  # [E]
    tokens = valid.sum(dtype=jnp.float32)
    # Keys and values of every scheme, made of the basis' vectors.
    made = sum(count * count for count in counts if count > 1) if schemes.nested else 0
    overhead = tokens * (schemes.work(width) + made * 2 * head_dim)
    # Whichever scheme a token takes: all have N query heads.
    executed = pairs.sum() * (1 if schemes.one_each else len(counts))
    work = attention_work(executed, num_heads, head_dim) + overhead
    dearest = counts.index(max(counts))
    return LayerReport(
        cost=work / attention_work(seen, num_heads, head_dim),
        kv_cost=jnp.sum(pairs_of * jnp.array(counts, jnp.float32)) / (seen * num_heads),
        usage=weighed.sum(axis=(0, 1))[dearest] / jnp.maximum(tokens, 1),
        aux=balance_loss(routing.probs, valid),
        choice=(preferred == dearest) & valid,
    )


class MixtureOfSchemes(nn.Module):
    """Per token: a weighted sum of MHA, GQA and MQA, or one of them.

    `__call__(x [B,T,D], positions [B,T], segment_ids [B,T] | None, cache, rng, mode)
    -> (y [B,T,D], cache, LayerReport)`. The noise-free probabilities [B,T,E] are sown as 'probs'
    in the collection 'routing', for who asks for it.
    """

    heads: HeadsConfig  # of each scheme; its key/value heads are not read
    schemes: SchemesConfig

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
        heads = scheme_heads(self.heads, self.schemes)
        weights = make_attention_weights(self, heads.projected, x.shape[-1], x.dtype)
        rng = rng if mode == "train" else None
        routed: SchemeRouting = SchemeRouter(self.schemes, name="router")(x, positions >= 0, rng)
        self.sow("routing", "probs", routed.routing.probs)

        B, T = positions.shape
        skips = self.schemes.one_each and mode in ("eval", "prefill") and B * T**2 >= _SKIPS_FROM
        if skips:
            y, (k, v) = attend_by_scheme(
                x, positions, routed.routing.choice, segment_ids, weights, heads
            )
        else:
            q = project_queries(x, positions, weights, heads.projected)
            k, v = project_keys_values(x, positions, weights, heads.projected)
        if cache is not None:
            cache = write_kv(cache, k, v, positions)
        if mode == "decode":
            assert cache is not None  # the decoder refuses this mode without one
            y = project_out(decode_schemes(q, cache, positions, routed.gates, heads), weights)
        elif not skips:
            y = mix_schemes(q, k, v, routed.gates, segment_ids, heads, rng)
            y = project_out(y, weights)

        report = scheme_cost(
            routed.routing,
            positions,
            segment_ids,
            self.heads.num_heads,
            self.heads.head_dim,
            self.schemes,
            x.shape[-1],
        )
        return y, cache, report
