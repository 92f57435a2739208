"""Products of matrices that are summed in float32 and differentiated in their factors' dtype."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def float32_product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum` of two arrays into float32, b rounded to a's dtype.

    The gradient is rounded to a's dtype before it meets the factors, as flash kernels do: float32
    would make slower products of those of bfloat16, and be twice the bytes.

    Args:
      equation: as einsum's; each index of a factor is one of the other's or of the result's.
      a: the factor whose dtype counts.
      b: the other one; its gradient has its own dtype.

    >>> x, weights = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4))
    >>> float32_product("TD,DR->TR", x, weights).dtype.name
    'float32'
    """
    return jnp.einsum(equation, a, b.astype(a.dtype), preferred_element_type=jnp.float32)


def _forward(
    equation: str, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return float32_product(equation, a, b), (a, b)


def _backward(
    equation: str, factors: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    a, b = factors
    names, _, out = equation.partition("->")
    of_a, of_b = names.split(",")
    gradient = gradient.astype(a.dtype)
    return (
        jnp.einsum(f"{out},{of_b}->{of_a}", gradient, b.astype(a.dtype)),
        jnp.einsum(f"{out},{of_a}->{of_b}", gradient, a, preferred_element_type=b.dtype),
    )


float32_product.defvjp(_forward, _backward)
