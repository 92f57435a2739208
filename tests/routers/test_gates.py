"""Gates: the threshold without noise, the stated odds with it, and the soft gate's gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing_jax.routers import binary_entropy, binary_gate, largest, straight_through

# Much nearer to 0 a float32 sigmoid rounds to one half exactly.
LOGITS = st.floats(2**-20, 50, width=32).flatmap(lambda x: st.sampled_from([x, -x]))
gate_jit = jax.jit(binary_gate)


@given(st.lists(LOGITS, min_size=8, max_size=8))
def test_without_noise_the_gate_is_the_threshold_of_the_probabilities(logits):
    gate = gate_jit(np.array(logits, np.float32), None)
    np.testing.assert_array_equal(gate.choice, np.asarray(gate.probs) > 0.5)
    np.testing.assert_array_equal(gate.value, np.asarray(gate.choice, np.float32))


def test_with_noise_the_gate_opens_with_the_probability_of_its_logit():
    samples = 40_000
    logits = jnp.array([-4.0, -1.5, -0.3, 0.0, 0.7, 2.0, 4.0])
    gate = gate_jit(jnp.tile(logits, (samples, 1)), jax.random.key(0))
    odds = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    spread = np.sqrt(odds * (1 - odds) / samples)
    share = np.asarray(gate.choice).mean(0)
    assert np.all(np.abs(share - odds) < 4 * spread)
    # The probabilities reported are free of noise.
    np.testing.assert_allclose(gate.probs[0], odds, rtol=1e-5)
    np.testing.assert_array_equal(gate.probs[0], gate.probs[-1])


def test_noise_is_independent_from_gate_to_gate():
    gate = gate_jit(jnp.zeros((20_000, 2)), jax.random.key(1))
    a, b = np.asarray(gate.choice, np.float64).T
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(len(a))


def test_noise_follows_its_key():
    logits = jnp.zeros(1000)
    one, again, other = (gate_jit(logits, jax.random.key(seed)).choice for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, again)
    assert 300 < np.sum(np.asarray(one) != np.asarray(other)) < 700


def test_straight_through_is_hard_to_the_last_bit():
    soft = jnp.array(np.random.default_rng(0).uniform(size=1000), jnp.float32)
    hard = soft > 0.3
    np.testing.assert_array_equal(straight_through(hard, soft), np.asarray(hard, np.float32))
    gradient = jax.grad(lambda s: jnp.sum(straight_through(hard, s) * jnp.arange(1000.0)))(soft)
    np.testing.assert_array_equal(gradient, np.arange(1000.0))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("rng", [None, 5], ids=["no noise", "noise"])
def test_gate_has_the_gradient_of_the_soft_gate(temperature, rng):
    key = None if rng is None else jax.random.key(rng)
    logits = jnp.linspace(-3, 3, 50)
    noise = 0.0 if key is None else np.asarray(jax.random.logistic(key, logits.shape), np.float64)
    gradient = jax.grad(lambda x: jnp.sum(binary_gate(x, key, temperature).value))(logits)
    soft = 1 / (1 + np.exp(-(np.asarray(logits, np.float64) + noise) / temperature))
    np.testing.assert_allclose(gradient, soft * (1 - soft) / temperature, rtol=1e-4, atol=1e-7)


def test_entropy_is_that_of_the_odds_and_its_gradient_finite_everywhere():
    logits = np.array([-1e4, -60.0, -3.0, -0.1, 0.0, 0.1, 3.0, 60.0, 1e4], np.float32)
    odds = 1 / (1 + np.exp(-logits[2:-2].astype(np.float64)))
    want = -odds * np.log(odds) - (1 - odds) * np.log(1 - odds)
    entropy = np.asarray(binary_entropy(jnp.array(logits)))
    np.testing.assert_allclose(entropy[2:-2], want, rtol=1e-5)
    np.testing.assert_allclose(entropy[[0, 1, -2, -1]], 0, atol=1e-5)
    gradient = jax.grad(lambda x: binary_entropy(x).sum())(jnp.array(logits))
    np.testing.assert_allclose(
        gradient[2:-2], -logits[2:-2] * odds * (1 - odds), rtol=1e-5, atol=1e-8
    )
    assert np.all(np.isfinite(gradient))


def test_the_largest_is_what_argmax_finds():
    x = np.random.default_rng(0).integers(0, 3, size=(200, 4)).astype(np.float32)  # full of equals
    np.testing.assert_array_equal(jax.jit(largest)(x), np.argmax(x, axis=-1))
    assert 0 <= int(largest(jnp.full(3, jnp.nan))) < 3
