"""The experiment: fair controls, and runs that are made once, in pieces if need be."""

import dataclasses
import itertools
import json

import jax
import pytest

from routing_jax.evals.results import load_results, result_path
from routing_jax.models import count_params, init_params
from routing_jax.train.config import config_to_dict
from routing_jax.train.experiments import experiment, routed_attention
from routing_jax.train.experiments.experiment import Run
from routing_jax.train.experiments.routed_attention import (
    EXPERIMENT,
    VARIANTS,
    RoutedAttentionArgs,
    reproduce,
    runs,
)
from routing_jax.train.loop import Interrupted
from routing_jax.train.presets import PRESETS, get_preset
from routing_jax.train.run import least_usage, run


def parameters(config):
    return count_params(jax.eval_shape(lambda: init_params(config.model, jax.random.key(0))))


@pytest.mark.parametrize("task", sorted({run.task for run in runs()}))
def test_the_control_without_attention_is_as_large(task):
    base = get_preset(task)
    control = VARIANTS["conv"](base)
    assert set(control.model.mixers) == {"conv"}
    assert len(control.model.mixers) == len(base.model.mixers)
    assert parameters(control) == pytest.approx(parameters(base), rel=0.01)
    assert parameters(VARIANTS["full"](base)) == pytest.approx(parameters(base), rel=0.05)


def test_variants_differ_from_their_base_in_what_they_are_named_for():
    base = get_preset("recall-128")
    assert VARIANTS["routed"](base) == base
    assert set(VARIANTS["full"](base).model.mixers) == {"full"}
    assert VARIANTS["no-penalty"](base).curriculum.peak == 0
    assert VARIANTS["penalty-from-start"](base).curriculum.from_start
    random = VARIANTS["random"](base)
    assert (random.model.router.kind, random.model.router.usage) == ("random", least_usage(base))
    for variant, make in VARIANTS.items():
        config = make(base)
        assert config.data == base.data, variant
        assert config.batch_tokens == base.batch_tokens, variant
        assert config.curriculum.max_steps == base.curriculum.max_steps, variant


def test_every_run_is_planned_once_with_three_seeds_where_the_claim_is_made():
    plan = list(runs(text="corpus"))
    names = [run.name for run in plan]
    assert len(set(names)) == len(names)
    assert all(run.task in PRESETS for run in plan)
    assert all(run.config.seed == run.seed for run in plan)
    for length, variant in itertools.product(
        (128, 256, 512, 1024, 2048),
        ("routed", "penalty-from-start", "no-penalty", "full", "conv", "random"),
    ):
        assert {f"recall-{length}_{variant}_s{seed}" for seed in range(3)} <= set(names)
    sources = {run.config.data.source for run in plan if run.task == "lm"}
    assert sources == {"corpus"}


@pytest.fixture(scope="module")
def example(tiny_run, tmp_path_factory):
    """A real result of a tiny run."""
    return run(tiny_run, tmp_path_factory.mktemp("example"), quiet=True)


@pytest.fixture
def lab(tiny_run, example, tmp_path, monkeypatch):
    """Three planned runs that take 2 minutes each by a made-up clock; what was run, in order."""
    plan = [Run("recall-128", "routed", seed, tiny_run.replace(seed=seed)) for seed in range(3)]
    made, clock = [], [0.0]

    def run(config, workdir, *, resume, labels, timed):
        assert resume
        assert workdir.name == f"{labels['task']}_{labels['variant']}_s{config.seed}"
        made.append(config.seed)
        clock[0] += 120
        labels = labels if timed else labels | {"mixing_ms": None}
        return dataclasses.replace(example, seed=config.seed, **labels)

    monkeypatch.setattr(routed_attention, "runs", lambda text: iter(plan))
    monkeypatch.setattr(experiment, "run", run)
    monkeypatch.setattr(experiment.time, "time", lambda: clock[0])
    return made


def arguments(folder, **changes):
    return RoutedAttentionArgs(str(folder / "out"), str(folder / "scratch"), **changes)


def seeds(folder):
    return [result.seed for result in load_results(folder / "out", EXPERIMENT)]


@pytest.mark.parametrize("jobs", [1, 2])
def test_mixing_is_timed_only_where_a_run_has_the_device_to_itself(
    lab, example, tmp_path, monkeypatch, jobs
):
    def in_this_process(tasks, jobs, logs, *, told, seconds):
        for task in tasks:
            task.call()

    monkeypatch.setattr(experiment, "side_by_side", in_this_process)
    assert example.mixing_ms is not None
    assert reproduce(arguments(tmp_path, jobs=jobs)) == 0
    timed = {result.mixing_ms for result in load_results(tmp_path / "out", EXPERIMENT)}
    assert timed == ({example.mixing_ms} if jobs == 1 else {None})
    assert lab == [0, 1, 2]


def test_finished_runs_are_skipped_and_all_are_rendered(lab, tmp_path, capsys):
    assert reproduce(arguments(tmp_path, only="s1$")) == 0
    assert (lab, seeds(tmp_path)) == ([1], [1])
    assert reproduce(arguments(tmp_path, list=True)) == 0
    assert [line.split()[1:] for line in capsys.readouterr().out.splitlines()[-3:]] == [
        [],
        ["done"],
        [],
    ]
    first = result_path(tmp_path / "out", EXPERIMENT, "recall-128", "routed", 1).read_bytes()
    assert reproduce(arguments(tmp_path)) == 0
    assert (lab, seeds(tmp_path)) == ([1, 0, 2], [0, 1, 2])
    assert reproduce(arguments(tmp_path)) == 0
    assert lab == [1, 0, 2]
    folder = tmp_path / "out" / EXPERIMENT
    assert (folder / "recall-128_routed_s1.json").read_bytes() == first
    assert "recall" in (folder / "table.md").read_text()
    assert list(folder.glob("*.png"))


def test_max_minutes_starts_no_run_after_them(lab, tmp_path, capsys):
    assert reproduce(arguments(tmp_path, max_minutes=3.0)) == 0
    assert seeds(tmp_path) == [0, 1]
    assert "stopped before recall-128_routed_s2: 3.0 minutes are over" in capsys.readouterr().out
    assert reproduce(arguments(tmp_path, max_minutes=3.0)) == 0
    assert seeds(tmp_path) == [0, 1, 2]


def test_an_interrupted_run_leaves_no_result_and_is_made_again(lab, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise Interrupted("stopped by SIGTERM; step 4 is saved.")

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "run", interrupted)
        with pytest.raises(Interrupted):
            reproduce(arguments(tmp_path, only="s0$"))
    assert seeds(tmp_path) == []
    assert reproduce(arguments(tmp_path, only="s0$")) == 0
    assert seeds(tmp_path) == [0]


def test_an_unfinished_run_of_another_configuration_is_not_gone_on_with(lab, tiny_run, tmp_path):
    workdir = tmp_path / "scratch" / EXPERIMENT / "recall-128_routed_s1"
    workdir.mkdir(parents=True)
    changed = tiny_run.replace(seed=1, optimizer__learning_rate=1e-4)
    (workdir / "config.json").write_text(json.dumps(config_to_dict(changed)))
    with pytest.raises(ValueError, match=rf"^{workdir} holds a run with another conf"):
        reproduce(arguments(tmp_path, only="s1$"))
    assert (lab, seeds(tmp_path)) == ([], [])
    (workdir / "config.json").write_text(json.dumps(config_to_dict(tiny_run.replace(seed=1))))
    assert reproduce(arguments(tmp_path, only="s1$")) == 0
    assert (lab, seeds(tmp_path)) == ([1], [1])
