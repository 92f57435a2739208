"""A block's keys are weighted means of its parts, and training turns them to what is looked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.routers import pooled_keys, weighed

B, T, K, H, BLOCK = 2, 22, 3, 4, 8
KEYS = np.random.default_rng(0).normal(size=(B, T, K, H)).astype(np.float32)
VALID = np.arange(T)[None] < np.array([[22], [13]])
DIRECTION = np.random.default_rng(1).normal(size=(K, H)).astype(np.float32) / 2


@pytest.mark.parametrize("direction", [None, DIRECTION])
@pytest.mark.parametrize("count", [1, 4])
def test_a_blocks_keys_are_the_means_of_its_parts_by_their_weights(count, direction):
    sums, means = pooled_keys(KEYS, VALID, BLOCK, count, direction)
    assert means.shape == (B, 3, count, K, H)
    size = BLOCK // count
    for b, j, part, h in np.ndindex(B, 3, count, K):
        first = j * BLOCK + part * size
        here = [t for t in range(first, min(T, first + size)) if VALID[b, t]]
        keys = np.float64(KEYS[b, here, h])
        along = 0 if direction is None else keys @ direction[h] * H
        weights = np.exp(along) * np.ones(len(here))
        want = (weights[:, None] * keys).sum(0)
        np.testing.assert_allclose(sums.keys[b, j, part, h], want, rtol=1e-4, atol=1e-5)
        mean = want / weights.sum() if here else np.zeros(H)
        np.testing.assert_allclose(means[b, j, part, h], mean, rtol=1e-4, atol=1e-5)
        if direction is not None:
            np.testing.assert_allclose(sums.weights[b, j, part, h], weights.sum(), rtol=1e-4)
    assert (sums.weights is None) == (direction is None)


def test_tokens_one_by_one_add_up_to_their_block():
    sums, _ = pooled_keys(KEYS, VALID, BLOCK, 2, DIRECTION)
    one = weighed(KEYS, DIRECTION)
    for all_of_it, each in zip(sums, one):
        second = each[0, BLOCK // 2 : BLOCK]
        np.testing.assert_allclose(all_of_it[0, 0, 1], second.sum(0), rtol=1e-5)


def test_no_weight_is_beyond_float32():
    _, means = pooled_keys(1e4 * KEYS, VALID, BLOCK, 1, DIRECTION)
    assert np.isfinite(means).all()
    assert np.abs(means[0]).max() > 1e3


def test_the_direction_alone_is_taught():
    def loss(keys, direction):
        return jnp.sum(pooled_keys(keys, VALID, BLOCK, 2, direction)[1] ** 2)

    of_keys, of_direction = jax.grad(loss, (0, 1))(KEYS, DIRECTION)
    assert (of_keys == 0).all()
    assert np.abs(of_direction).min() > 0
