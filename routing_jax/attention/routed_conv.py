"""Routed Attention: each token of each layer takes attention or a convolution.

y = g·Attention(x) + (1 − g)·Conv(x), with g a hard gate from what the token holds (MikeyBeez, a
GitHub community post).
Training computes both branches, so that each has a gradient; evaluation, prefill and decode
attend only for the routed tokens. Keys and values are made for every token.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from routing_jax.attention.cache import LayerCache, write_kv
from routing_jax.attention.chosen_queries import attend_chosen
from routing_jax.attention.conv import conv_branch, conv_kernel
from routing_jax.attention.mixer import LayerReport, Mode, attention_work, check_mode, visible_pairs
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
from routing_jax.kernels import decode_attention, map_routed
from routing_jax.routers import (
    Routing,
    TokenRouter,
    TokenRouterConfig,
    binary_entropy,
    straight_through,
)


def attend_routed(
    x: jax.Array,
    positions: jax.Array,
    choice: jax.Array,
    segment_ids: jax.Array | None,
    otherwise: jax.Array,
    weights: AttentionWeights,
    heads: HeadsConfig,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Attention for the chosen tokens only: query, attention and output projection.

    Args:
      x: [B,T,D], all tokens; keys and values are made from them all.
      positions: [B,T] int32, rising within a segment; −1 for padding at the end.
      choice: [B,T] bool.
      segment_ids: [B,T] int32 or None.
      otherwise: [B,T,D], what the other tokens get.
      weights: the projections.
      heads: head counts and sizes.

    Returns:
      ([B,T,D]; (keys, values) [B,T,K,H]).

    >>> heads = HeadsConfig(num_heads=1, num_kv_heads=1, head_dim=2)
    >>> into = jnp.ones((2, 1, 2))
    >>> weights = AttentionWeights(into, into, into, into.transpose(1, 2, 0))
    >>> x, positions = jnp.ones((1, 3, 2)), jnp.arange(3)[None]
    >>> choice = jnp.array([[False, True, False]])
    >>> attend_routed(x, positions, choice, None, -x, weights, heads)[0][0, :, 0].tolist()
    [-1.0, 4.0, -1.0]
    """

    def local(x, positions, choice, segment_ids, otherwise, weights, total: Callable):
        kv = project_keys_values(x, positions, weights, heads)

        def attend(x, q_positions):
            return attend_chosen(x, q_positions, positions, kv, segment_ids, weights, heads)

        # The sum over heads on other devices stands outside the branches: their counts may differ.
        return total(map_routed(attend, x, choice, otherwise)), kv

    return over_batch_and_heads(local, x, positions, choice, segment_ids, otherwise, weights, heads)


def routed_conv_cost(
    routing: Routing,
    positions: jax.Array,
    segment_ids: jax.Array | None,
    heads: HeadsConfig,
    router: TokenRouterConfig,
    conv_width: int,
    width: int,
) -> LayerReport:
    """Counts what a routed layer spends; hard values, soft gradients.

    A routed token pays for the pairs it may see; every token pays for the router and for the
    convolution, which runs everywhere because it is cheaper than gathering for it.

    Args:
      routing: choice and probs [B,T].
      positions: [B,T] int32, −1 for padding.
      segment_ids: [B,T] int32 or None.
      heads: head counts and sizes.
      router: the token router's config.
      conv_width: W.
      width: D.

    >>> choice, probs = jnp.array([[False, True]]), jnp.array([[0.1, 0.9]])
    >>> routing = Routing(choice, probs, logits=jnp.array([[-2.2, 2.2]]))
    >>> heads, router = HeadsConfig(1, 1, head_dim=8), TokenRouterConfig(hidden=1)
    >>> report = routed_conv_cost(routing, jnp.arange(2)[None], None, heads, router, 2, width=8)
    >>> round(float(report.kv_cost), 3), float(report.usage)  # token 1 sees 2 of the 3 pairs
    (0.667, 0.5)
    """
    valid = positions >= 0
    # The noise-free gate: in training, what the layer would spend if it were used as it is now.
    opens = (routing.logits > 0) & valid
    gate = straight_through(opens, jnp.where(valid, routing.probs, 0))
    pairs = visible_pairs(positions, segment_ids)
    seen = jnp.maximum(pairs.sum(), 1)  # a batch of nothing but padding spends 0, not 0/0
    dense = attention_work(seen, heads.num_heads, heads.head_dim)
    tokens = valid.sum(dtype=jnp.float32)  # times a layer's work, int32 would overflow
    overhead = tokens * (router.work(width) + conv_width * width)
    attended = jnp.sum(gate * pairs)
    entropy = jnp.sum(jnp.where(valid, binary_entropy(routing.logits), 0))
    some = jnp.maximum(tokens, 1)
    return LayerReport(
        cost=(attention_work(attended, heads.num_heads, heads.head_dim) + overhead) / dense,
        kv_cost=attended / seen * (heads.num_kv_heads / heads.num_heads),
        usage=gate.sum() / some,
        aux=-entropy / some,
        choice=routing.choice,
    )


class RoutedConv(nn.Module):
    """Per token: attention where the router's gate opens, a causal convolution elsewhere.

    `__call__(x [B,T,D], positions [B,T], segment_ids [B,T] | None, cache, rng, mode)
    -> (y [B,T,D], cache, LayerReport)`.
    """

    heads: HeadsConfig
    router: TokenRouterConfig
    conv_width: int

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
        heads, width = self.heads, x.shape[-1]
        weights = make_attention_weights(self, heads, width, x.dtype)
        kernel = conv_kernel(self, self.conv_width, width, x.dtype)
        routing, gate, summary = TokenRouter(self.router, name="router")(
            x,
            positions,
            rng if mode == "train" else None,
            None if cache is None else cache.summary,
            segment_ids,
        )
        conv, cache = conv_branch(x, kernel, positions, segment_ids, cache)
        if cache is not None:
            cache = cache._replace(summary=summary)

        if mode in ("train", "masked"):
            q = project_queries(x, positions, weights, heads)
            k, v = project_keys_values(x, positions, weights, heads)
            y = attend_everywhere(q, k, v, segment_ids, heads, rng if mode == "train" else None)
            mix = gate[:, :, None].astype(x.dtype)
            y = mix * project_out(y, weights) + (1 - mix) * conv
        elif mode == "decode":
            assert cache is not None  # the decoder refuses this mode without one
            k, v = project_keys_values(x, positions, weights, heads)
            cache = write_kv(cache, k, v, positions)
            keys, values = cache.keys, cache.values
            lengths = jnp.where(routing.choice[:, 0], positions[:, 0] + 1, 0)

            def attend() -> jax.Array:
                q = project_queries(x, positions, weights, heads)
                return project_out(decode_attention(q, keys, values, lengths), weights)

            y = jax.lax.cond(jnp.any(lengths > 0), attend, lambda: jnp.zeros_like(conv))
            y = jnp.where(routing.choice[:, :, None], y, conv)
        else:
            y, (k, v) = attend_routed(
                x, positions, routing.choice, segment_ids, conv, weights, heads
            )
            if cache is not None:
                cache = write_kv(cache, k, v, positions)

        report = routed_conv_cost(
            routing, positions, segment_ids, heads, self.router, self.conv_width, width
        )
        return y, cache, report
