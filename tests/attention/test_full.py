"""Full attention: grouped heads are shared heads, and only RoPE tells tokens' order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.attention import FullAttention, HeadsConfig

B, T, D = 2, 9, 8


def start(heads):
    rng = np.random.default_rng(0)
    mixer, x = FullAttention(heads), rng.normal(size=(B, T, D)).astype(np.float32)
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    shapes = jax.eval_shape(mixer.init, jax.random.key(0), x, positions)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) / 3, shapes)
    return mixer, params, x, positions


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_grouped_heads_equal_heads_that_repeat(num_kv_heads):
    heads = HeadsConfig(num_heads=4, num_kv_heads=num_kv_heads, head_dim=4)
    grouped, params, x, positions = start(heads)
    repeat = 4 // num_kv_heads
    every = {
        name: np.repeat(p, repeat, axis=1) if name in ("key", "value") else p
        for name, p in params["params"].items()
    }
    plain = FullAttention(HeadsConfig(num_heads=4, num_kv_heads=4, head_dim=4))
    got = jax.jit(grouped.apply)(params, x, positions)[0]
    want = jax.jit(plain.apply)({"params": every}, x, positions)[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_rope_theta_of_zero_leaves_tokens_without_order():
    mixer, params, x, positions = start(HeadsConfig(2, 1, 4, rope_theta=0.0))
    apply = jax.jit(lambda x: mixer.apply(params, x, positions)[0][:, -1])
    swapped = np.array([3, 1, 2, 0, *range(4, T)])
    np.testing.assert_allclose(apply(x[:, swapped]), apply(x), rtol=1e-4, atol=1e-5)
    turned, params, x, positions = start(HeadsConfig(2, 1, 4))
    apply = jax.jit(lambda x: turned.apply(params, x, positions)[0][:, -1])
    assert np.abs(np.asarray(apply(x[:, swapped]) - apply(x))).max() > 1e-2


def test_half_precision_changes_the_result_by_rounding_only():
    mixer, params, x, positions = start(HeadsConfig(4, 2, 4))
    full = np.asarray(jax.jit(mixer.apply)(params, x, positions)[0])
    half = jax.jit(mixer.apply)(params, jnp.bfloat16(x), positions)[0]
    assert half.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(half, np.float32) - full) < 0.02 * np.linalg.norm(full)
