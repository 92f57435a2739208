import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.attention.nested_heads import (
    absorb_queries,
    group_means,
    head_basis,
    into_basis,
    release_values,
)

CHAINS = [(6, 2, 1), (8, 4, 2, 1), (6, 3)]
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("counts", CHAINS)
def test_the_basis_inverts_and_its_parts_are_the_group_means(counts):
    K = max(counts)
    basis = head_basis(counts)
    np.testing.assert_allclose(basis @ basis.T, np.eye(K), atol=1e-6)
    x = normal(2, 3, K, 5)
    coefficients = into_basis(x, basis)
    np.testing.assert_allclose(
        np.einsum("JK,BSJH->BSKH", basis, coefficients), x, rtol=1e-4, atol=1e-5
    )
    for count in counts:
        part = np.einsum("JK,BSJH->BSKH", basis[:count], np.asarray(coefficients)[:, :, :count])
        means = np.asarray(x).reshape(2, 3, count, K // count, 5).mean(3)
        np.testing.assert_allclose(group_means(x, count), means, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(part, means.repeat(K // count, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", CHAINS)
def test_absorbed_queries_and_released_values_equal_explicit_pooling(counts):
    K, N = max(counts), 2 * max(counts)
    basis, x, q, w = head_basis(counts), normal(2, 7, K, 5), normal(2, 1, N, 5), normal(2, N, 1, 7)
    coefficients = into_basis(x, basis)
    for count in counts:
        pooled = np.asarray(x).reshape(2, 7, count, -1, 5).mean(3).repeat(N // count, 2)
        part = np.asarray(coefficients)[:, :, :count].reshape(2, 7, -1)
        scores = np.einsum("BTNC,BSC->BNTS", absorb_queries(q, basis, count), part)
        want = np.einsum("BTNH,BSNH->BNTS", q, pooled)
        np.testing.assert_allclose(scores, want, rtol=1e-4, atol=1e-5)
        out = release_values(jnp.asarray(np.einsum("BNTS,BSC->BTNC", w, part)), basis, count)
        want = np.einsum("BNTS,BSNH->BTNH", w, pooled)
        np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
