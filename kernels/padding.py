"""Axes padded to the sizes that kernels want."""

import jax
import jax.numpy as jnp


def pad_axis(x: jax.Array, axis: int, size: int, fill: float = 0) -> jax.Array:
    """Pads an axis at its end; nothing is copied where it fits already.

    Args:
      x: an array.
      axis: which axis.
      size: its new size, at least the old one.
      fill: what is added.

    >>> pad_axis(jnp.ones((2, 3)), 1, 4).tolist()
    [[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]]
    """
    if x.shape[axis] == size:
        return x
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, pad, constant_values=fill)


def cut(x: jax.Array, axis: int, size: int, fill: int = 0) -> jax.Array:
    """Pads an axis to a multiple of a size and splits it into pieces of it.

    Args:
      x: an array.
      axis: which axis; (pieces, size) stand in its place.
      size: of a piece.
      fill: what is added.

    >>> cut(jnp.ones((2, 5)), 1, 4, fill=-1)[0].tolist()
    [[1.0, 1.0, 1.0, 1.0], [1.0, -1.0, -1.0, -1.0]]
    """
    x = pad_axis(x, axis, -(-x.shape[axis] // size) * size, fill)
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
