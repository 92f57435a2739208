"""The block-routing experiment: fair budgets and controls, each run planned once and traceable."""

import dataclasses
import itertools
import json
import os
import shutil

import jax
import numpy as np
import pytest

from routing_jax.evals.benchmarks.block_routing_cases import counted
from routing_jax.evals.by_position import head_usage, loss_by_position, position_edges
from routing_jax.evals.evaluate import evaluate
from routing_jax.evals.results import Result, load_results
from routing_jax.models import DecoderConfig, count_params, init_params
from routing_jax.routers import BlockRouterConfig
from routing_jax.train.config import config_to_dict
from routing_jax.train.data import Batch
from routing_jax.train.experiments import block_routing
from routing_jax.train.experiments.block_routing import (
    BASELINES,
    DISTILLED,
    LONGER,
    ROUTERS,
    SEEDS,
    TASKS,
    TEACHERS,
    BlockRoutingArgs,
    control,
    reproduce,
    runs,
    variant_config,
)
from routing_jax.train.experiments.experiment import Run, make_missing
from routing_jax.train.presets import get_preset
from routing_jax.train.step import init_state, make_train_step

from ...small_model import make_params

BASE = get_preset("block-mqar-2048")
RESULT = Result(
    experiment="block-routing",
    task="block-lm",
    variant="base",
    seed=0,
    accuracy=0.5,
    accuracy_first_place=None,
    loss=1.0,
    bits_per_byte=1.0,
    usage=1.0,
    usage_per_layer=[1.0],
    cost=1.0,
    kv_cost=1.0,
    least_usage=None,
    sequences=1,
    steps=1,
    tokens=1,
    parameters=1,
    minutes=0.1,
    mixing_ms=None,
    device="a device",
    versions={},
    config={},
    history=[],
    heatmap=None,
    heatmap_tokens=None,
)


def parameters(config):
    return count_params(jax.eval_shape(lambda: init_params(config.model, jax.random.key(0))))


def test_longer_recall_has_the_runs_of_gates_and_their_controls():
    plan = [run for run in runs(strongest=("tree",)) if run.task in LONGER]
    variants = {f"{r}-{p}" for r in ("gates", *BASELINES) for p in (12, 25)} | {"base", "full"}
    for task in LONGER:
        assert {run.variant for run in plan if run.task == task} == variants
    assert {run.seed for run in plan} == {0}
    longest = next(run.config for run in plan if run.name == "block-mqar-8192_gates-12_s0")
    assert longest.data.length == 8192
    assert longest.start_from.endswith("block-mqar-8192_base_s0")


def test_every_run_is_planned_once_with_several_seeds_where_it_counts():
    plan = list(runs(text="corpus", strongest=("tree", "gates+distilled", "weighed")))
    names = [run.name for run in plan]
    assert len(set(names)) == len(names)
    assert all(run.config.seed == run.seed for run in plan)
    main = ("tree", "gates+distilled", "weighed", *BASELINES)
    for task, seed in itertools.product(TASKS, range(SEEDS)):
        for variant in ("base", "full", *TEACHERS):
            assert f"{task}_{variant}_s{seed}" in names
        assert {f"{task}_{v}-{p}_s{seed}" for v in main for p in (12, 25)} <= {*names}
    routers = (*ROUTERS, *(f"{router}+distilled" for router in DISTILLED))
    assert {f"{t}_{r}-{p}_s0" for t in TASKS for r in routers for p in (12, 25)} <= {*names}
    assert {f"{t}_{c}_s0" for t in TASKS for c in ("window-1k", "linear", "conv")} <= {*names}
    assert {f"{t}_{r}-50_s0" for t in TASKS for r in main} <= {*names}
    assert {f"block-lm_{r}-5_s0" for r in main} <= {*names}
    assert [n for n in names if "scratch" in n and not n.startswith("block-lm")] == []
    sources = {run.config.data.source for run in plan if run.task == "block-lm"}
    assert sources == {"corpus"}
    # What says whether a text can test routing comes first, then one seed of every router, then the
    # seeds that compare.
    first = [f"block-lm_{variant}_s0" for variant in ("base", "full", "window-1k")]
    later = [name for name in names if name.endswith(("-25_s1", "-5_s0", "scratch-25_s0"))]
    screened = [names.index(f"{t}_{r}-{p}_s0") for t in TASKS for r in routers for p in (12, 25)]
    assert max(map(names.index, first)) < min(screened)
    assert max(screened) < min(map(names.index, later))
    others = [n for n in names if n.endswith(("-50_s0", "-5_s0", "linear_s0", "scratch-25_s0"))]
    compared = [place for place, run in enumerate(plan) if run.seed]
    assert max(compared) < min(map(names.index, others))


