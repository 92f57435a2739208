"""The cache: what padding must not write, and what the convolution remembers."""

import jax
import jax.numpy as jnp
import numpy as np

from routing_jax.attention import LayerCache, push_history, write_kv

B, S, K, H = 2, 8, 2, 3


def test_keys_and_values_land_at_their_positions_and_padding_nowhere():
    rng = np.random.default_rng(0)
    old_k, old_v = rng.normal(size=(2, B, S, K, H)).astype(np.float32)
    new_k, new_v = rng.normal(size=(2, B, 4, K, H)).astype(np.float32)
    positions = np.array([[2, 3, 4, 5], [6, 7, -1, -1]], np.int32)
    cache = LayerCache(*map(jnp.array, (old_k, old_v)), history=jnp.ones(()))
    out = jax.jit(write_kv)(cache, new_k, new_v, positions)
    for b, t in np.ndindex(positions.shape):
        if positions[b, t] >= 0:
            old_k[b, positions[b, t]] = new_k[b, t]
            old_v[b, positions[b, t]] = new_v[b, t]
    np.testing.assert_array_equal(out.keys, old_k)
    np.testing.assert_array_equal(out.values, old_v)
    assert out.history == 1


def test_history_keeps_the_last_valid_inputs_of_each_row():
    W, D = 4, 2
    rng = np.random.default_rng(0)
    history = rng.normal(size=(6, W - 1, D)).astype(np.float32)
    x = rng.normal(size=(6, 5, D)).astype(np.float32)
    counts = np.arange(6)
    positions = np.where(np.arange(5)[None] < counts[:, None], 10 + np.arange(5)[None], -1)
    out = jax.jit(push_history)(history, x, positions)
    for b, count in enumerate(counts):
        seen = np.concatenate([history[b], x[b, :count]])
        np.testing.assert_array_equal(out[b], seen[-(W - 1) :])


def test_a_convolution_of_one_tap_remembers_nothing():
    out = push_history(jnp.zeros((B, 0, 3)), jnp.ones((B, 2, 3)), jnp.array([[0, 1], [0, -1]]))
    assert out.shape == (B, 0, 3)
