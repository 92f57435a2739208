"""Tokens after the prompt that search each for itself, in one pass over prompt and answer.

The rows of a table are those of tiles; these tokens have rows of their own, as decoding has. They
are gathered, so that the work is theirs, and what the tile attended to is written over.
"""

import dataclasses

import jax
import jax.numpy as jnp

from routing_jax.attention.per_shard import block_attention_over_batch_and_heads
from routing_jax.kernels import contiguous_pages, map_routed
from routing_jax.routers import SparseModeConfig, layer_table, search_scores

_LEAST_ANSWERS = 8
_SHARE_OF_ANSWERS = 16


def search_alone(
    sparse: SparseModeConfig,
    y: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    narrow: jax.Array,
    dense: jax.Array,
    chosen: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    """What tiles attended to, replaced for tokens of the answer that search each for itself.

    Args:
      sparse: what they find.
      y: [B,T,N,H], of all tokens.
      q: [B,T,N,H].
      k: [B,S,K,H].
      v: [B,S,K,H].
      narrow: [B·J,K,block_kv,R], the channels of keys that are searched (`search_keys`).
      dense: [B] bool, the samples routed to full attention.
      chosen: [B,T] bool, tokens after the prompt; those of samples that do not search keep y.
      lengths: [B] int32, tokens of each prompt.

    >>> sparse = SparseModeConfig(retrieval="topk", answers="topk", sink=1, window=1, blocks=1,
    ...                           block_q=1, block_kv=1)
    >>> x, yes = jnp.ones((1, 4, 1, 8)), jnp.array([True])
    >>> chosen, one = jnp.array([[False, False, False, True]]), jnp.array([1])
    >>> narrow = x[0, :, :, None, :2]
    >>> search_alone(sparse, 0 * x, x, x, x, narrow, yes, chosen, one)[0, :, 0, 0].tolist()
    [0.0, 0.0, 0.0, 1.0]
    """
    B, T, N, H = q.shape
    own_rows = dataclasses.replace(sparse, block_q=1)
    pages = contiguous_pages(B, len(narrow) // B)

    def attend(queries: jax.Array, places: jax.Array) -> jax.Array:
        queries = queries.reshape(*places.shape, N, H)
        scores = search_scores(sparse, queries, narrow, pages, places)
        table = layer_table(own_rows, dense, jnp.maximum(places, 0), lengths, scores)
        # Of its own choice: kernels for accelerators do not take tiles of one query.
        out = block_attention_over_batch_and_heads(queries, k, v, table, None, places, None, None)
        return out.reshape(*places.shape, N * H)

    chosen &= sparse.searched_after(dense)[:, None]
    most = max(_LEAST_ANSWERS, T // _SHARE_OF_ANSWERS)
    ladder = (0, most, T) if most < T else (0, T)  # few, as each compiles an attention
    flat = (B, T, N * H)
    return map_routed(attend, q.reshape(flat), chosen, y.reshape(flat), ladder).reshape(y.shape)
