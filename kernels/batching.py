"""vmap for kernels that have a batch dimension of their own: the mapped axis joins it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def fold_vmap[Result](function: Callable[..., Result], batch: int, *trees: Any) -> Result:
    """Calls a function of batched arrays so that vmap over the call is a call with a larger batch.

    Args:
      function: arrays to arrays; every result leads with the batch.
      batch: B.
      trees: pytrees of arrays that lead with B, or with 1 for all sequences.

    Returns:
      function(*trees).

    >>> double = lambda x: fold_vmap(lambda x: 2 * x, 3, x)
    >>> jax.vmap(double)(jnp.ones((4, 3, 2))).shape
    (4, 3, 2)
    """

    @jax.custom_batching.custom_vmap
    def call(trees):
        return function(*trees)

    @call.def_vmap
    def _(axis_size, in_batched, trees):
        def fold(x, batched):
            x = x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            x = jnp.broadcast_to(x, (axis_size, batch, *x.shape[2:]))
            return x.reshape(axis_size * batch, *x.shape[2:])

        folded = jax.tree.map(fold, trees, in_batched[0])
        results = fold_vmap(function, axis_size * batch, *folded)
        results = jax.tree.map(lambda x: x.reshape(axis_size, batch, *x.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return call(trees)
