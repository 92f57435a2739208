"""Evaluation: the figures a reader could count by hand, skipping or not."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.evals import mixing_time
from routing_jax.evals.evaluate import evaluate, routed_tokens
from routing_jax.evals.mixing_time import mixing_milliseconds
from routing_jax.models import Decoder, DecoderConfig, init_params
from routing_jax.routers import TokenRouterConfig

CONFIG = DecoderConfig(
    vocab_size=12,
    width=8,
    layers="conv,routed",
    head_dim=4,
    mlp_width=0,
    router=TokenRouterConfig(hidden=4, bias=0.0),
    dtype="float32",
)


@functools.cache
def make_params(config=CONFIG):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), shapes)


@functools.cache
def make_batches():
    """Two batches; the second row of the first is not read, and weights are not all 1."""
    rng = np.random.default_rng(1)
    made = []
    for _ in range(2):
        tokens, targets = rng.integers(0, 12, (2, 4, 16))
        weights = rng.choice([0.0, 0.5, 1.0], (4, 16))
        made.append((tokens, targets, weights))
    made[0][2][1] = 0
    return made


@functools.cache
def outputs():
    apply = jax.jit(lambda p, t: Decoder(CONFIG).apply({"params": p}, t, mode="masked"))
    return [jax.device_get(apply(make_params(), tokens)) for tokens, _, _ in make_batches()]


@pytest.mark.parametrize("mode", ["eval", "masked"])
def test_figures_are_those_counted_by_hand(mode):
    got = evaluate(CONFIG, make_params(), make_batches(), mode)
    hits, nats = [], []
    for (_, targets, weights), out in zip(make_batches(), outputs()):
        for b, t in zip(*np.nonzero(weights)):
            row = out.logits[b, t].astype(np.float64)
            hits.append(row.argmax() == targets[b, t])
            nats.append(np.log(np.exp(row).sum()) - row[targets[b, t]])
    assert got.positions == len(hits)
    assert got.sequences == 8
    np.testing.assert_allclose(got.accuracy, np.mean(hits), rtol=1e-6)
    np.testing.assert_allclose(got.loss, np.mean(nats), rtol=1e-5)
    usage = np.mean([out.reports.choice.mean(axis=(1, 2)) for out in outputs()], axis=0)
    assert usage[0] == 0
    assert 0.1 < usage[1] < 0.9
    np.testing.assert_allclose(got.usage_per_layer, usage, rtol=1e-6)
    np.testing.assert_allclose(got.usage, usage.mean(), rtol=1e-6)
    np.testing.assert_allclose(got.cost, np.mean(got.cost_per_layer), rtol=1e-6)
    kv_cost = np.mean([out.reports.kv_cost for out in outputs()])
    np.testing.assert_allclose(got.kv_cost, kv_cost, rtol=1e-5)


def test_nothing_to_evaluate_on_is_refused():
    with pytest.raises(ValueError, match="batches is empty"):
        evaluate(CONFIG, make_params(), [])


def test_the_heat_map_shows_who_attended():
    tokens = make_batches()[0][0]
    shown = routed_tokens(CONFIG, make_params(), tokens)
    assert shown.shape == (4, 2, 16)
    np.testing.assert_array_equal(shown, np.swapaxes(outputs()[0].reports.choice, 0, 1))


def test_mixing_time_is_the_median_over_all_mixers_on_their_own_inputs(monkeypatch):
    # Each call takes 1, 2 or 30 seconds by this clock.
    ticks = itertools.accumulate([0, 1, 0, 30, 0, 2])
    monkeypatch.setattr(mixing_time.time, "perf_counter", lambda: float(next(ticks)))
    seen = []

    class Recorder:
        def __init__(self, kind):
            self.kind = kind

        def apply(self, variables, x, positions, mode):
            seen.append((self.kind, mode, positions.shape, sorted(variables["params"])))
            return (x,)

    monkeypatch.setattr(mixing_time, "make_mixer", lambda config, kind: Recorder(kind))
    tokens = make_batches()[0][0]
    assert mixing_milliseconds(CONFIG, make_params(), tokens, repeats=3) == 2000.0
    assert seen == [
        ("conv", "eval", (4, 16), ["conv"]),
        ("routed", "eval", (4, 16), ["conv", "key", "out", "query", "router", "value"]),
    ]


def test_mixing_time_of_a_scanned_model():
    config = CONFIG.replace(layers="conv*2", scan=True)
    assert mixing_milliseconds(config, make_params(config), make_batches()[0][0], repeats=1) > 0
