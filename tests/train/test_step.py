"""One training step: it learns, ignores how its batch is cut, and survives a bad one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.models import DecoderConfig
from routing_jax.routers import TokenRouterConfig
from routing_jax.train.config import OptimizerConfig, TrainConfig
from routing_jax.train.curriculum import CurriculumConfig
from routing_jax.train.data import RecallConfig, batches
from routing_jax.train.step import init_state, learning_rate, make_optimizer, make_train_step

SMALL = TrainConfig(
    data=RecallConfig(length=8, num_values=4),
    model=DecoderConfig(
        width=16,
        layers="full,conv",
        head_dim=8,
        mlp_width=0,
        router=TokenRouterConfig(hidden=4, bias=0.0),
        dtype="float32",
    ),
    batch_tokens=128,
)
ROUTED = SMALL.replace(model__layers="routed,conv", curriculum__explore=0.0)


@functools.cache
def start(config):
    return jax.device_get(init_state(config))


@functools.cache
def stepper(config):
    return jax.jit(make_train_step(config))


@functools.cache
def some_batch(seed=0):
    stream = batches(SMALL.data, split="train", seed=seed, batch_size=16)
    return next(stream)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def routers(state):
    """The parameters of the first layer's router."""
    return state.params["layers_0"]["block_0"]["mixer"]["router"]


def test_the_loss_falls_on_a_batch_seen_again_and_again():
    state, losses = start(SMALL), []
    for _ in range(120):
        state, metrics = stepper(SMALL)(state, some_batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.1 * losses[0]
    assert float(metrics["accuracy"]) == 1


@pytest.mark.parametrize("weigh", ["one query a row", "rows of other weight"])
def test_microbatches_add_up_to_the_whole_batch(weigh):
    batch = some_batch()
    if weigh == "rows of other weight":
        rows = np.random.default_rng(0).integers(0, 4, (16, 1)).astype(np.float32)
        batch = batch._replace(weights=rows * np.ones_like(batch.weights))
    whole, metrics = stepper(SMALL)(start(SMALL), batch)
    parts, part_metrics = stepper(SMALL.replace(accumulation=4))(start(SMALL), batch)
    assert metrics.keys() == part_metrics.keys()
    for name in metrics:
        np.testing.assert_allclose(part_metrics[name], metrics[name], rtol=1e-5, atol=1e-7)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7)
    jax.tree.map(close, parts.opt_state, whole.opt_state)
    jax.tree.map(np.testing.assert_array_equal, parts.curriculum, whole.curriculum)


def test_equal_seeds_take_equal_steps_and_others_other_ones():
    one, metrics = stepper(ROUTED)(start(ROUTED), some_batch())
    again, _ = stepper(ROUTED)(start(ROUTED), some_batch())
    same(one, again)
    # Only the noise of the gates differs.
    other = start(ROUTED)._replace(key=start(ROUTED).key + np.uint32(1))
    assert float(stepper(ROUTED)(other, some_batch())[1]["loss"]) != float(metrics["loss"])
    later = start(ROUTED).curriculum._replace(step=np.int32(1))
    later = start(ROUTED)._replace(curriculum=later)
    assert float(stepper(ROUTED)(later, some_batch())[1]["loss"]) != float(metrics["loss"])


@pytest.mark.parametrize("what", ["loss", "parameters", "update"])
def test_a_step_that_is_not_finite_changes_nothing_and_says_so(what):
    config, state, batch = ROUTED, start(ROUTED), some_batch()
    if what == "loss":
        batch = batch._replace(weights=np.where(batch.weights > 0, np.inf, batch.weights))
    elif what == "parameters":
        state = state._replace(params={**state.params, "head": state.params["head"] * np.nan})
    else:
        config = ROUTED.replace(optimizer__learning_rate=1e3, optimizer__weight_decay=3e38)
    new, metrics = stepper(config)(state, batch)
    assert not metrics["finite"]
    assert np.isfinite([metrics["loss"], metrics["gradient_norm"]]).all() == (what == "update")
    same(new, state)
    assert stepper(ROUTED)(start(ROUTED), some_batch())[1]["finite"]


def test_a_step_after_the_end_changes_nothing_and_says_so():
    plan = ROUTED.curriculum
    last = plan.ramp_steps + plan.hold_steps - 1
    curriculum = start(ROUTED).curriculum._replace(step=np.int32(last), ramp_start=np.int32(0))
    state = start(ROUTED)._replace(curriculum=curriculum)
    end, metrics = stepper(ROUTED)(state, some_batch())
    assert metrics["finished"]
    assert int(end.curriculum.step) == last + 1
    after, metrics = stepper(ROUTED)(end, some_batch())
    assert metrics["finished"]
    same(after, end)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_matrices_decay_and_vectors_do_not(scan):
    config = ROUTED.replace(model__layers="(routed,conv)*2", model__scan=scan)
    shapes = jax.eval_shape(lambda: init_state(config)).params
    params = jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes)
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.5))
    zeros = jax.tree.map(np.zeros_like, params)
    updates = jax.jit(lambda p, z: optimizer.update(z, optimizer.init(p), p)[0])(params, zeros)
    assert ("layers" if scan else "layers_0") in updates
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        names = [key.key for key in path]
        # These are one vector or one number a layer, however many layers are stacked.
        vector = names[-1] in ("scale", "bias") or names[-2:] == ["router", "out"]
        assert np.all(np.asarray(update) == (0.0 if vector else 0.5)), names


