"""The dense float32 oracle that every implementation is tested against. For tests only: T×S."""

import jax
import jax.numpy as jnp

from routing_jax.kernels.block_table import BlockTable, ceil_div


def reference_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: BlockTable,
    *,
    block_bias: jax.Array | None = None,
    q_positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Masked dense attention in float32; arguments as in `block_sparse_attention`.

    Returns:
      out [B,T,N,H] and lse [B,T,N], float32.

    >>> table = BlockTable(jnp.array([[[1]]]), jnp.array([[[[0]]]]), 4, 2)
    >>> x = jnp.ones((1, 4, 1, 2))
    >>> reference_attention(x, x, x, table, causal=False)[0].shape
    (1, 4, 1, 2)
    """
    mask, bias = dense_mask(
        q.shape, k.shape, table, block_bias, q_positions, segment_ids, causal=causal
    )
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("BTNH,BSNH->BNTS", q, k, precision="highest")
    logits = logits * (q.shape[3] ** -0.5 if scale is None else scale) + bias
    logits = jnp.where(mask, logits, -jnp.inf)
    some = (logits > -jnp.inf).any(axis=-1)
    lse = jax.nn.logsumexp(jnp.where(some[..., None], logits, 0.0), axis=-1)
    weights = jnp.where(some[..., None], jnp.exp(logits - lse[..., None]), 0.0)
    out = jnp.einsum("BNTS,BSNH->BTNH", weights, v, precision="highest")
    return out, jnp.where(some, lse, -jnp.inf).transpose(0, 2, 1)


def dense_mask(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    table: BlockTable,
    block_bias: jax.Array | None,
    q_positions: jax.Array | None,
    segment_ids: jax.Array | None,
    *,
    causal: bool,
) -> tuple[jax.Array, jax.Array]:
    """What a call lets each query see, token by token. For tests only: T×S.

    Args:
      q_shape: (B, T, N, H).
      k_shape: (B, S, K, H).
      table: as in `block_sparse_attention`, like what follows.
      block_bias: [B,K,M,C] or None.
      q_positions: [B,T] or None.
      segment_ids: [B,S] or None.
      causal: whether later keys are hidden.

    Returns:
      [B,N,T,S] bool, and the bias as float32, broadcast against it.

    >>> table = BlockTable(jnp.array([[[1]]]), jnp.array([[[[0]]]]), 2, 1)
    >>> dense_mask((1, 2, 1, 8), (1, 2, 1, 8), table, None, None, None, causal=True)[0].tolist()
    [[[[True, False], [True, False]]]]
    """
    (B, T, N, _), (_, S, K, _) = q_shape, k_shape
    num_blocks = ceil_div(S, table.block_kv)
    listed = jnp.arange(table.capacity)[None, None, None] < table.counts[..., None]
    blocks = jnp.arange(num_blocks)[None, None, None, None]
    hit = listed[..., None] & (table.indices[..., None] == blocks)
    if block_bias is None:
        bias_BKMJ = jnp.zeros((1, 1, 1, 1), jnp.float32)
    else:
        # A sum over slots would turn a bias of −inf into nan.
        wide = jnp.where(hit, block_bias.astype(jnp.float32)[..., None], -jnp.inf)
        bias_BKMJ = jnp.where(hit.any(axis=3), wide.max(axis=3), 0.0)
    listed_BKMJ = hit.any(axis=3) | table.dense[..., None]

    def per_token(blocks):  # [B,K,M,J] -> [B,N,T,S]
        shape = (*blocks.shape[:2], table.num_tiles, num_blocks)
        tokens = jnp.repeat(jnp.broadcast_to(blocks, shape), table.block_q, axis=2)
        tokens = jnp.repeat(tokens, table.block_kv, axis=3)[:, :, :T, :S]
        tokens = jnp.broadcast_to(tokens, (B, K, T, S))
        return jnp.repeat(tokens, N // K, axis=1)

    positions = jnp.broadcast_to(jnp.arange(T), (B, T)) if q_positions is None else q_positions
    seen = positions[:, :, None] >= (jnp.arange(S)[None, None] if causal else 0)
    if segment_ids is not None:
        own = jnp.take_along_axis(segment_ids, jnp.clip(positions, 0, S - 1), axis=1)
        seen = seen & (own[:, :, None] == segment_ids[:, None]) & (positions < S)[:, :, None]
    mask = per_token(listed_BKMJ) & jnp.broadcast_to(seen, (B, T, S))[:, None]
    return mask, per_token(bias_BKMJ)
