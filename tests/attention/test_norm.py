"""RMS normalisation: unit size, whatever the size before, and never in less than float32."""

import jax
import jax.numpy as jnp
import numpy as np

from routing_jax.attention import rms_norm


def test_size_is_the_scale_and_direction_stays():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 8)).astype(np.float32)
    scale = np.linspace(0.5, 2, 8, dtype=np.float32)
    y = np.asarray(jax.jit(rms_norm, static_argnums=2)(x, scale, 0.0)) / scale
    np.testing.assert_allclose(np.mean(y * y, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(y / x, (y / x)[..., :1].repeat(8, -1), rtol=1e-5)


def test_half_precision_input_is_rounded_once():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(16, 64)), jnp.bfloat16)
    y = rms_norm(x, jnp.full(64, 1.25, jnp.bfloat16), 1e-6)
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    exact *= 1.25 / np.sqrt(np.mean(exact**2, axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8)