def test_what_is_strong_for_several_needles_alone_is_followed_up_there_alone():
    names = {run.name for run in runs()}
    for task, seed in itertools.product(TASKS, range(SEEDS)):
        several = task == "block-multi-needle-4096"
        for variant in ("weighed-25", "weighed-12", "distil-weighed"):
            assert (f"{task}_{variant}_s{seed}" in names) == (several or seed == 0)
        assert (f"{task}_weighed-50_s0" in names) == several


def sequences_read(config):
    """The first sequence of the data that a run reads, and the first that it does not."""
    rows = config.batch_size(config.data.length)
    return rows * config.first_batch, rows * (config.first_batch + config.curriculum.max_steps)


@pytest.mark.parametrize("task", TASKS)
def test_nothing_is_read_twice_in_order(task):
    """What goes on from a base reads what comes next, all variants the same; a router the rest."""
    plan = {r.variant: r.config for r in runs(scratch="x") if (r.task, r.seed) == (task, 0)}
    _, base = sequences_read(plan["base"])
    tuned = {sequences_read(c) for name, c in plan.items() if c.start_from and name not in TEACHERS}
    assert [start for start, _ in tuned] == [base]
    for name in TEACHERS:
        assert sequences_read(plan[name])[0] == max(end for _, end in tuned)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("percent", [12, 25, 50])
def test_a_router_and_its_blocks_cost_the_budget_together(task, percent):
    base = get_preset(task)
    for router in ROUTERS:
        config = variant_config(base, f"{router}-{percent}", str)
        model = config.model
        if model.blocks.budget == "blocks":
            cost = counted(model.blocks, config.data.length, model.heads, model.width).cost
            assert cost == pytest.approx(percent / 100, abs=0.016), router


def test_every_router_that_is_run_has_a_choice():
    for run in runs():
        blocks = run.config.model.blocks
        if run.variant[-1].isdigit() and blocks.budget == "blocks":
            assert blocks.blocks > blocks.forced, run.name


def test_what_a_run_goes_on_from_is_made_before_it():
    plan = list(runs(scratch="scratch"))
    places = {run.name: place for place, run in enumerate(plan)}
    for run in plan:
        if run.config.start_from:
            router, _, percent = run.variant.rpartition("-")
            before = "base"
            if percent.isdigit() and ("indexer" in router or "+distilled" in router):
                before = "distil"
            if router in ("weighed", "weighed-gates+distilled"):
                before = "distil-weighed"
            before = f"{run.task}_{before}_s{run.seed}"
            assert run.config.start_from == f"scratch/block-routing/{before}"
            assert places[before] < places[run.name]


@pytest.mark.parametrize("task", TASKS)
def test_what_is_compared_is_trained_for_as_many_steps(task):
    plan = {r.variant: r.config for r in runs(scratch="x") if (r.task, r.seed) == (task, 0)}
    steps = {name: config.curriculum.max_steps for name, config in plan.items()}
    for name, config in plan.items():
        assert steps[name] == steps["full" if config.start_from else "base"], name
        # An indexer's router has learned before, and nothing else of its model.
        assert config.routers_only == (name in TEACHERS)
        listens = "indexer" in name or name.rpartition("-")[0] == "weighed"
        taught = 1.0 if name in TEACHERS else 0.25 if listens else 0.0
        assert config.model.blocks.distil == taught


