"""Scores of a search: against shares of attention that are written in float64, block by block."""

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


def test_nothing_is_taught_to_queries():
    def total(queries):
        means = jnp.float32(KEYS).reshape(B, J, 1, BLOCK, K, H).mean(3)
        return search_scores(config(means=1), queries, means, PLACES)[:, :, 3, 1:7].sum()

    assert (jax.grad(total)(jnp.float32(QUERIES)) == 0).all()
