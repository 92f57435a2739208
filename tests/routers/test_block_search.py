"""A search: what is kept of keys, and its scores against shares of attention in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.kernels import apply_rope, contiguous_pages
from routing_jax.routers import (
    SparseModeConfig,
    search_keys,
    search_scores,
    searchable_blocks,
    slow_channels,
)

B, M, N, K, H, J, BLOCK = 2, 5, 6, 3, 8, 9, 8
RNG = np.random.default_rng(0)
QUERIES, KEYS = RNG.normal(size=(B, M, N, H)), RNG.normal(size=(B, J * BLOCK, K, H))
PLACES = np.array([[3, 31, 50, 71, -1]])


def config(**changes):
    fields = {"sink": 8, "window": 16, "channels": 4, "block_q": 1, "block_kv": BLOCK}
    return SparseModeConfig(mode="topk", **(fields | changes))


@functools.partial(jax.jit, static_argnums=0)
def score(cfg, queries, keys):
    pages = contiguous_pages(len(keys), keys.shape[1] // BLOCK)
    return search_scores(cfg, queries, search_keys(cfg, keys), pages, jnp.array(PLACES))


def scores(cfg, queries, keys):
    return score(cfg, jnp.float32(queries), jnp.float32(keys))


@pytest.mark.parametrize("head_dim", [8, 64])
def test_the_channels_are_those_that_turn_least(head_dim):
    x = jnp.ones((1, 2, 1, head_dim))
    turned = jnp.abs(apply_rope(x, jnp.array([[0, 1]])) - x)[0, 1, 0]
    count = head_dim // 4
    # A pair of channels turns together, so that the moves of both are told by their sum.
    moved = turned[: head_dim // 2] + turned[head_dim // 2 :]
    slow = jnp.argsort(moved)[: count // 2]
    want = jnp.sort(jnp.concatenate([slow, slow + head_dim // 2]))
    np.testing.assert_array_equal(slow_channels(jnp.arange(head_dim), count), want)


def test_blocks_keep_the_channels_of_their_keys_and_nothing_past_the_end():
    kept = np.asarray(search_keys(config(), jnp.float32(KEYS[:, :22])))
    assert kept.shape == (B * 3, K, BLOCK, 4)
    for b, t in np.ndindex(B, 24):
        here = kept[b * 3 + t // BLOCK, :, t % BLOCK]
        want = np.float32(KEYS[b, t][:, [2, 3, 6, 7]]) if t < 22 else 0
        np.testing.assert_array_equal(here, np.broadcast_to(want, here.shape))


@pytest.mark.parametrize("channels", [2, 4, 8])
def test_scores_are_shares_of_attention_by_those_channels_over_blocks_that_compete(channels):
    cfg = config(channels=channels)
    got = np.exp(scores(cfg, QUERIES, KEYS))
    some = [*range(4 - channels // 2, 4), *range(8 - channels // 2, 8)]
    for b, k, m in np.ndindex(B, K, M):
        block = np.arange(J)
        open_ = (block >= 1) & (block <= PLACES[0, m] // BLOCK - 2)
        want = np.zeros(J)
        for head in range(2 * k, 2 * k + 2):
            logits = KEYS[b, :, k][:, some] @ QUERIES[b, m, head, some] / np.sqrt(H)
            weights = np.exp(logits).reshape(J, BLOCK).sum(-1)[open_]
            want[open_] += weights / weights.sum() / 2
        np.testing.assert_allclose(got[b, k, m], want, rtol=1e-4, atol=1e-6)
    assert (np.asarray(searchable_blocks(cfg, PLACES, J)).sum(-1) == [0, 1, 4, 6, 0]).all()


def test_one_key_among_many_is_found_that_their_mean_would_hide():
    keys = np.zeros((1, J * BLOCK, 1, H))
    keys[0, :, 0, 2] = 1.0  # filler
    keys[0, 3 * BLOCK : 4 * BLOCK, 0, 3] = -2.0
    keys[0, 3 * BLOCK + 5, 0, 3] = 8.0  # what is looked for, among keys that point away from it
    query = np.zeros((1, M, 1, H))
    query[..., 3] = 3.0
    means = keys.reshape(J, BLOCK, H).mean(1) @ query[0, 3, 0]
    assert np.argmax(means[1:7]) != 2
    assert np.argmax(scores(config(), query, keys)[0, 0, 3]) == 3


def test_what_turns_fast_is_not_looked_at():
    fast = np.array([1, 1, 0, 0, 1, 1, 0, 0])
    moved = KEYS + 5 * fast * RNG.normal(size=KEYS.shape)
    np.testing.assert_array_equal(scores(config(), QUERIES, moved), scores(config(), QUERIES, KEYS))


def test_far_shares_keep_their_order():
    """Beyond what float32 holds as a number: logarithms are compared."""
    keys = np.arange(J).repeat(BLOCK).reshape(1, -1, 1, 1) * np.ones((1, 1, 1, H)) * 100.0
    found = np.asarray(scores(config(), np.ones((1, M, 1, H)), keys))[0, 0, 3, 1:7]
    assert (np.diff(found) > 0).all()
    assert np.exp(found[0]) == 0


def test_nothing_is_taught_to_queries_and_keys():
    def total(queries, keys):
        return score(config(), queries, keys)[:, :, 3, 1:7].sum()

    slopes = jax.grad(total, (0, 1))(jnp.float32(QUERIES), jnp.float32(KEYS))
    assert all((slope == 0).all() for slope in slopes)
