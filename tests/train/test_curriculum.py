"""The curriculum's shape, against a simulation in plain Python and one property at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing_jax.train.curriculum import (
    CurriculumConfig,
    auxiliary_weight,
    decay_progress,
    finished,
    init_curriculum,
    penalty_weight,
    update_curriculum,
)


def run(config, accuracies, weighed=1.0):
    """States before each step and after the last, as numpy; `weighed` a number or one a step."""
    weighed = np.broadcast_to(np.asarray(weighed, np.float32), len(accuracies))

    def step(state, inputs):
        new = update_curriculum(config, state, *inputs)
        return new, new

    start = init_curriculum(config)
    inputs = (jnp.asarray(accuracies, jnp.float32), jnp.asarray(weighed))
    _, states = jax.lax.scan(step, start, inputs)
    states = jax.tree.map(lambda a, b: np.concatenate([a[None], b]), start, states)
    weight = jax.vmap(lambda s: penalty_weight(config, s))(states)
    return states, np.asarray(weight)


def simulate(config, accuracies):
    """(λ, stage) before each step, without reaction or target, from the config's description."""
    smoothed, above, stage, start = 0.0, 0, 0, None
    if config.learn_steps == 0:
        stage, start = len(config.lengths), 0
    rows = []
    for step, accuracy in enumerate(accuracies):
        done = 0 if start is None else step - start + (config.learn_steps > 0)
        share = (
            min(1.0, done / config.ramp_steps) if config.ramp_steps else float(start is not None)
        )
        rows.append((config.peak if config.from_start else config.peak * share, stage))
        smoothed = 0.9 * smoothed + 0.1 * accuracy
        above = above + 1 if smoothed >= config.threshold else 0
        if start is None:
            if step + 1 >= config.learn_steps:
                stage, start = len(config.lengths), step + 1
            elif above >= config.patience:
                if stage == len(config.lengths):
                    start = step + 1
                else:
                    stage, above, smoothed = stage + 1, 0, 0.0
    return rows


CONFIGS = st.builds(
    CurriculumConfig,
    peak=st.sampled_from([0.0, 0.5, 2.0]),
    lengths=st.sampled_from([(), (16,), (16, 32)]),
    threshold=st.sampled_from([0.45, 0.7]),
    patience=st.integers(1, 4),
    learn_steps=st.sampled_from([0, 1, 7, 30]),
    ramp_steps=st.sampled_from([0, 1, 5]),
    hold_steps=st.sampled_from([1, 10]),
    from_start=st.booleans(),
)


