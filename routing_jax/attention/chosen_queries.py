"""Attention for some tokens of each sequence, from their queries to the model's width."""

import jax
import jax.numpy as jnp

from routing_jax.attention.projections import (
    AttentionWeights,
    HeadsConfig,
    attend_everywhere,
    project_out,
    project_queries,
)
from routing_jax.kernels import compacted_attention


def attend_chosen(
    x: jax.Array,
    q_positions: jax.Array,
    positions: jax.Array,
    keys_values: tuple[jax.Array, jax.Array],
    segment_ids: jax.Array | None,
    weights: AttentionWeights,
    heads: HeadsConfig,
) -> jax.Array:
    """Query projection, attention and output projection of the tokens that compaction gathered.

    Args:
      x: [B,C,D], the gathered tokens; all of them in order when C = S.
      q_positions: [B,C] int32, each one's place in its row, −1 for an unused slot.
      positions: [B,S] int32, of all tokens; they may restart in a packed row.
      keys_values: of all tokens, [B,S,K,H] each.
      segment_ids: [B,S] int32 or None.
      weights: the projections.
      heads: head counts and sizes.

    Returns:
      [B,C,D]; unused slots hold anything.

    >>> into, x = jnp.ones((2, 1, 2)), jnp.ones((1, 1, 2))
    >>> weights = AttentionWeights(into, into, into, into.transpose(1, 2, 0))
    >>> kv, positions = jnp.ones((1, 3, 1, 2)), jnp.arange(3)[None]
    >>> heads = HeadsConfig(1, 1, 2)
    >>> attend_chosen(x, jnp.array([[1]]), positions, (kv, kv), None, weights, heads).tolist()
    [[[2.0, 2.0]]]
    """
    k, v = keys_values
    # A token's place in its row says which keys it sees; its position how far RoPE turns it.
    turns = jnp.take_along_axis(positions, jnp.maximum(q_positions, 0), axis=1)
    q = project_queries(x, turns, weights, heads)
    if x.shape[1] == k.shape[1]:
        y = attend_everywhere(q, k, v, segment_ids, heads)
    else:
        y = compacted_attention(
            q, k, v, q_positions, segment_ids=segment_ids, implementation=heads.implementation
        )
    return project_out(y, weights)
