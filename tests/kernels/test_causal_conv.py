"""The causal convolution against a loop over taps, whole and in parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.kernels import causal_conv

B, T, D = 2, 9, 3
conv = jax.jit(causal_conv)
SEGMENTS = np.array([[0] * 4 + [1] * 5, [2] * 1 + [3] * 2 + [4] * 6], np.int32)


def make_inputs(width, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(B, T, D)).astype(np.float32)
    return jnp.array(x), jnp.array(rng.normal(size=(width, D)).astype(np.float32))


def conv_by_loop(x, kernel, history=None, segment_ids=None):
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    width, out = len(kernel), np.zeros(x.shape)
    for b, t, back in np.ndindex(B, x.shape[1], width):
        tap, source = kernel[width - 1 - back], t - back
        if source >= 0 and (segment_ids is None or segment_ids[b, source] == segment_ids[b, t]):
            out[b, t] += tap * x[b, source]
        elif source < 0 and history is not None:
            out[b, t] += tap * np.asarray(history)[b, source]
    return out


@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["one segment", "segments"])
@pytest.mark.parametrize("width", [1, 2, 4, T + 2])
def test_equals_a_loop_over_taps(width, segment_ids):
    x, kernel = make_inputs(width)
    want = conv_by_loop(x, kernel, segment_ids=segment_ids)
    out = conv(x, kernel, segment_ids=segment_ids)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_history_stands_before_the_input(width):
    x, kernel = make_inputs(width)
    history = jnp.array(np.random.default_rng(1).normal(size=(B, width - 1, D)), jnp.float32)
    want = conv_by_loop(x, kernel, history)
    np.testing.assert_allclose(conv(x, kernel, history=history), want, rtol=1e-5, atol=1e-6)


def test_parts_with_history_equal_the_whole():
    x, kernel = make_inputs(4)
    whole = conv(x, kernel)
    for cut in (3, 5, T - 1):
        rest = conv(x[:, cut:], kernel, history=x[:, cut - 3 : cut])
        np.testing.assert_allclose(rest, whole[:, cut:], rtol=1e-6)


def test_gradient_reaches_the_last_tokens_and_no_others():
    width = 4
    x, kernel = make_inputs(width)
    jacobian = jax.jit(jax.jacobian(lambda x: conv(x, kernel).sum((0, 2))))(x)  # [T, B, S, D]
    size = np.abs(np.asarray(jacobian)).sum((1, 3))
    t, s = np.indices((T, T))
    assert np.all((size > 0) == ((s <= t) & (s > t - width)))


def test_inputs_that_do_not_fit_are_refused():
    x, kernel = make_inputs(4)
    with pytest.raises(ValueError, match=r"kernel must be \[W,D\] with D=3"):
        causal_conv(x, kernel[:, :2])
    with pytest.raises(ValueError, match=r"history must be \[B,W-1,D\] = \(2, 3, 3\)"):
        causal_conv(x, kernel, history=jnp.zeros((B, 4, D)))
