"""What every mixer owes: causality, packed equals separate, and a cost that counts its work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.attention import (
    CausalConv,
    FullAttention,
    HeadsConfig,
    RoutedConv,
    attention_work,
    visible_pairs,
)
from routing_jax.routers import TokenRouterConfig

D, W = 8, 3
HEADS = HeadsConfig(num_heads=4, num_kv_heads=2, head_dim=4)
RAGGED = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3, 4, 5, 6, -1, -1, -1]], np.int32)
SEGMENTS = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2], [5, 6, 6, 6, 6, 6, 7, 7, 7, 7]], np.int32)


def make_mixer(kind, bias=0.0, summary=0):
    if kind == "full":
        return FullAttention(HEADS)
    if kind == "conv":
        return CausalConv(HEADS, W)
    return RoutedConv(HEADS, TokenRouterConfig(hidden=4, bias=bias, summary=summary), W)


def make_params(mixer, x, positions):
    """From numpy, as compiling an initialiser takes longer than the rest of a test."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(mixer.init, jax.random.key(0), x, positions)["params"]
    router = shapes.pop("router", {})
    params = {k: rng.normal(size=s.shape) / s.shape[0] ** 0.5 for k, s in shapes.items()}
    if router:  # scores that differ from token to token
        params["router"] = {k: rng.normal(size=s.shape) * (s.ndim > 0) for k, s in router.items()}
    return jax.tree.map(np.float32, params)


def start(mixer, batch=2, length=10):
    x = np.random.default_rng(0).normal(size=(batch, length, D)).astype(np.float32)
    positions = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    return {"params": make_params(mixer, x, positions)}, x, positions


def reach(mixer, mode, rng=None, length=10):
    """[T,S]: how much of token s's gradient each token's output gives it."""
    params, x, positions = start(mixer, 1, length)

    def outputs(x):
        y, _, report = mixer.apply(params, x, positions, None, None, rng, mode)
        return y[0].sum(-1), report.choice[0]

    jacobian, choice = jax.jit(jax.jacobian(outputs, has_aux=True))(x)
    return np.abs(np.asarray(jacobian)).sum((1, 3)), np.asarray(choice)


T, S = np.indices((10, 10))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_full_attention_reaches_every_earlier_token_and_no_later_one(mode):
    size, _ = reach(make_mixer("full"), mode)
    np.testing.assert_array_equal(size > 0, S <= T)


def test_convolution_reaches_its_window_and_no_further():
    size, _ = reach(make_mixer("conv"), "eval")
    np.testing.assert_array_equal(size > 0, (S <= T) & (S > T - W))


@pytest.mark.parametrize("mode", ["masked", "eval"])
def test_a_routed_token_reaches_back_and_another_only_its_window(mode):
    size, choice = reach(make_mixer("routed"), mode)
    assert 0 < choice.sum() < 10
    window = (S <= T) & (S > T - W)
    np.testing.assert_array_equal(size > 0, np.where(choice[:, None], S <= T, window))


@pytest.mark.parametrize("summary", [0, 3])
def test_training_noise_and_summary_let_nothing_through_from_later_tokens(summary):
    size, choice = reach(make_mixer("routed", summary=summary), "train", jax.random.key(3))
    assert 0 < choice.sum() < 10
    assert np.all(size[S > T] == 0)
    assert np.all(size[(S <= T) & (choice[:, None] | (summary > 0))] > 0)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("full", "eval"), ("conv", "eval"), ("routed", "masked"), ("routed", "eval")],
)
def test_packed_segments_equal_separate_sequences(kind, mode):
    mixer, lengths = make_mixer(kind, summary=3), (17, 1, 22)
    params, x, running = start(mixer, 1, sum(lengths))
    apply = jax.jit(lambda x, p, s: mixer.apply(params, x, p, s, mode=mode)[::2])
    segments = np.repeat(np.arange(3, dtype=np.int32), lengths)[None]
    restarting = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])[None]
    alone = []
    for part in np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1]):
        alone.append(apply(x[:, part], restarting[:, part], np.zeros((1, len(part)), np.int32)))
    for positions in (running, restarting):
        packed, report = apply(x, positions, segments)
        if kind == "routed":
            assert 0 < report.choice.sum() < sum(lengths)
        want = np.concatenate([y for y, _ in alone], axis=1)
        np.testing.assert_allclose(packed, want, rtol=1e-4, atol=1e-5)
        chosen = np.concatenate([report.choice for _, report in alone], axis=1)
        np.testing.assert_array_equal(report.choice, chosen)


@pytest.mark.parametrize("kind", ["full", "conv", "routed"])
def test_rows_do_not_look_at_each_other(kind):
    mixer = make_mixer(kind, summary=2)
    params, x, positions = start(mixer, 3)
    apply = jax.jit(lambda x: mixer.apply(params, x, positions, mode="eval")[0])
    order = np.array([2, 0, 1])
    shuffled = apply(x[order])
    np.testing.assert_allclose(shuffled, np.asarray(apply(x))[order], rtol=1e-5, atol=1e-6)


def pairs_by_loop(positions, segment_ids):
    pairs = np.zeros(positions.shape)
    for b, t in np.ndindex(positions.shape):
        if positions[b, t] >= 0:
            pairs[b, t] = sum(
                segment_ids is None or segment_ids[b, s] == segment_ids[b, t] for s in range(t + 1)
            )
    return pairs


@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["one segment", "segments"])
def test_visible_pairs_are_counted_one_by_one(segment_ids):
    got = visible_pairs(jnp.array(RAGGED), segment_ids)
    np.testing.assert_array_equal(got, pairs_by_loop(RAGGED, segment_ids))


@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["one segment", "segments"])
def test_convolution_costs_its_taps(segment_ids):
    mixer = make_mixer("conv")
    params, x, _ = start(mixer)
    _, _, report = jax.jit(mixer.apply)(params, x, jnp.array(RAGGED), segment_ids)
    taps = sum(W * D for position in RAGGED.ravel() if position >= 0)
    dense = pairs_by_loop(RAGGED, segment_ids).sum() * 2 * HEADS.num_heads * HEADS.head_dim
    assert float(report.cost) == pytest.approx(taps / dense, rel=1e-6)
    assert float(report.kv_cost) == float(report.usage) == 0
    assert not np.any(report.choice)


def test_full_attention_costs_one_and_reads_its_share_of_heads():
    mixer = make_mixer("full")
    params, x, _ = start(mixer)
    _, _, report = jax.jit(mixer.apply)(params, x, jnp.array(RAGGED))
    assert float(report.cost) == float(report.usage) == 1
    assert float(report.kv_cost) == 0.5
    np.testing.assert_array_equal(report.choice, RAGGED >= 0)


@pytest.mark.parametrize("kind", ["conv", "routed"])
def test_a_batch_of_padding_costs_nothing(kind):
    mixer = make_mixer(kind)
    params, x, positions = start(mixer)
    _, _, report = jax.jit(mixer.apply)(params, x, np.full_like(positions, -1))
    assert float(report.cost) == float(report.kv_cost) == float(report.usage) == 0


def test_attention_work_counts_scores_and_values():
    N, H, pairs = 3, 5, 7
    scores = values = pairs * N * H
    assert float(attention_work(jnp.float32(pairs), N, H)) == scores + values