@given(CONFIGS, st.integers(0, 10_000))
@settings(max_examples=15)
def test_equals_the_simulation_in_plain_python(config, seed):
    rng = np.random.default_rng(seed)
    accuracies = np.clip(np.linspace(0, 2, 40) + rng.normal(0, 0.2, 40), 0, 1)
    states, weight = run(config, accuracies)
    want = simulate(config, accuracies)
    np.testing.assert_allclose(weight[:-1], [w for w, _ in want], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(states.stage[:-1], [stage for _, stage in want])


def test_nothing_is_penalised_until_accuracy_has_held():
    config = CurriculumConfig(threshold=0.8, patience=5, ramp_steps=10, hold_steps=10)
    states, weight = run(config, [0.0] * 30 + [1.0] * 60)
    begins = int(states.ramp_start[-1])
    # 0.9^n falls to 0.2 after 16 steps; the fifth such step in a row ends the phase.
    assert begins == 30 + 16 + 4
    assert np.all(weight[:begins] == 0)
    np.testing.assert_allclose(weight[begins : begins + 10], 0.05 * np.arange(1, 11), rtol=1e-5)
    np.testing.assert_allclose(weight[begins + 9 :], 0.5)


def test_a_dip_starts_the_wait_again():
    config = CurriculumConfig(threshold=0.5, patience=8)
    steady, _ = run(config, [1.0] * 30)
    dip, _ = run(config, [1.0] * 10 + [0.0] * 10 + [1.0] * 10)
    assert int(steady.ramp_start[-1]) > 0
    assert int(dip.ramp_start[-1]) == -1


def test_a_threshold_of_one_is_reached_by_a_perfect_model():
    config = CurriculumConfig(threshold=1.0, patience=1, learn_steps=10_000)
    states, _ = run(config, [1.0] * 1000)
    assert int(states.ramp_start[-1]) > 0


def test_learning_that_never_succeeds_ends_after_its_steps():
    config = CurriculumConfig(learn_steps=12, ramp_steps=4, hold_steps=5, lengths=(8, 16))
    states, _ = run(config, [0.0] * config.max_steps)
    assert int(states.ramp_start[-1]) == 12
    assert int(states.stage[11]) == 0
    assert int(states.stage[12]) == 2
    over = np.array(jax.vmap(lambda s: finished(config, s))(states))
    np.testing.assert_array_equal(over, np.arange(config.max_steps + 1) == config.max_steps)


def test_every_length_has_to_be_learnt_anew():
    config = CurriculumConfig(threshold=0.6, patience=3, lengths=(8, 16, 32))
    states, _ = run(config, [1.0] * 200)
    # 0.9^n falls to 0.4 after 9 steps; two more for patience, at each of the four lengths.
    changes = np.nonzero(np.diff(states.stage))[0] + 1
    np.testing.assert_array_equal(changes, [11, 22, 33])
    assert int(states.ramp_start[-1]) == 44


def test_the_rate_decays_from_the_ramp_to_the_end():
    config = CurriculumConfig(learn_steps=10, ramp_steps=5, hold_steps=15)
    states, _ = run(config, [0.0] * config.max_steps)
    progress = jax.vmap(lambda s: decay_progress(config, s))(states)
    np.testing.assert_allclose(progress, np.clip((np.arange(31) - 10) / 20, 0, 1), rtol=1e-6)


def test_exploring_fades_as_the_penalty_ramps():
    config = CurriculumConfig(learn_steps=3, ramp_steps=4, hold_steps=5, explore=0.2)
    states, weight = run(config, [0.0] * config.max_steps)
    explore = jax.vmap(lambda s: auxiliary_weight(config, s))(states)
    np.testing.assert_allclose(explore[:3], 0.2, rtol=1e-6)
    np.testing.assert_allclose(explore, 0.2 * (1 - weight / config.peak), atol=1e-6)
    assert explore[-1] == 0
    constant = CurriculumConfig(
        learn_steps=3, ramp_steps=4, hold_steps=5, explore=0.2, explore_fades=False
    )
    explore = jax.vmap(lambda s: auxiliary_weight(constant, s) + 0 * s.ramp)(states)
    np.testing.assert_allclose(explore, 0.2, rtol=1e-6)


def test_from_the_start_is_the_peak_at_every_step():
    _, weight = run(CurriculumConfig(peak=0.3, from_start=True, learn_steps=5), [0.0] * 20)
    np.testing.assert_allclose(weight, 0.3, rtol=1e-6)


LOST = [1.0] * 40 + [0.0] * 30 + [1.0] * 60


@pytest.mark.parametrize("reaction", ["none", "pause", "back"])
def test_lost_accuracy_pauses_or_turns_the_ramp(reaction):
    config = CurriculumConfig(
        threshold=0.6, patience=5, ramp_steps=60, hold_steps=200, reaction=reaction
    )
    states, weight = run(config, LOST)
    good = states.accuracy[1:] >= config.threshold
    change = np.diff(weight)
    ramping = (states.ramp_start[:-1] >= 0) & (weight[:-1] < config.peak - 1e-5)
    bad = ramping & ~good & (weight[:-1] > 0)
    assert bad.sum() > 10
    step = config.peak / config.ramp_steps
    np.testing.assert_allclose(change[ramping & good], step, rtol=1e-3)
    want = {"none": step, "pause": 0.0, "back": -step}[reaction]
    safe = bad & (weight[1:] > 0) & (weight[1:] < config.peak)
    np.testing.assert_allclose(change[safe], want, rtol=1e-3, atol=1e-6)
    assert np.all((weight >= 0) & (weight <= config.peak + 1e-6))
    # Time passes all the same.
    assert int(states.step[-1]) == len(LOST)


def test_a_target_holds_the_quantity_where_it_is():
    config = CurriculumConfig(learn_steps=1, ramp_steps=20, hold_steps=100, target=0.2)
    step = config.peak / config.ramp_steps
    weighed = [0.9] * 10 + [0.19] * 10 + [0.1] * 4 + [0.5] * 5
    _, weight = run(config, [1.0] * len(weighed), weighed)
    want = np.repeat([step, 0.0, -step, step], [10, 10, 4, 5])
    np.testing.assert_allclose(np.diff(weight), want, rtol=1e-3, atol=1e-6)


def test_a_target_is_met_end_to_end_by_a_model_that_yields_to_pressure():
    config = CurriculumConfig(learn_steps=1, ramp_steps=50, hold_steps=1000, target=0.25)
    update = jax.jit(lambda s, u: update_curriculum(config, s, jnp.float32(1), u))
    state, usage = init_curriculum(config), 1.0
    seen = []
    for _ in range(300):
        state = update(state, jnp.float32(usage))
        wants = 1 - 1.6 * float(penalty_weight(config, state))  # at the peak: 0.2
        usage += 0.1 * (wants - usage)
        seen.append(usage)
    assert np.all(np.array(seen[200:]) <= 0.25 + 0.02)
    assert np.all(np.array(seen[200:]) >= 0.9 * 0.25 - 0.02)


def usage_of_slow_routers(foresight):
    """Gates close by and by where λ outweighs what they are worth, the more the fewer are open."""
    config = CurriculumConfig(
        learn_steps=0, ramp_steps=150, hold_steps=1000, target=0.25, foresight=foresight
    )
    update = jax.jit(lambda s, u: update_curriculum(config, s, jnp.float32(1), u))
    state, speed, usage, seen = init_curriculum(config), 0.0, 1.0, []
    for _ in range(600):
        state = update(state, jnp.float32(usage))
        speed = 0.97 * speed + 0.03 * (0.1 / usage - float(penalty_weight(config, state)))
        usage = float(np.clip(usage + 0.05 * speed, 0.01, 1.0))
        seen.append(usage)
    return np.array(seen)


def test_without_foresight_the_state_has_what_earlier_checkpoints_have():
    assert len(jax.tree.leaves(init_curriculum(CurriculumConfig(target=0.5)))) == 6
    foreseeing = CurriculumConfig(target=0.5, foresight=9, learn_steps=0, ramp_steps=10)
    state = init_curriculum(foreseeing)
    assert len(jax.tree.leaves(state)) == 7
    first = update_curriculum(foreseeing, state, jnp.float32(1), jnp.float32(0.6))
    assert float(first.ramp) == pytest.approx(0.1 * (0.6 / 0.5 - 1))  # nothing changed before


def test_foresight_keeps_slow_routers_from_passing_their_target():
    blind, seeing = map(usage_of_slow_routers, (0, 30))
    assert blind.min() < 0.5 * 0.25 < 0.7 * 0.25 < seeing.min()
    assert np.ptp(blind[300:]) > 2 * np.ptp(seeing[300:])
    assert seeing[300:].mean() == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize("learn_steps", [0, 5])
def test_a_course_brings_the_target_down_in_equal_ratios_from_what_is_spent(learn_steps):
    fields = {"ramp_steps": 20, "target": 0.125, "course": 10, "reward": 1}
    config = CurriculumConfig(learn_steps=learn_steps, **fields)
    first = max(1, learn_steps)  # the state after the step in which what is spent was read
    states, _ = run(config, [0.0] * 25, [0.5] * 25)
    asked = states.asked[first:]
    np.testing.assert_allclose(asked[:11], 0.5 * 0.25 ** (np.arange(11) / 10), rtol=1e-4)
    np.testing.assert_allclose(asked[11:], 0.125, rtol=1e-4)
    # Who follows the course is asked for nothing; who is late pays, and who is early is paid.
    step = config.peak / config.ramp_steps
    for factor, want in ((0.95, 0), (1.1, step), (0.8, -step)):
        weighed = states.asked[1:16] * np.where(np.arange(15) < first, 1, factor)
        change = np.diff(run(config, [0.0] * 15, weighed)[1])
        np.testing.assert_allclose(change[first:], want, atol=1e-6)


@pytest.mark.parametrize("foresight", [0, 9])
@pytest.mark.parametrize("spent", [0.0, 0.25])
def test_a_course_asks_for_the_target_at_least(spent, foresight):
    """Also where nothing is spent when it begins, which is no number to come down from."""
    config = CurriculumConfig(
        learn_steps=2, ramp_steps=20, target=0.25, course=10, foresight=foresight
    )
    states, weight = run(config, [0.0] * 12, [spent] * 12)
    np.testing.assert_allclose(states.asked[1:], 0.25, rtol=1e-5)
    np.testing.assert_allclose(weight, 0, atol=1e-7)


@pytest.mark.parametrize("reward", [0.0, 0.5])
def test_with_a_reward_what_had_closed_is_paid_to_open(reward):
    """Routers that lose nothing by being closed stay closed until λ is below 0."""
    config = CurriculumConfig(
        learn_steps=0, ramp_steps=20, target=0.25, foresight=20, reward=reward, explore=0.3
    )
    update = jax.jit(lambda s, u: update_curriculum(config, s, jnp.float32(1), u))
    state, usage, seen = init_curriculum(config), 0.05, []
    for _ in range(400):
        state = update(state, jnp.float32(usage))
        usage = float(np.clip(usage - 0.05 * float(penalty_weight(config, state)), 0.01, 1))
        assert float(state.ramp) >= -reward
        assert float(auxiliary_weight(config, state)) < 0.301
        seen.append(usage)
    assert (np.abs(np.array(seen[-50:]) - 0.25) < 0.06).all() == (reward > 0)
    assert (seen[-1] == pytest.approx(0.05)) == (reward == 0)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"peak": -0.1}, "peak is -0.1"),
        ({"learn_steps": -1}, "learn_steps is -1"),
        ({"ramp_steps": -1}, "ramp_steps is -1"),
        ({"learn_steps": 0, "ramp_steps": 0, "hold_steps": 0}, "learn_steps"),
        ({"patience": 0}, "patience is 0"),
        ({"explore": -1.0}, "explore is -1.0"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"threshold": 1.1}, "threshold is 1.1"),
        ({"target": 1.0}, "target is 1.0"),
        ({"foresight": 9}, "foresight is 9"),
        ({"foresight": -1, "target": 0.5}, "foresight is -1"),
        ({"course": 9}, "course is 9"),
        ({"course": 9, "target": 0.5, "ramp_steps": 4, "hold_steps": 4}, "course is 9"),
        ({"reward": -0.5, "target": 0.5}, "reward is -0.5"),
        ({"reward": float("nan"), "target": 0.5}, "reward is nan"),
        ({"reward": 0.5, "target": 0.5, "reaction": "back"}, "reward is 0.5"),
        ({"weighs": "time"}, "weighs is 'time'"),
        ({"reaction": "panic"}, "reaction is 'panic'"),
        ({"lengths": (16, 16)}, r"lengths is \(16, 16\)"),
        ({"lengths": (32, 16)}, r"lengths is \(32, 16\)"),
    ],
)
def test_a_bad_field_is_named(fields, named):
    with pytest.raises(ValueError, match=rf"^curriculum\.{named}.*\.$"):
        CurriculumConfig(**fields)
