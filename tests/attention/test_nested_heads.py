import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.attention.nested_heads import (
    absorb_queries,
    head_basis,
    heads_from,
    release_values,
)

CHAINS = [(6, 2, 1), (8, 4, 2, 1), (6, 3)]
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def means(x, count):
    """Heads' means over `count` groups of neighbours."""
    B, S, K, H = x.shape
    return np.asarray(x).reshape(B, S, count, K // count, H).mean(3)


@pytest.mark.parametrize("counts", CHAINS)
def test_the_basis_inverts_and_its_parts_are_the_group_means(counts):
    K = max(counts)
    basis, x = head_basis(counts), normal(2, 3, K, 5)
    heads = heads_from(x, basis, K)
    vectors = np.einsum("KJ,BSJH->BSKH", np.linalg.inv(basis).T, heads)
    np.testing.assert_allclose(vectors, x, rtol=1e-4, atol=1e-5)
    for count in counts:
        np.testing.assert_allclose(
            heads_from(x, basis, count), means(heads, count), rtol=1e-4, atol=1e-5
        )
        # What is left out of the vectors is not read.
        poisoned = x.at[:, :, count:].set(jnp.nan)
        assert np.isfinite(heads_from(poisoned, basis, count)).all()


@pytest.mark.parametrize("counts", CHAINS)
def test_heads_have_more_in_common_than_sets_them_apart(counts):
    basis = head_basis(counts)
    levels = [0, *sorted(counts)]
    shares = [
        (basis[low:high] ** 2).sum(0)  # variance that each head has of a level's vectors
        for low, high in itertools.pairwise(levels)
    ]
    np.testing.assert_allclose(shares[0], 1, rtol=1e-5)
    assert np.ptp(shares[1:]) < 1e-6  # no level and no head stands out
    assert 0 < np.max(shares[1:]) < 0.5


@pytest.mark.parametrize("counts", CHAINS)
def test_absorbed_queries_and_released_values_equal_heads_made(counts):
    K, N = max(counts), 2 * max(counts)
    basis, x, q, w = head_basis(counts), normal(2, 7, K, 5), normal(2, 1, N, 5), normal(2, N, 1, 7)
    for count in counts:
        heads = np.asarray(heads_from(x, basis, count)).repeat(N // count, 2)
        part = np.asarray(x)[:, :, :count].reshape(2, 7, -1)
        scores = np.einsum("BTNC,BSC->BNTS", absorb_queries(q, basis, count), part)
        want = np.einsum("BTNH,BSNH->BNTS", q, heads)
        np.testing.assert_allclose(scores, want, rtol=1e-4, atol=1e-5)
        out = release_values(jnp.asarray(np.einsum("BNTS,BSC->BTNC", w, part)), basis, count)
        want = np.einsum("BNTS,BSNH->BTNH", w, heads)
        np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
