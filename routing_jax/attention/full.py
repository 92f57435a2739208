"""Attention everywhere: the dense mixer that routing is compared with."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from routing_jax.attention.cache import LayerCache, write_kv
from routing_jax.attention.mixer import LayerReport, Mode, check_mode
from routing_jax.attention.projections import (
    HeadsConfig,
    attend_everywhere,
    make_attention_weights,
    project_keys_values,
    project_out,
    project_queries,
)
from routing_jax.kernels import decode_attention


class FullAttention(nn.Module):
    """Causal attention of every token; MHA, GQA or MQA by head counts.

    `__call__(x [B,T,D], positions [B,T], segment_ids [B,T] | None, cache, rng, mode)
    -> (y [B,T,D], cache, LayerReport)`.
    """

    heads: HeadsConfig

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
            y = decode_attention(q, cache.keys, cache.values, positions[:, 0] + 1)
        else:
            y = attend_everywhere(q, k, v, segment_ids, heads, rng if mode == "train" else None)
        one = jnp.float32(1)
        share = jnp.float32(heads.num_kv_heads / heads.num_heads)
        report = LayerReport(
            cost=one, kv_cost=share, usage=one, aux=jnp.float32(0), choice=positions >= 0
        )
        return project_out(y, weights), cache, report
