"""Linear attention: a fixed-size memory instead of keys, the control of low rank.

Katharopoulos et al. 2020 (arXiv 2006.16236): y_t = φ(q_t)·Σ φ(k_s)v_sᵀ ÷ φ(q_t)·Σ φ(k_s), with
φ = elu + 1. Computed a chunk at a time.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from routing_jax.attention.cache import LayerCache
from routing_jax.attention.mixer import LayerReport, Mode, attention_work, check_mode, visible_pairs
from routing_jax.attention.projections import (
    HeadsConfig,
    make_attention_weights,
    project_keys_values,
    project_out,
    project_queries,
)
from routing_jax.kernels.padding import pad_axis

_CHUNK = 64


class LinearMemory(NamedTuple):
    """What linear attention remembers.

    Attributes:
      values: [B,K,H,H] float32, Σ φ(k)vᵀ.
      keys: [B,K,H] float32, Σ φ(k).
    """

    values: jax.Array
    keys: jax.Array


def empty_linear_memory(heads: HeadsConfig, batch: int) -> LinearMemory:
    """The memory of sequences that have no token yet.

    >>> empty_linear_memory(HeadsConfig(4, 2, 8), 3).values.shape
    (3, 2, 8, 8)
    """
    K, H = heads.num_kv_heads, heads.head_dim
    return LinearMemory(jnp.zeros((batch, K, H, H)), jnp.zeros((batch, K, H)))


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    memory: LinearMemory,
    *,
    valid: jax.Array,
    segment_ids: jax.Array | None = None,
    chunk: int = _CHUNK,
) -> tuple[jax.Array, LinearMemory]:
    """Causal linear attention, work O(T·chunk + T·H) a head channel.

    Args:
      q: [B,T,N,H].
      k: [B,T,K,H].
      v: [B,T,K,H].
      memory: of the tokens before.
      valid: [B,T] bool; other keys are not remembered.
      segment_ids: [B,T] int32, contiguous runs; a query reads only its segment, and what
        `memory` holds belongs to the first token's.
      chunk: tokens at a time.

    Returns:
      ([B,T,N,H] in q's dtype, the memory after the last token's segment).

    >>> q = jnp.ones((1, 3, 1, 2)); v = q * jnp.arange(3.0)[None, :, None, None]
    >>> memory = empty_linear_memory(HeadsConfig(1, 1, 2), 1)
    >>> y, _ = linear_attention(q, q, v, memory, valid=jnp.ones((1, 3), bool))
    >>> y[0, :, 0, 0].tolist()  # equal keys: the running mean
    [0.0, 0.5, 1.0]
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    size = -(-T // chunk) * chunk
    segments = jnp.zeros((B, T), jnp.int32) if segment_ids is None else segment_ids

    def phi(x):
        return jax.nn.elu(x.astype(jnp.float32)) + 1

    def cut(x):  # [B,T,...] -> [chunks,B,chunk,...]
        x = pad_axis(x, 1, size)
        return x.reshape(B, -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    keys = jnp.where(valid[:, :, None, None], phi(k), 0.0)
    # Padding of the last chunk repeats its last segment, or it would end the memory's.
    segments = jnp.pad(segments, ((0, 0), (0, size - T)), mode="edge")
    pieces = (cut(phi(q).reshape(B, T, K, N // K, H)), cut(keys), cut(v.astype(jnp.float32)))
    causal = jnp.tril(jnp.ones((chunk, chunk), bool))[None]

    def step(carry, piece):
        memory, segment = carry
        q, k, v, of = piece
        mask = causal & (of[:, :, None] == of[:, None, :])
        scores = jnp.einsum("BQKGH,BPKH->BKGQP", q, k) * mask[:, None, None]
        goes_on = (of == segment[:, None]).astype(jnp.float32)
        before = q * goes_on[:, :, None, None, None]
        top = jnp.einsum("BKGQP,BPKH->BQKGH", scores, v)
        top += jnp.einsum("BQKGH,BKHC->BQKGC", before, memory.values)
        below = jnp.moveaxis(scores.sum(-1), 3, 1)
        below += jnp.einsum("BQKGH,BKH->BQKG", before, memory.keys)
        last = of[:, -1]
        kept = (segment == last).astype(jnp.float32)
        k = k * (of == last[:, None])[:, :, None, None]
        memory = LinearMemory(
            memory.values * kept[:, None, None, None] + jnp.einsum("BPKH,BPKC->BKHC", k, v),
            memory.keys * kept[:, None, None] + k.sum(axis=1),
        )
        return (memory, last), top / jnp.maximum(below, 1e-6)[..., None]

    (memory, _), y = jax.lax.scan(step, (memory, segments[:, 0]), (*pieces, cut(segments)))
    return y.swapaxes(0, 1).reshape(B, size, N, H)[:, :T].astype(q.dtype), memory


class LinearAttention(nn.Module):
    """Causal linear attention of every token.

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
        heads, (B, T) = self.heads, positions.shape
        N, H = heads.num_heads, heads.head_dim
        weights = make_attention_weights(self, heads, x.shape[-1], x.dtype)
        q = project_queries(x, positions, weights, heads)
        k, v = project_keys_values(x, positions, weights, heads)
        memory = empty_linear_memory(heads, B) if cache is None else cache.memory
        chunk = min(_CHUNK, T)
        valid = positions >= 0
        y, memory = linear_attention(
            q, k, v, memory, valid=valid, segment_ids=segment_ids, chunk=chunk
        )
        if cache is not None:
            cache = cache._replace(memory=memory)
        tokens = valid.sum(dtype=jnp.float32)
        pairs = jnp.maximum(visible_pairs(positions, segment_ids).sum(), 1)
        # In the chunk scores and values, across chunks reading the memory and adding to it.
        per_token = N * H * (2 * chunk + H + 1) + heads.num_kv_heads * H * H
        report = LayerReport(
            cost=tokens * per_token / attention_work(pairs, N, H),
            kv_cost=jnp.float32(0),  # no key or value is read again
            usage=jnp.float32(0),
            aux=jnp.float32(0),
            choice=jnp.zeros_like(positions, bool),
        )
        return project_out(y, weights), cache, report
