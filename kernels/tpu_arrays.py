"""Arrays of Mosaic TPU kernels: where they lie, and products of tiles."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu


def multiply(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Sums a·b over one dimension of each, in float32.

    Args:
      a: a matrix.
      b: a matrix of the same dtype.
      contract: which dimension of each is summed over.

    >>> multiply(jnp.ones((2, 3)), jnp.ones((4, 3)), (1, 1)).shape
    (2, 4)
    """
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = ((contract[:1], contract[1:]), ((), ()))
    return lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def in_main_memory(x: jax.Array) -> jax.Array:
    """The array, kept where copies run beside the work.

    Left to itself, XLA moves one that fits into vector memory, and a copy from there is a loop of
    loads and stores that the program waits for.

    >>> jax.eval_shape(in_main_memory, jnp.ones((2, 3))).shape
    (2, 3)
    """
    return pltpu.with_memory_space_constraint(x, pltpu.HBM)
