"""Float32 products: einsum's values and gradients, each in the dtype that is promised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.kernels import float32_product

EQUATIONS = ["TD,DR->TR", "BTD,DR->BTR", "BKGTH,BSKH->BKGTS"]
SIZES = {"B": 2, "D": 5, "G": 3, "H": 4, "K": 2, "R": 6, "S": 7, "T": 8}


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"),
                                    ("bfloat16", "float32")])  # fmt: skip
def test_values_and_gradients_are_those_of_einsum(equation, dtypes):
    rng = np.random.default_rng(0)

    def draw(names):
        return rng.normal(size=[SIZES[name] for name in names]).astype(np.float32)

    factors, _, out = equation.partition("->")
    a, b = (jnp.asarray(draw(n), dtype) for n, dtype in zip(factors.split(","), dtypes))
    weights = draw(out)
    got, backward = jax.vjp(lambda a, b: float32_product(equation, a, b), a, b)
    exact = (x.astype(jnp.float32) for x in (a, b))
    want, exact_backward = jax.vjp(lambda a, b: jnp.einsum(equation, a, b), *exact)
    assert got.dtype == jnp.float32
    gradients = backward(weights)
    assert [g.dtype.name for g in gradients] == list(dtypes)
    tolerance = 1e-5 if dtypes == ("float32", "float32") else 1e-2
    for found, true in zip((got, *gradients), (want, *exact_backward(weights))):
        found = np.asarray(found, np.float32)
        assert np.linalg.norm(found - true) <= tolerance * np.linalg.norm(true)
