"""Loops over rows of unequal length that waste little on the short ones."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Elements of the largest array of one step. Small enough for a CPU's cache there; elsewhere
# large enough to fill the chip.
_STEP_ELEMENTS_CPU = 1 << 19
_STEP_ELEMENTS = 1 << 25


def map_rows(
    step: Callable[[jax.Array, jax.Array], Any], lengths: jax.Array, elements_per_row: int
) -> Any:
    """Maps `step` over rows, taking together rows of about equal length, longest first.

    Within a step, rows run side by side and a loop must go to the longest; sorting keeps that
    close to each row's own length, so the work follows the sum of the lengths.

    Args:
      step: (rows [R] int32, lengths [R] int32) to a pytree of arrays with R in front. Rows
        added to fill the last step have length 0.
      lengths: [rows] int32.
      elements_per_row: size of the largest array that `step` holds for one row; decides R.

    Returns:
      The pytree for all rows, in their own order.

    >>> map_rows(lambda rows, lengths: rows * lengths, jnp.array([3, 1, 2]), 1).tolist()
    [0, 1, 4]
    """
    total = lengths.shape[0]
    budget = _STEP_ELEMENTS_CPU if jax.default_backend() == "cpu" else _STEP_ELEMENTS
    width = min(total, max(1, budget // elements_per_row))
    order = jnp.argsort(-lengths).astype(jnp.int32)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(total, dtype=jnp.int32))
    pad = -total % width
    rows = jnp.pad(order, (0, pad)).reshape(-1, width)
    sorted_lengths = jnp.pad(lengths[order], (0, pad)).reshape(-1, width)
    _, results = jax.lax.scan(lambda _, x: (None, step(*x)), None, (rows, sorted_lengths))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[place], results)
