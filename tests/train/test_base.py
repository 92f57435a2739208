"""Routers trained for a published model that stays as it is: bytes, gradients, files, refusals."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.evals.results import read_result
from routing_jax.models import Decoder, init_routers, merge_routers
from routing_jax.models.pretrained import load_pretrained, load_routed
from routing_jax.routers import SparseModeConfig, standardised
from routing_jax.train import base, loop
from routing_jax.train.base import calibrated_routers, with_base
from routing_jax.train.config import config_from_dict, config_to_dict
from routing_jax.train.data import PROMPT_TASKS, batches
from routing_jax.train.loop import load_base, train_mesh
from routing_jax.train.metrics import read_metrics
from routing_jax.train.presets import get_preset
from routing_jax.train.run import run, starting_parameters
from routing_jax.train.step import init_state, make_train_step

from .published_folder import write_model, write_text

ROOT = Path(__file__).resolve().parents[2]
SPARSE = SparseModeConfig(sink=32, window=32, block_q=32, block_kv=32)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run that is over at once, for a model and a text of its own."""
    folder = tmp_path_factory.mktemp("base")
    return get_preset("flux").replace(
        base=str(write_model(folder / "model")),
        data__source=str(write_text(folder)),
        data__length=256,
        data__answer=8,
        data__keys=2,
        data__validation_fraction=0.2,
        model__dtype="float32",
        model__sparse=SPARSE,
        model__remat=False,
        curriculum__hold_steps=30,
        optimizer__learning_rate=0.05,
        budget__retrieval=0.0,
        budget__text=1.0,
        budget__rate=0.3,
        batch_tokens=4 * 256,
        eval_sequences=4,
        log_every=1,
    )


@pytest.fixture(scope="module")
def made(config, tmp_path_factory, compile_cache):
    """The run's folder and result, the base's files before it, and how often the base was read."""
    folder = tmp_path_factory.mktemp("run")
    before = files(config)
    with mock.patch.object(loop, "load_pretrained", wraps=load_pretrained) as read:
        result = run(config, folder, quiet=True)
    return folder, result, before, read.call_count


def files(config):
    return {path.name: path.read_bytes() for path in Path(config.base).iterdir()}


def test_the_run_takes_its_sizes_from_the_base(config):
    whole = with_base(config)
    assert (whole.model.layers, whole.model.width, whole.model.context) == ("layer*2", 24, 512)
    assert whole.model.sparse == SPARSE
    assert whole.model.scan
    assert config_from_dict(json.loads(json.dumps(config_to_dict(whole)))) == whole
    assert with_base(whole) == whole


def test_only_routers_are_trained_and_no_other_gradient_is_formed(config):
    config = with_base(config)
    frozen = load_pretrained(config.base, dtype="float32").params
    state = init_state(config)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state.params)]
    assert all("router" in path for path in paths)
    batch = next(batches(config.data, split="train", seed=0, batch_size=2))
    step = make_train_step(config)
    jaxpr = jax.make_jaxpr(step)(state, batch, frozen)
    made = {v.aval.shape for v in outputs(jaxpr.jaxpr)}
    # Of the MLP's and the attention's matrices, stacked over layers as a gradient would be.
    weights = {leaf.shape for leaf in jax.tree.leaves(frozen) if leaf.ndim > 2}
    assert len(weights) == 5
    assert not made & weights
    # The same search finds them where they are formed.
    grads = jax.make_jaxpr(
        jax.grad(
            lambda params: (
                Decoder(config.model)
                .apply({"params": merge_routers(params, state.params)}, batch.tokens, mode="train")
                .logits.sum()
            )
        )
    )(frozen)
    assert weights <= {v.aval.shape for v in outputs(grads.jaxpr)}


def outputs(jaxpr):
    """What every operation of a program makes, those inside loops and calls too."""
    for eqn in jaxpr.eqns:
        yield from (v for v in eqn.outvars if hasattr(v.aval, "shape"))
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from outputs(inner)


def test_routers_start_with_inputs_that_differ_by_one_from_prompt_to_prompt(config, monkeypatch):
    config, read = with_base(config), []

    def recorded(pooled):
        read.append(pooled)
        return standardised(pooled)

    monkeypatch.setattr(base, "standardised", recorded)
    frozen = load_base(config, train_mesh(config))
    made = calibrated_routers(config, frozen, prompts=8)
    plain = init_routers(config.model, jax.random.key(0))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, plain)
    router = jax.device_get(made["layers"]["block_0"]["mixer"]["router"])
    (pooled,) = read
    assert pooled.shape[0] == 2
    assert pooled.shape[1] >= 8
    inputs = pooled * router["scale"][:, None] + router["shift"][:, None]
    np.testing.assert_allclose(inputs.mean(axis=1), 0, atol=1e-3)
    np.testing.assert_allclose(inputs.std(axis=1), 1, rtol=1e-3)
    assert np.abs(pooled[0] - pooled[1]).max() > 0.01  # each layer has its own
    again = calibrated_routers(config, frozen, prompts=8)
    jax.tree.map(np.testing.assert_array_equal, made, again)


