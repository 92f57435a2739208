"""Softmax-weighted sums over keys that arrive in pieces, with the exact log-sum-exp.

Milakov & Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135. R is rows that proceed
side by side, Q queries a row, P the keys of one piece.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class SoftmaxState(NamedTuple):
    """What is known after some pieces.

    Attributes:
      maximum: [R,G,Q] float32, the largest logit so far; −inf before any.
      total: [R,G,Q] float32, Σ exp(logit − maximum).
      values: [R,G,Q,H] float32, Σ exp(logit − maximum)·value.
    """

    maximum: jax.Array
    total: jax.Array
    values: jax.Array


def empty_softmax(shape: tuple[int, int, int], head_dim: int) -> SoftmaxState:
    """The state before any piece.

    Args:
      shape: (R, G, Q).
      head_dim: H of the values.

    >>> empty_softmax((1, 1, 2), 4).values.shape
    (1, 1, 2, 4)
    """
    return SoftmaxState(
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )


def add_piece(state: SoftmaxState, logits: jax.Array, values: jax.Array) -> SoftmaxState:
    """The state after one more piece of keys.

    Args:
      state: the state so far.
      logits: [R,G,Q,P] float32; −inf hides a key.
      values: [R,P,H].

    >>> state = add_piece(empty_softmax((1, 1, 1), 1), jnp.zeros((1, 1, 1, 2)), jnp.ones((1, 2, 1)))
    >>> float(state.total[0, 0, 0])
    2.0
    """
    maximum = jnp.maximum(state.maximum, logits.max(axis=-1))
    shift = jnp.where(maximum == -jnp.inf, 0.0, maximum)  # −inf − −inf would be nan
    weights = jnp.exp(logits - shift[..., None])
    fade = jnp.exp(state.maximum - shift)
    return SoftmaxState(
        maximum,
        state.total * fade + weights.sum(axis=-1),
        state.values * fade[..., None]
        + matmul("rgqp,rph->rgqh", weights.astype(values.dtype), values),
    )


def finish_softmax(state: SoftmaxState) -> tuple[jax.Array, jax.Array]:
    """The weighted means of the values and the log-sum-exp of the logits.

    Args:
      state: the state after the last piece.

    Returns:
      [R,G,Q,H] and [R,G,Q], float32; 0 and −inf where every key was hidden.

    >>> out, lse = finish_softmax(empty_softmax((1, 1, 1), 1))
    >>> float(out[0, 0, 0, 0]), float(lse[0, 0, 0])
    (0.0, -inf)
    """
    total = jnp.where(state.total == 0, 1.0, state.total)
    lse = jnp.where(state.total == 0, -jnp.inf, state.maximum + jnp.log(total))
    return state.values / total[..., None], lse


def merge_splits(outs: jax.Array, lses: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The softmax over all keys from the softmaxes over each split's: exact but for rounding.

    Args:
      outs: [...,H] float32, the mean of each split's values.
      lses: [...] float32, the log-sum-exp of its logits; −inf where it has no key.
      axis: the one along which the splits stand, not negative; the results lack it.

    Returns:
      [...,H] and [...], float32; 0 and −inf where no split has a key.

    >>> outs, lses = jnp.array([[1.0], [5.0], [0.0]]), jnp.array([0.0, jnp.log(3.0), -jnp.inf])
    >>> out, lse = merge_splits(outs, lses, 0)
    >>> round(float(out[0]), 5), round(float(jnp.exp(lse)), 5)
    (4.0, 4.0)
    """
    maximum = lses.max(axis=axis)
    shift = jnp.where(maximum == -jnp.inf, 0.0, maximum)  # −inf − −inf would be nan
    weights = jnp.exp(lses - jnp.expand_dims(shift, axis))
    total = weights.sum(axis=axis)
    out = (weights[..., None] * outs).sum(axis=axis)
    return out / jnp.where(total == 0, 1.0, total)[..., None], shift + jnp.log(total)


def matmul(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum that accumulates in float32 and does not round float32 operands.

    Args:
      subscripts: einsum subscripts.
      a: the first operand.
      b: the second, of the same dtype.

    >>> matmul("qh,kh->qk", jnp.ones((2, 3), jnp.bfloat16), jnp.ones((2, 3), jnp.bfloat16)).dtype
    dtype('float32')
    """
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)
