"""Compaction loses no token, runs the smallest capacity that holds them, and nothing for none."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from routing_jax.kernels import capacity_ladder, compact, map_routed


@given(st.integers(1, 1 << 20))
def test_ladder_rises_from_nothing_to_everything_in_small_steps(length):
    ladder = capacity_ladder(length)
    assert ladder[0] == 0
    assert ladder[-1] == length
    assert all(a < b for a, b in itertools.pairwise(ladder))
    inner = ladder[1:-1]
    assert all(c <= length // 4 for c in inner)
    # One more token than a step never makes the next step work on more than half as many again.
    assert all(b <= 1.5 * a for a, b in itertools.pairwise(inner))
    if length >= 32:
        assert inner[0] <= max(8, length / 256)
        assert inner[-1] * 1.5 > length // 4
    assert len(ladder) <= 2 + 2 * math.log2(2 * 256 / 4)


def test_ladder_refuses_an_empty_sequence():
    with pytest.raises(ValueError, match="length must be at least 1; it is 0"):
        capacity_ladder(0)


MASKS = arrays(bool, (3, 17))
compact_jit = jax.jit(compact, static_argnums=1)


@given(MASKS, st.sampled_from([0, 5, 17]))
@settings(max_examples=60)
def test_compact_equals_nonzero(mask, capacity):
    mask &= np.cumsum(mask, axis=1) <= capacity
    positions = np.asarray(compact_jit(mask, capacity))
    for row, got in zip(mask, positions):
        (want,) = row.nonzero()
        np.testing.assert_array_equal(
            got, np.pad(want, (0, capacity - len(want)), constant_values=-1)
        )


T = 64  # capacities 0, 8, 12, 16, 64


@functools.partial(jax.jit, static_argnums=0)
def mapped(fn, x, mask, otherwise=None):
    return map_routed(fn, x, mask, otherwise)


def mask_with_counts(*counts, seed=0):
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.arange(T) < count) for count in counts]
    return np.array(rows)


def token_function(x, positions):
    """A number that tells token and position, wide as two."""
    return jnp.concatenate([3 * x + positions[:, :, None], x * x], axis=-1)


@pytest.mark.parametrize("fullest", [0, 1, 8, 9, 12, 13, 16, 17, 40, T])
def test_map_routed_equals_the_masked_computation_exactly(fullest):
    x = jnp.array(np.random.default_rng(1).integers(-50, 50, (3, T, 1)), jnp.float32)
    mask = mask_with_counts(fullest, fullest // 2, 0)
    everywhere = token_function(x, jnp.broadcast_to(jnp.arange(T), (3, T)))
    want = np.where(mask[:, :, None], everywhere, 0)
    np.testing.assert_array_equal(mapped(token_function, x, mask), want)
    want = np.where(mask[:, :, None], everywhere, -everywhere)
    np.testing.assert_array_equal(mapped(token_function, x, mask, -everywhere), want)


def capacity_it_ran_with(x, positions):
    del positions
    return jnp.full((*x.shape[:2], 1), x.shape[1], jnp.float32)


def test_map_routed_runs_the_smallest_capacity_that_holds_the_fullest_row():
    x = jnp.zeros((2, T, 1))
    for fullest in range(1, T + 1):
        mask = mask_with_counts(1, fullest)
        out = np.asarray(mapped(capacity_it_ran_with, x, mask))
        assert set(out[mask].ravel()) == {min(c for c in (8, 12, 16, 64) if c >= fullest)}


def poison(x, positions):
    del positions
    return x * jnp.nan


def test_map_routed_runs_nothing_when_nothing_is_routed():
    x = jnp.ones((2, T, 1))
    assert np.all(np.asarray(mapped(poison, x, mask_with_counts(0, 0))) == 0)
    one = mask_with_counts(0, 1)
    np.testing.assert_array_equal(np.isnan(mapped(poison, x, one))[:, :, 0], one)


summed_gradient = jax.jit(jax.grad(lambda x, mask: map_routed(token_function, x, mask).sum()))


@pytest.mark.parametrize("fullest", [0, 5, 14, T])
def test_map_routed_has_the_gradient_of_the_masked_computation(fullest):
    x = jnp.array(np.random.default_rng(1).normal(size=(2, T, 1)), jnp.float32)
    mask = mask_with_counts(fullest, fullest // 3)
    gradient = summed_gradient(x, mask)
    want = np.where(mask[:, :, None], 3 + 2 * x, 0)
    np.testing.assert_allclose(gradient, want, rtol=1e-6)
