"""What `block_sparse_attention` hands to an implementation, and what it expects back."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from routing_jax.kernels.batching import fold_vmap
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
      deterministic: whether gradients must be bitwise repeatable; implementations may be so anyway.
    """

    causal: bool
    scale: float
    deterministic: bool = True


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


def softmax_cotangents(
    outputs: AttentionOutputs, d_out: jax.Array, d_lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What a backward pass needs of each query besides d_out: dLSE and δ = Σ_h dO·O − dLSE.

    The gradient of the logits is then dS = P·(dP − δ).

    Args:
      outputs: of the forward pass.
      d_out: [B,T,N,H].
      d_lse: [B,T,N]; where nothing was seen it is ignored.

    Returns:
      (d_lse, delta), each [B,T,N] float32.

    >>> outputs = AttentionOutputs(jnp.ones((1, 1, 1, 2)), jnp.full((1, 1, 1), -jnp.inf))
    >>> d_lse, delta = softmax_cotangents(outputs, jnp.ones((1, 1, 1, 2)), jnp.ones((1, 1, 1)))
    >>> float(d_lse[0, 0, 0]), float(delta[0, 0, 0])
    (0.0, 2.0)
    """
    d_lse = jnp.where(outputs.lse == -jnp.inf, 0.0, d_lse)
    delta = (d_out.astype(jnp.float32) * outputs.out.astype(jnp.float32)).sum(axis=-1) - d_lse
    return d_lse, delta


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


def late_implementation(
    name: str,
    refusal: Callable[[AttentionOptions, AttentionInputs], str | None],
    load: Callable[[], tuple[Callable, Callable]],
) -> Implementation:
    """An implementation in Mosaic: imported when it first runs, and with vmap as a larger batch.

    Importing Mosaic takes seconds, and few processes run it. Lowering a kernel takes a second:
    each pass is a jitted function of its own, so that equal calls of a program share one.

    Args:
      name: as of `Implementation`.
      refusal: as of `Implementation`.
      load: imports the forward and the backward pass and returns them.

    >>> load = lambda: (lambda options, inputs: inputs.q,) * 2
    >>> twin = late_implementation("twin", lambda options, inputs: None, load)
    >>> inputs = AttentionInputs(jnp.ones((2, 3)), *[None] * 6)
    >>> twin.forward(AttentionOptions(True, 1.0), inputs).shape
    (2, 3)
    """

    @functools.cache
    def passes() -> tuple[Callable, ...]:
        return tuple(jax.jit(run, static_argnums=0) for run in load())

    def forward(options: AttentionOptions, inputs: AttentionInputs) -> AttentionOutputs:
        run = functools.partial(passes()[0], options)
        return fold_vmap(run, inputs.q.shape[0], inputs)

    def backward(options: AttentionOptions, inputs: AttentionInputs, *others) -> AttentionGradients:
        run = functools.partial(passes()[1], options)
        return fold_vmap(run, inputs.q.shape[0], inputs, *others)

    return Implementation(name, refusal, forward, backward)
