"""Holding a router to a budget: a Lagrangian whose multipliers rise while the budget is missed.

Flux Attention (arXiv 2604.07394) adds λ1·|s − t| + λ2·(s − t)² to the loss, with s the share of
layers that a sequence runs sparsely and t the target of its task. The router descends on it, the
multipliers ascend.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Multipliers(NamedTuple):
    """What a missed budget weighs, task by task.

    Attributes:
      linear: float32, one number a task: λ1.
      square: float32, one number a task: λ2.
    """

    linear: jax.Array
    square: jax.Array


def init_multipliers(tasks: int) -> Multipliers:
    """Multipliers of 0: at first a missed budget costs nothing.

    >>> init_multipliers(2).linear.tolist()
    [0.0, 0.0]
    """
    return Multipliers(jnp.zeros(tasks), jnp.zeros(tasks))


def budget_loss(
    sparsity: jax.Array, tasks: jax.Array, targets: jax.Array, multipliers: Multipliers
) -> jax.Array:
    """λ1·|s − t| + λ2·(s − t)², the mean over a batch.

    Args:
      sparsity: [B] float32, the share of layers that each sequence runs sparsely.
      tasks: [B] int32, the task of each sequence.
      targets: the wanted sparsity of each task.
      multipliers: of each task.

    Returns:
      A scalar; its gradient in `multipliers` is what `ascend` takes.

    >>> multipliers = Multipliers(jnp.array([2.0, 9.0]), jnp.array([4.0, 9.0]))
    >>> sparsity, targets = jnp.array([0.5]), jnp.array([1.0, 0.0])
    >>> float(budget_loss(sparsity, jnp.array([0]), targets, multipliers))
    2.0
    """
    missed = jnp.abs(sparsity - targets[tasks])
    return jnp.mean(multipliers.linear[tasks] * missed + multipliers.square[tasks] * missed**2)


def ascend(multipliers: Multipliers, gradient: Multipliers, rate: float) -> Multipliers:
    """One step of gradient ascent: the multipliers of tasks that miss their budget rise.

    Args:
      multipliers: as they are.
      gradient: of `budget_loss` in them.
      rate: the step's size.

    >>> risen = ascend(init_multipliers(1), Multipliers(jnp.ones(1), jnp.ones(1)), 0.5)
    >>> risen.linear.tolist()
    [0.5]
    """
    return jax.tree.map(lambda value, slope: value + rate * slope, multipliers, gradient)
