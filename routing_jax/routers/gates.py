"""Hard gates with a gradient: noise, then a threshold or the largest, straight-through."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Gate(NamedTuple):
    """A sampled gate.

    Attributes:
      choice: bool, the hard decision.
      value: float32, `choice` as a number whose gradient is the soft gate's.
      probs: float32, σ(logits) or their softmax, free of noise.
    """

    choice: jax.Array
    value: jax.Array
    probs: jax.Array


def straight_through(hard: jax.Array, soft: jax.Array) -> jax.Array:
    """The value of `hard` with the gradient of `soft` (Bengio et al. 2013).

    Args:
      hard: any shape, the value to pass forward; cast to soft's dtype.
      soft: same shape, where gradients go.

    >>> jax.grad(lambda p: straight_through(p > 0.5, p) * 3)(0.7).item()
    3.0
    """
    hard = hard.astype(soft.dtype)
    # In this order the forward value is `hard` to the last bit: soft − soft is exactly 0.
    return jax.lax.stop_gradient(hard) + (soft - jax.lax.stop_gradient(soft))


def binary_gate(
    logits: jax.Array, rng: jax.Array | None, temperature: jax.Array | float = 1.0
) -> Gate:
    """Opens where logit + logistic noise > 0: the two-way Gumbel-softmax, hard forward.

    The difference of two Gumbel variables is logistic, so the gate opens with probability
    σ(logit) (Jang et al. 2017; Maddison et al. 2017). Without `rng` there is no noise, and the
    gate opens exactly where σ(logit) > ½.

    Args:
      logits: any shape.
      rng: a PRNG key for the noise, or None for the deterministic gate.
      temperature: of the soft gate that gives the gradient.

    Returns:
      A Gate of the logits' shape.

    >>> binary_gate(jnp.array([-2.0, 3.0]), None).choice.tolist()
    [False, True]
    """
    logits = logits.astype(jnp.float32)
    probs = jax.nn.sigmoid(logits)
    noisy = logits if rng is None else logits + jax.random.logistic(rng, logits.shape)
    choice = noisy > 0
    soft = jax.nn.sigmoid(noisy / temperature)
    return Gate(choice, straight_through(choice, soft), probs)


def largest(x: jax.Array) -> jax.Array:
    """Index of the largest in the last dimension, the first of equals; `argmax`, but cheaper.

    Two plain reductions, which XLA makes part of the kernels around them: an argmax is one alone.

    Args:
      x: [...,E].

    >>> largest(jnp.array([[0.0, 2.0, 2.0], [1.0, 0.0, 0.0]])).tolist()
    [1, 0]
    """
    places = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    last = x.shape[-1] - 1  # also where nothing compares, among NaNs
    return jnp.where(x == x.max(axis=-1, keepdims=True), places, last).min(axis=-1)


def categorical_gate(logits: jax.Array, rng: jax.Array | None, temperature: float = 1.0) -> Gate:
    """Opens one gate of E, where logit + Gumbel noise is largest: Gumbel-softmax, hard forward.

    A gate opens with its softmax probability (Jang et al. 2017; Maddison et al. 2017). Without
    `rng` there is no noise, and the most likely one opens.

    Args:
      logits: [...,E].
      rng: a PRNG key for the noise, or None for the deterministic gate.
      temperature: of the soft gates that give the gradient.

    Returns:
      A Gate of the logits' shape, one-hot in its last dimension.

    >>> categorical_gate(jnp.array([0.0, 2.0, 1.0]), None).choice.tolist()
    [False, True, False]
    """
    logits = logits.astype(jnp.float32)
    noisy = logits if rng is None else logits + jax.random.gumbel(rng, logits.shape)
    choice = jax.nn.one_hot(largest(noisy), logits.shape[-1], dtype=bool)
    soft = jax.nn.softmax(noisy / temperature, axis=-1)
    return Gate(choice, straight_through(choice, soft), jax.nn.softmax(logits, axis=-1))


def binary_entropy(logits: jax.Array) -> jax.Array:
    """Entropy of a gate that opens with probability σ(logit), in nats.

    Args:
      logits: any shape.

    >>> round(float(binary_entropy(jnp.array(0.0))), 4)  # log 2
    0.6931
    """
    return jax.nn.softplus(logits) - logits * jax.nn.sigmoid(logits)
