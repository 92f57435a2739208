"""The dense map by blocks against a plain softmax, and the divergence against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.routers import (
    block_divergence,
    pooled_attention,
    some_tiles,
)

from ..kernels.jaxprs import array_sizes

pytestmark = pytest.mark.usefixtures("compile_cache")

B, T, N, K, H = 2, 11, 4, 2, 3


@pytest.mark.parametrize("packed", [False, True])
def test_the_map_is_the_most_that_any_of_a_tiles_queries_looks_at_a_block(packed):
    rng = np.random.default_rng(0)
    q, k = (2 * rng.normal(size=(B, T, n, H)).astype(np.float32) for n in (N, K))
    segments = np.tile(np.repeat([0, 1], [5, 6]), (B, 1)) if packed else None
    got = jax.jit(lambda q, k: pooled_attention(q, k, block_q=2, block_kv=4, segment_ids=segments))(
        q, k
    )
    assert got.shape == (B, K, 6, 3)
    want = np.zeros((B, K, 6, 3))
    for b, t, n in np.ndindex(B, T, N):
        seen = [s for s in range(t + 1) if not packed or segments[b, s] == segments[b, t]]
        weights = np.exp([q[b, t, n].astype(float) @ k[b, s, n // 2] / H**0.5 for s in seen])
        of_blocks = np.zeros(3)
        np.add.at(of_blocks, np.array(seen) // 4, weights / weights.sum())
        row = want[b, n // 2, t // 2]
        np.maximum(row, of_blocks, out=row)
    want /= want.sum(-1, keepdims=True)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_the_map_of_some_tiles_is_that_part_of_the_whole_one():
    rng = np.random.default_rng(3)
    q, k = (rng.normal(size=(B, T, n, H)).astype(np.float32) for n in (N, K))
    made = jax.jit(lambda at: pooled_attention(q, k, block_q=2, block_kv=4, chosen=at))
    whole = pooled_attention(q, k, block_q=2, block_kv=4)
    for seed in range(3):
        at = some_tiles(6, 0.5, jax.random.key(seed))
        assert len(set(at.tolist())) == 3
        np.testing.assert_allclose(made(at), whole[:, :, at], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.3, 0.001])
def test_every_tile_is_drawn_as_often_as_any_other(share):
    drawn = [some_tiles(10, share, jax.random.key(seed)) for seed in range(400)]
    counts = np.bincount(np.concatenate(drawn), minlength=10)
    expected = 400 * max(1, round(10 * share)) / 10
    assert np.all(np.abs(counts - expected) <= 5 * np.sqrt(expected))


def test_some_of_very_many_tiles_are_distinct_and_evenly_spaced():
    at = np.asarray(some_tiles(100_000, 0.5, None))
    np.testing.assert_array_equal(at, np.arange(0, 100_000, 2))


def test_no_array_is_as_large_as_the_whole_map():
    q = jnp.zeros((1, 512, 1, 2))
    jaxpr = jax.make_jaxpr(lambda q: pooled_attention(q, q, block_q=32, block_kv=32))(q)
    assert max(array_sizes(jaxpr)) == 32 * 512


def test_divergence_is_that_of_the_open_blocks_and_has_a_finite_gradient():
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(1, 2, 4, 5)).astype(np.float32)
    target = rng.random((1, 2, 4, 5)).astype(np.float32)
    open_ = np.arange(5)[None, None, None] < np.arange(4)[None, None, :, None]  # row 0: none
    value, gradient = jax.value_and_grad(block_divergence)(scores, target, open_)
    rows = []
    for k, m in np.ndindex(2, 4):
        if m:
            p = target[0, k, m, :m].astype(float)
            p /= p.sum()
            log_r = scores[0, k, m, :m] - np.log(np.exp(scores[0, k, m, :m].astype(float)).sum())
            rows.append((p * (np.log(p) - log_r)).sum())
    assert float(value) == pytest.approx(np.mean(rows), rel=1e-5)
    assert np.all(np.isfinite(gradient))
    assert np.all(gradient[~np.broadcast_to(open_, gradient.shape)] == 0)
    matched = jnp.log(target)
    assert float(block_divergence(matched, target, open_)) == pytest.approx(0, abs=1e-6)
    nothing, none = jax.value_and_grad(block_divergence)(scores, 0 * target, open_)
    assert float(nothing) == 0
    assert not np.any(none)
