"""Linear attention: the sum it stands for, in chunks, in segments, and a token at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.attention import (
    HeadsConfig,
    LayerCache,
    LinearAttention,
    empty_linear_memory,
    linear_attention,
)

pytestmark = pytest.mark.usefixtures("compile_cache")

B, T, D = 2, 13, 6
HEADS = HeadsConfig(num_heads=4, num_kv_heads=2, head_dim=4)
SEGMENTS = np.array([[0] * 5 + [1] * 8, [3] * 1 + [4] * 9 + [5] * 3], np.int32)
PLACES = np.tile(np.arange(T, dtype=np.int32), (B, 1))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_pairs(q, k, v, segments):
    """The same sum over every visible pair, in float64."""

    def phi(x):
        return np.where(x > 0, x + 1, np.exp(x))

    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(*q.shape[:3]):
        seen = [s for s in range(t + 1) if segments is None or segments[b, s] == segments[b, t]]
        weights = [phi(q[b, t, n]) @ phi(k[b, s, n // 2]) for s in seen]
        out[b, t, n] = sum(w * v[b, s, n // 2] for w, s in zip(weights, seen)) / sum(weights)
    return out


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one segment", "segments"])
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_chunks_add_up_to_the_sum_over_pairs(chunk, segments):
    q, k, v = draw(B, T, 4, 4), draw(B, T, 2, 4, seed=1), draw(B, T, 2, 4, seed=2)
    y, _ = jax.jit(
        lambda q, k, v: linear_attention(
            q,
            k,
            v,
            empty_linear_memory(HEADS, B),
            valid=jnp.ones((B, T), bool),
            segment_ids=segments,
            chunk=chunk,
        )
    )(q, k, v)
    np.testing.assert_allclose(y, by_pairs(q, k, v, segments), rtol=1e-4, atol=1e-5)


def run(mode, *args):
    mixer, x = LinearAttention(HEADS), draw(B, T, D)
    shapes = jax.eval_shape(mixer.init, jax.random.key(0), x, PLACES)["params"]
    params = {name: draw(*leaf.shape, seed=9) for name, leaf in shapes.items()}
    return jax.jit(lambda *a: mixer.apply({"params": params}, *a, mode=mode))(*args)


def test_no_gradient_reaches_back_from_later_tokens():
    def outputs(x):
        return run("train", x, PLACES)[0][0].sum(-1)

    jacobian = jax.jacobian(outputs)(draw(B, T, D))[:, 0]
    size = np.abs(jacobian).sum(-1)
    np.testing.assert_array_equal(size > 0, np.tril(np.ones((T, T), bool)))


def test_prefill_and_decode_equal_the_whole_sequence():
    x = draw(B, T, D)
    want, _, report = run("eval", x, PLACES)
    lengths = np.array([9, 4])
    prompt = np.where(PLACES[:, :9] < lengths[:, None], PLACES[:, :9], -1)
    cache = LayerCache(memory=empty_linear_memory(HEADS, B))
    y, cache, _ = run("prefill", x[:, :9], prompt, None, cache)
    for b, n in enumerate(lengths):
        np.testing.assert_allclose(y[b, :n], want[b, :n], rtol=1e-4, atol=1e-5)
    rows = np.arange(B)
    for step in range(4):
        at = lengths + step
        y, cache, _ = run("decode", x[rows, at][:, None], at[:, None].astype(np.int32), None, cache)
        np.testing.assert_allclose(y[:, 0], want[rows, at], rtol=1e-4, atol=1e-5)
    assert float(report.kv_cost) == 0
    assert not report.choice.any()


def test_cost_counts_chunks_and_memory():
    _, _, report = run("eval", draw(B, T, D), PLACES)
    N, K, H, chunk = 4, 2, 4, T
    in_chunk = 2 * N * H * chunk  # scores and values of a whole chunk, masked or not
    reading, adding = N * H * H + N * H, K * H * H
    dense = B * T * (T + 1) / 2 * 2 * N * H
    want = B * T * (in_chunk + reading + adding) / dense
    assert float(report.cost) == pytest.approx(want, rel=1e-6)