def test_the_preset_that_weighs_cost_takes_a_step(config, compile_cache):
    preset = get_preset("flux-curriculum")
    names = ("curriculum", "optimizer", "budget")
    config = with_base(config.replace(**{name: getattr(preset, name) for name in names}))
    frozen = load_pretrained(config.base, dtype="float32").params
    batch = next(batches(config.data, split="train", seed=0, batch_size=2))
    before = init_state(config)
    after, metrics = jax.jit(make_train_step(config))(before, batch, frozen)
    assert metrics["finite"]
    assert int(after.curriculum.step) == 1
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before.params, after.params)
    assert any(jax.tree.leaves(moved))


def test_a_run_leaves_routers_that_load_beside_an_unchanged_base(config, made):
    folder, result, before, reads = made
    assert reads == 1
    assert files(config) == before
    assert read_result(folder / "result.json").details == result.details
    routed, params = load_routed(folder / "router.safetensors", config.base, dtype="float32")
    assert routed.sparse == SPARSE
    base = load_pretrained(config.base, dtype="float32").params
    routers = init_routers(routed, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, merge_routers(params, base))
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), params, merge_routers(params, routers))
    assert max(jax.tree.leaves(moved)) > 0.01
    other = write_model(folder / "other", seed=1)
    with pytest.raises(ValueError, match=r"holds a router for model .* is another model"):
        load_routed(folder / "router.safetensors", other)


def test_routers_of_another_base_are_refused_and_not_drawn_anew(config, made, tmp_path):
    config = with_base(config.replace(start_from=str(made[0])))
    routers = starting_parameters(config)["layers"]["block_0"]["mixer"]["router"]
    assert np.abs(routers["shift"]).max() > 0  # which those that are drawn do not have
    other = str(write_model(tmp_path / "deeper", num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"^start_from is .* with the same layers and sizes\.$"):
        starting_parameters(with_base(config.replace(base=other)))


def test_a_missed_budget_weighs_more_and_more_and_is_then_held(made):
    rows = read_metrics(made[0])
    sparsity = np.array([row["sparsity"] for row in rows])
    multipliers = np.array([row["multipliers"] for row in rows])
    text = PROMPT_TASKS.index("text")
    assert sparsity[0, text] < 0.5 < sparsity[-5:, text].mean()
    assert multipliers[0, text] > 0
    assert (np.diff(multipliers, axis=0) >= 0).all()
    assert multipliers[-1, text] > 2 * multipliers[3, text]


ON_TWO = """
import sys
from etils import epath
from routing_jax.train.loop import load_base, train, train_mesh
from routing_jax.train.run import read_config
folder, alone = sys.argv[1:]
config = read_config(epath.Path(alone)).replace(mesh__data=2)
train(config, folder, frozen=load_base(config, train_mesh(config)), quiet=True)
"""


@pytest.mark.slow
def test_two_devices_train_the_same_routers_as_one(made, tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ON_TWO, str(tmp_path), str(made[0])]
    run = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows, want = read_metrics(tmp_path), read_metrics(made[0])
    assert len(rows) == len(want)
    for row, other in zip(rows[:5], want):
        for name in ("loss", "cost", "sparsity", "multipliers", "usage_per_layer"):
            np.testing.assert_allclose(row[name], other[name], rtol=1e-4, err_msg=name)


def test_the_result_tells_what_each_task_got_and_spent(made):
    result = made[1]
    tasks = result.details["tasks"]
    assert list(tasks) == ["passkey", "multikey", "variables", "text"]
    for task, told in tasks.items():
        assert len(told["right"]) == 4
        assert (told["nll"] is not None) == (task == "text")
        assert told["sparsity"] == pytest.approx(1 - np.mean(told["dense_by_layer"]))
    assert result.usage == pytest.approx(1 - np.mean([t["sparsity"] for t in tasks.values()]))
    assert result.steps == 30
    # Two layers, H = 8: the released widths, 8H, 2H, 4H, H and 2.
    sizes = [8, 64, 16, 32, 8, 2]
    mlp = sum((a + 1) * b for a, b in itertools.pairwise(sizes))
    assert result.parameters == 2 * (mlp + 2 * sizes[0])  # and what its inputs are standardised by


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base": ""}, "base is '' and the task PromptConfig; layer routers are trained on"),
        ({"base": "nowhere"}, "nowhere is neither a folder with config.json nor a GGUF file."),
        ({"data__length": 1024, "batch_tokens": 4096}, "data.length is 1024; .* at most 512 tok"),
    ],
)
def test_what_will_not_do_is_refused_before_anything_is_made(config, changes, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        run(config.replace(**changes), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_prompts_and_bases_go_together(config):
    other = get_preset("recall-128")
    with pytest.raises(ValueError, match="and the task RecallConfig; layer routers are trained on"):
        with_base(dataclasses.replace(other, base=config.base))
