"""What `block_sparse_attention` hands to an implementation, and what it expects back."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax

from routing_jax.kernels.block_table import BlockTable


class AttentionInputs(NamedTuple):
    """The arrays of one call, checked and of matching shapes.

    Attributes:
      q: [B,T,N,H].
      k: [B,S,K,H].
      v: [B,S,K,H].
      table: rows of [B or 1, K or 1, M].
      block_bias: [B,K,M,C] or None.
      q_positions: [B,T] int32 or None, which means that query t stands at position t.
      segment_ids: [B,S] int or None.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    table: BlockTable
    block_bias: jax.Array | None
    q_positions: jax.Array | None
    segment_ids: jax.Array | None


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """The static choices of one call.

    Attributes:
      causal: whether keys after a query's position are hidden.
      scale: what logits are multiplied by.
    """

    causal: bool
    scale: float


class AttentionOutputs(NamedTuple):
    """What the forward pass returns.

    Attributes:
      out: [B,T,N,H] in q's dtype.
      lse: [B,T,N] float32; −inf where nothing was seen.
    """

    out: jax.Array
    lse: jax.Array


class AttentionGradients(NamedTuple):
    """What the backward pass returns.

    Attributes:
      q: like q.
      k: like k.
      v: like v.
      block_bias: like block_bias; None where that is.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    block_bias: jax.Array | None


class Implementation(NamedTuple):
    """One way to compute block-sparse attention and its gradients.

    Attributes:
      name: what callers name it by.
      refusal: (options, inputs) to None, or to why this call is not supported here.
      forward: (options, inputs) to the outputs.
      backward: (options, inputs, outputs, d_out, d_lse) to the gradients.
    """

    name: str
    refusal: Callable[[AttentionOptions, AttentionInputs], str | None]
    forward: Callable[[AttentionOptions, AttentionInputs], AttentionOutputs]
    backward: Callable[
        [AttentionOptions, AttentionInputs, AttentionOutputs, jax.Array, jax.Array],
        AttentionGradients,
    ]