def with_lambda(config, lam):
    """The first state of a run, but that λ stands at `lam` (and the warm-up is over)."""
    state = jax.tree.map(np.copy, start(config))
    ramp = np.float32(lam / config.curriculum.peak)
    return state._replace(curriculum=state.curriculum._replace(ramp=ramp, step=np.int32(100)))


@pytest.mark.parametrize("weighs", ["usage", "cost"])
def test_lambda_presses_on_the_gates(weighs):
    config = ROUTED.replace(curriculum__weighs=weighs)
    free, _ = stepper(config)(with_lambda(config, 0.0), some_batch())
    pressed, metrics = stepper(config)(with_lambda(config, 100.0), some_batch())
    assert float(metrics["lambda"]) == 100
    bias = float(routers(pressed)["bias"])
    assert bias < float(routers(free)["bias"])
    # Adam's first step, downwards.
    assert bias == pytest.approx(-config.optimizer.learning_rate, rel=1e-3)


def test_the_penalty_closes_the_gates_in_the_end():
    state, usages = with_lambda(ROUTED, 20.0), []
    for _ in range(60):
        state, metrics = stepper(ROUTED)(state, some_batch())
        usages.append(float(metrics["usage"]))
    assert usages[0] > 0.1
    assert usages[-1] == 0


def test_exploring_keeps_gates_undecided():
    """It pulls an open gate's logit down and a closed one's up."""
    config = ROUTED.replace(curriculum__explore=100.0)
    for bias in (-3.0, 3.0):
        state = with_lambda(config, 0.0)
        routers(state)["bias"] = np.float32(bias)
        new, metrics = stepper(config)(state, some_batch())
        moved = float(routers(new)["bias"]) - bias
        assert moved == pytest.approx(-np.sign(bias) * config.optimizer.learning_rate, rel=1e-2)
        assert float(metrics["lambda"]) == 0


def test_a_random_router_is_frozen():
    config = ROUTED.replace(
        model__router=TokenRouterConfig(kind="random", usage=0.3),
        curriculum__peak=1.0,
        curriculum__from_start=True,
        optimizer__weight_decay=0.5,
    )
    state = start(config)
    for _ in range(3):
        state, _ = stepper(config)(state, some_batch())
    same(routers(state), routers(start(config)))
    assert np.any(np.asarray(state.params["head"]) != start(config).params["head"])


def test_routers_are_trained_alone_where_asked_for():
    config = ROUTED.replace(
        start_from="another", routers_only=True, optimizer__weight_decay=0.5, model__scan=True
    )
    state = start(config)
    for _ in range(3):
        state, _ = stepper(config)(state, some_batch())
    for (path, leaf), before in zip(
        jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(start(config).params)
    ):
        changed = np.any(np.asarray(leaf) != before)
        assert changed == ("router" in [key.key for key in path]), path


def test_metrics_read_the_weighted_positions_only():
    batch = some_batch()
    junk = np.where(batch.weights > 0, batch.targets, 3)
    _, want = stepper(SMALL)(start(SMALL), batch)
    _, got = stepper(SMALL)(start(SMALL), batch._replace(targets=junk))
    for name in ("loss", "accuracy", "gradient_norm"):
        assert float(got[name]) == float(want[name])
    _, twice = stepper(SMALL)(start(SMALL), batch._replace(weights=2 * batch.weights))
    assert float(twice["loss"]) == pytest.approx(float(want["loss"]), rel=1e-6)


def test_the_rate_warms_up_stays_and_decays_with_the_ramp():
    config = SMALL.replace(
        optimizer=OptimizerConfig(learning_rate=1.0, warmup_steps=4, final_fraction=0.1),
        curriculum=CurriculumConfig(learn_steps=8, ramp_steps=5, hold_steps=5),
    )
    state = start(SMALL).curriculum

    def rate(step, ramp_start=-1):
        now = state._replace(step=jnp.int32(step), ramp_start=jnp.int32(ramp_start))
        return float(learning_rate(config, now))

    np.testing.assert_allclose([rate(i) for i in range(6)], [0.25, 0.5, 0.75, 1, 1, 1], rtol=1e-6)
    decay = [0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * i / 10)) for i in range(11)]
    np.testing.assert_allclose([rate(8 + i, 8) for i in range(11)], decay, rtol=1e-5)