@pytest.mark.parametrize("task", TASKS)
def test_budgets_and_controls_are_those_of_their_names(task):
    base = get_preset(task)
    for router, percent in itertools.product(ROUTERS, (5, 12, 25, 50)):
        config = variant_config(base, f"{router}+scratch-{percent}", str)
        blocks = config.model.blocks
        assert config.data == base.data
        assert config.batch_tokens == base.batch_tokens
        if blocks.budget in ("gates", "mass"):  # λ decides
            assert blocks.fraction == 1
            share = 1.0 if task == "block-lm" else 0.5  # of the layers that are routed
            assert config.curriculum.target == pytest.approx(share * percent / 100)
            assert config.curriculum.weighs == "cost"
            late = router in ("mass", "random-gates", "indexer-gates")
            several = task == "block-multi-needle-4096"
            assert (config.curriculum.foresight > 0) == (late or several)
            steered = config.curriculum.course > 0, config.curriculum.reward > 0
            assert steered == (several, several)
        else:
            assert blocks.budget == "blocks"
        if router == "clusters":
            assert blocks.clusters == {5: 10, 12: 4, 25: 2, 50: 2}[percent]
    window = control(base, "window-1k").model.blocks
    assert window.blocks * window.block_kv == 1024
    assert "full" in control(base, "full").model.mixers
    assert set(control(base, "conv").model.mixers) == {"conv"}
    assert parameters(control(base, "conv")) == pytest.approx(parameters(base), rel=0.02)
    assert parameters(control(base, "full")) == pytest.approx(parameters(base), rel=0.06)


SMALL = DecoderConfig(
    width=8,
    layers="(conv,block)*2",
    head_dim=4,
    mlp_width=0,
    blocks=BlockRouterConfig(block_q=4, block_kv=8, width=2),
    dtype="float32",
)


def tiny(config):
    """The same run of a small model at length 32."""
    blocks = dataclasses.replace(config.model.blocks, block_q=4, block_kv=8, width=2, blocks=3)
    small = dataclasses.replace(
        config.model, width=8, head_dim=4, num_heads=1, num_kv_heads=1, mlp_width=0, blocks=blocks
    )
    data = dataclasses.replace(config.data, length=32, num_queries=2, num_keys=16, num_values=4)
    return config.replace(data=data, model=small, curriculum__lengths=(), batch_tokens=64)


VARIANTS = (*(f"{name}-25" for name in ROUTERS), "full", "linear", "window-1k", *TEACHERS)
QUICK = (*TEACHERS, "tree-25", "gates-25", "linear")


@pytest.mark.parametrize(
    "variant", [v if v in QUICK else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS]
)
def test_every_variant_can_be_traced(variant):
    config = tiny(variant_config(BASE, variant, str))
    shapes = jax.eval_shape(lambda: init_state(config))
    batch = jax.ShapeDtypeStruct((2, 32), np.int32)
    weights = jax.ShapeDtypeStruct((2, 32), np.float32)
    state, metrics = jax.eval_shape(make_train_step(config), shapes, Batch(batch, batch, weights))
    assert jax.tree.structure(state) == jax.tree.structure(shapes)
    assert metrics["cost"].shape == ()
    assert config_to_dict(config)["model"]["blocks"]["block_kv"] == 8


def some_batches():
    rng = np.random.default_rng(0)
    for _ in range(2):
        tokens = rng.integers(0, 256, (2, 21), dtype=np.int32)
        weights = (rng.random((2, 20)) < 0.7).astype(np.float32)
        yield tokens[:, :-1], tokens[:, 1:], weights


def test_losses_by_position_average_to_the_loss(compile_cache):
    params = make_params(SMALL)
    edges = position_edges(20, first=4)
    assert edges == [4, 8, 16, 20]
    parts = loss_by_position(SMALL, params, some_batches(), edges)
    read = [sum(w[:, a:b].sum() for *_, w in some_batches()) for a, b in zip([0, *edges], edges)]
    whole = evaluate(SMALL, params, some_batches()).loss
    assert np.average(parts, weights=read) == pytest.approx(whole, rel=1e-5)
    with pytest.raises(ValueError, match=r"^batches is empty"):
        loss_by_position(SMALL, params, [], edges)


def test_head_usage_is_the_usage_of_the_block_layers(compile_cache):
    tokens = next(some_batches())[0]
    for config in (SMALL, SMALL.replace(scan=True)):
        params = make_params(config)
        told = head_usage(config, params, tokens)
        want = evaluate(config, params, [(tokens, tokens, np.ones(tokens.shape))]).usage_per_layer
        np.testing.assert_allclose(np.mean(told, axis=1), want[1::2], rtol=1e-6)


