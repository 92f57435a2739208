"""A search: its mean keys, and its scores against shares of attention written in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.routers import SparseModeConfig, pooled_keys, search_scores, searchable_blocks

B, M, N, K, H, J, BLOCK = 2, 5, 6, 3, 4, 9, 8
RNG = np.random.default_rng(0)
QUERIES, KEYS = RNG.normal(size=(B, M, N, H)), RNG.normal(size=(B, J * BLOCK, K, H))
PLACES = np.array([[3, 31, 50, 71, -1]])


def config(**changes):
    fields = {"sink": 8, "window": 16, "means": 4, "block_q": 1, "block_kv": BLOCK}
    return SparseModeConfig(mode="topk", **(fields | changes))


def scores(cfg, queries, keys):
    valid = jnp.ones(keys.shape[:2], bool)
    means = pooled_keys(jnp.float32(keys), valid, BLOCK, cfg.means)[1]
    return jax.jit(search_scores, static_argnums=0)(cfg, jnp.float32(queries), means, PLACES)


@pytest.mark.parametrize("count", [1, 4])
def test_a_blocks_keys_are_the_means_of_its_parts(count):
    keys = np.float32(KEYS[:, :22])
    valid = np.arange(22)[None] < np.array([[22], [13]])
    sums, means = pooled_keys(keys, valid, BLOCK, count)
    assert sums.shape == means.shape == (B, 3, count, K, H)
    size = BLOCK // count
    for b, j, part in np.ndindex(B, 3, count):
        first = j * BLOCK + part * size
        here = [t for t in range(first, min(22, first + size)) if valid[b, t]]
        want = np.float64(keys[b, here]).sum(0)
        np.testing.assert_allclose(sums[b, j, part], want, rtol=1e-4, atol=1e-5)
        mean = want / max(1, len(here))
        np.testing.assert_allclose(means[b, j, part], mean, rtol=1e-4, atol=1e-5)


def test_sums_of_sixteen_bit_keys_are_those_of_their_values():
    keys = jnp.bfloat16(KEYS)
    sums, means = pooled_keys(keys, jnp.ones(keys.shape[:2], bool), BLOCK, 2)
    assert sums.dtype == means.dtype == jnp.float32
    want = np.asarray(keys, np.float64).reshape(B, J, 2, BLOCK // 2, K, H).sum(3)
    np.testing.assert_allclose(sums, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("means", [1, 2, 8])
def test_scores_are_shares_of_attention_to_the_mean_keys_of_blocks_that_compete(means):
    cfg = config(means=means)
    got = np.exp(scores(cfg, QUERIES, KEYS))
    pooled = KEYS.reshape(B, J, means, BLOCK // means, K, H).mean(3)
    for b, k, m in np.ndindex(B, K, M):
        block = np.arange(J)
        open_ = (block >= 1) & (block <= PLACES[0, m] // BLOCK - 2)
        want = np.zeros(J)
        for head in range(2 * k, 2 * k + 2):
            weights = np.exp(pooled[b, open_, :, k] @ QUERIES[b, m, head] / 2).sum(-1)
            want[open_] += weights / weights.sum() / 2
        np.testing.assert_allclose(got[b, k, m], want, rtol=1e-4, atol=1e-6)
    assert (np.asarray(searchable_blocks(cfg, PLACES, J)).sum(-1) == [0, 1, 4, 6, 0]).all()


def test_as_many_means_as_keys_find_where_attention_goes():
    """Then nothing is estimated: shares are those of attention over the blocks that compete."""
    got = np.exp(scores(config(means=BLOCK), QUERIES, KEYS))[:, :, 3]
    queries = QUERIES[:, 3].reshape(B, K, 2, H)
    weights = np.exp(np.einsum("bkgh,bskh->bkgs", queries, KEYS[:, BLOCK : 7 * BLOCK]) / 2)
    shares = (weights / weights.sum(-1, keepdims=True)).mean(2).reshape(B, K, 6, BLOCK).sum(-1)
    np.testing.assert_allclose(got[:, :, 1:7], shares, rtol=1e-4)


def test_one_key_among_many_is_found_by_several_means_and_not_by_one():
    keys = np.zeros((1, J * BLOCK, 1, 2))
    keys[0, :, 0, 1] = 1.0  # filler
    keys[0, 3 * BLOCK : 4 * BLOCK, 0, 0] = -1.0
    keys[0, 3 * BLOCK + 5, 0, 0] = 6.0  # what is looked for, among keys that point away from it
    query = np.array([2.0, 0.0]).reshape(1, 1, 1, 2).repeat(M, axis=1)
    one, several = (scores(config(means=n), query, keys)[0, 0, 3] for n in (1, 8))
    assert np.argmax(several) == 3
    assert np.argmax(one) != 3


def test_far_shares_keep_their_order():
    """Beyond what float32 holds as a number: logarithms are compared."""
    keys = np.arange(J).repeat(BLOCK).reshape(1, -1, 1, 1) * np.ones((1, 1, 1, H)) * 100.0
    found = np.asarray(scores(config(), np.ones((1, M, 1, H)), keys))[0, 0, 3, 1:7]
    assert (np.diff(found) > 0).all()
    assert np.exp(found[0]) == 0


def test_nothing_is_taught_to_queries_and_keys():
    def total(queries, keys):
        _, means = pooled_keys(keys, jnp.ones(keys.shape[:2], bool), BLOCK, 1)
        return search_scores(config(means=1), queries, means, PLACES)[:, :, 3, 1:7].sum()

    slopes = jax.grad(total, (0, 1))(jnp.float32(QUERIES), jnp.float32(KEYS))
    assert all((slope == 0).all() for slope in slopes)
