"""The budget: descent of the gates and ascent of the multipliers meet where the target holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.routers import Multipliers, ascend, budget_loss, init_multipliers

TASKS = np.array([0, 1, 1, 0])
TARGETS = np.array([0.45, 1.0, 0.3], np.float32)
MULTIPLIERS = Multipliers(jnp.array([2.0, 0.5, 1.0]), jnp.array([1.0, 3.0, 1.0]))


def test_the_loss_is_the_published_formula():
    sparsity = np.array([0.2, 0.9, 1.0, 0.7], np.float32)
    terms = []
    for s, task in zip(sparsity, TASKS):
        off = abs(s - TARGETS[task])
        terms.append(MULTIPLIERS.linear[task] * off + MULTIPLIERS.square[task] * off * off)
    got = budget_loss(sparsity, TASKS, TARGETS, MULTIPLIERS)
    assert float(got) == pytest.approx(np.mean(terms), rel=1e-5)
    assert float(budget_loss(TARGETS[TASKS], TASKS, TARGETS, MULTIPLIERS)) == 0


def test_its_gradient_points_away_from_the_target():
    slope = jax.grad(budget_loss)(jnp.array([0.2, 0.9, 0.5, 0.7]), TASKS, TARGETS, MULTIPLIERS)
    assert (np.sign(slope) == [-1, -1, -1, 1]).all()


def test_only_multipliers_of_tasks_that_miss_their_budget_rise():
    sparsity = jnp.array([0.45, 0.9, 0.8, 0.45])
    slope = jax.grad(budget_loss, argnums=3)(sparsity, TASKS, TARGETS, MULTIPLIERS)
    risen = ascend(MULTIPLIERS, slope, 0.1)
    for before, after in zip(MULTIPLIERS, risen):
        assert after[1] > before[1]
        np.testing.assert_array_equal(after[::2], before[::2])


def test_each_task_settles_at_its_own_budget_against_a_loss_that_wants_none():
    """Full attention helps, most of all in task 0; without multipliers no layer would be sparse."""
    targets, help_ = jnp.array([0.4, 0.9]), jnp.array([1.0, 0.3])

    def objective(logits, multipliers):
        sparsity = jax.nn.sigmoid(logits)
        loss = budget_loss(sparsity, jnp.arange(2), targets, multipliers)
        return jnp.mean(help_ * sparsity) + loss

    def step(state, _):
        logits, multipliers = state
        down, up = jax.grad(objective, argnums=(0, 1))(logits, multipliers)
        return (logits - 0.3 * down, ascend(multipliers, up, 0.03)), None

    state = (jnp.full(2, -4.0), init_multipliers(2))
    (logits, multipliers), _ = jax.jit(lambda s: jax.lax.scan(step, s, length=6000))(state)
    np.testing.assert_allclose(jax.nn.sigmoid(logits), targets, atol=0.03)
    assert multipliers.linear[0] > multipliers.linear[1] > 0