@pytest.mark.slow
def test_reproducing_trains_goes_on_and_renders(tmp_path, monkeypatch, compile_cache):
    def planned(text, scratch, strongest):
        del text, strongest

        def folder(variant):
            return f"{scratch}/block-routing/block-mqar-2048_{variant}_s0"

        for variant in ("base", "full", "distil", "indexer-25", "learned-25", "random-25"):
            config = tiny(variant_config(BASE, variant, folder))
            plan = {"curriculum__learn_steps": 0, "curriculum__hold_steps": 2}
            yield Run("block-mqar-2048", variant, 0, config.replace(**plan))

    monkeypatch.setattr(block_routing, "runs", planned)
    args = BlockRoutingArgs(str(tmp_path / "out"), str(tmp_path / "scratch"))
    assert reproduce(args) == 0
    results = {r.variant: r for r in load_results(tmp_path / "out", "block-routing")}
    # It names what it went on from, and not where that once stood.
    assert results["indexer-25"].config["start_from"] == "block-mqar-2048_distil_s0"
    assert results["full"].details["head_usage"] == []
    heads = np.array(results["indexer-25"].details["head_usage"])
    assert heads.shape == (2, 1)
    assert np.all(heads < np.array(results["distil"].details["head_usage"]))
    folder = tmp_path / "out" / "block-routing"
    said = (folder / "table.md").read_text()
    assert "indexer-25" in said
    assert "at 25 %: best is" in said
    assert (folder / "tradeoff.png").exists()


def test_what_a_wanted_run_goes_on_from_is_made_too_and_again_where_it_is_lost(tmp_path):
    plan = [run for run in runs(scratch=str(tmp_path / "scratch")) if run.task == "block-lm"]
    made = []

    def make(experiment, run, workdir):
        made.append(run.name)
        workdir.mkdir(parents=True)
        (workdir / "result.json").write_text("")
        (workdir / "config.json").write_text(json.dumps(config_to_dict(run.config)))
        return dataclasses.replace(RESULT, task=run.task, variant=run.variant, seed=run.seed)

    def ask(only):
        made.clear()
        args = BlockRoutingArgs(str(tmp_path / "out"), str(tmp_path / "scratch"), only=only)
        make_missing("block-routing", args, plan, make=make)
        return made

    base, distil = "block-lm_base_s0", "block-lm_distil_s0"
    assert ask("indexer-25_s0") == [base, distil, "block-lm_indexer-25_s0"]
    assert ask("(base|pooled-12)_s0") == ["block-lm_pooled-12_s0"]
    shutil.rmtree(tmp_path / "scratch")
    before = (tmp_path / "out" / "block-routing" / f"{base}.json").read_bytes()
    assert ask("(base|full)_s0") == [base, "block-lm_full_s0"]
    assert (tmp_path / "out" / "block-routing" / f"{base}.json").read_bytes() == before
    assert ask("(base|full)_s0") == []
    other = {run.name: run.config for run in plan}[base].replace(data__source="another")
    (tmp_path / "scratch/block-routing" / base / "config.json").write_text(
        json.dumps(config_to_dict(other))
    )
    with pytest.raises(ValueError, match=rf"^.*{base} holds a run with another configuration; "):
        ask("pooled-25_s0")
    assert made == []


def test_planning_leaves_a_gpus_memory_to_the_processes_of_the_runs(tmp_path, monkeypatch):
    name, found = "XLA_PYTHON_CLIENT_PREALLOCATE", []
    monkeypatch.delenv(name, raising=False)

    def planned():
        found.append(os.environ.get(name))
        yield Run("block-lm", "base", 0, get_preset("block-lm"))

    for jobs in (1, 2):
        args = BlockRoutingArgs(out=str(tmp_path), list=True, jobs=jobs)
        assert make_missing("block-routing", args, planned()) == []
    assert found == [None, "false"]
    assert name not in os.environ


def test_an_unknown_router_is_named():
    with pytest.raises(ValueError, match=r"^strongest holds 'best'; accepted: learned, pooled, .*"):
        BlockRoutingArgs(strongest=("best",))
