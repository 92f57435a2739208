"""The experiment 'flux': what is planned, and that it runs from a model to a table."""

import dataclasses
from pathlib import Path

import pytest

from routing_jax.evals.results import load_results
from routing_jax.train.experiments import flux
from routing_jax.train.experiments.flux import PERCENT, FluxArgs, runs

from ..published_folder import write_model, write_text


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    return FluxArgs(
        out=str(folder / "out"),
        scratch=str(folder / "scratch"),
        base=str(write_model(folder / "Tiny.Model")),
        text=str(write_text(folder)),
        length=512,
        trials=2,
        batch=2,
        steps=2,
    )


def test_every_router_has_its_controls_on_the_same_prompts(args):
    plan = list(runs(args))
    names = {run.name for run in plan}
    assert len(names) == len(plan)
    assert {run.task for run in plan} == {"tiny-text-streaming-512"}
    variants = {run.variant for run in plan}
    assert {f"{kind}-{p}" for kind in ("static", "random") for p in PERCENT} <= variants
    assert {"dense", "sparse", "routed", "routed+curriculum"} <= variants
    for run in plan:
        assert run.config.data == plan[0].config.data
        assert run.config.curriculum.max_steps == 2
        assert run.config.model.layers == "layer*2"
    routed, curriculum = ({r.variant: r for r in plan}[v] for v in ("routed", "routed+curriculum"))
    assert routed.config.budget.rate > 0 == routed.config.curriculum.peak
    assert curriculum.config.curriculum.peak > 0 == curriculum.config.budget.rate


def test_what_searches_is_the_same_in_all_runs_and_named(args):
    plan = list(runs(dataclasses.replace(args, retrieval="topk", answers="topk")))
    assert {run.task for run in plan} == {"tiny-text-streaming-topk-answers-512"}
    sparse = {run.config.model.sparse for run in plan}
    assert [(s.mode, s.retrieval, s.answers) for s in sparse] == [("streaming", "topk", "topk")]
    with pytest.raises(ValueError, match="one of the last two must be topk"):
        list(runs(dataclasses.replace(args, answers="topk")))


def test_elsewhere_routers_are_those_that_were_trained_at_home(args):
    asked = dataclasses.replace(args, elsewhere=("stdlib",), lengths=(400,))
    plan = list(runs(asked))
    names = [run.name for run in plan]
    moved = [run for run in plan if run.config.start_from]
    assert {run.task for run in moved} == {"tiny-stdlib-streaming-512", "tiny-text-streaming-400"}
    for run in moved:
        home = Path(run.config.start_from).name
        assert names.index(home) < names.index(run.name)
        assert home == f"tiny-text-streaming-512_routed_s{run.seed}"
        assert {f"{run.task}_{v}_s0" for v in ("dense", "static-75")} <= set(names)


@pytest.mark.slow
def test_reproducing_scores_controls_and_routers_and_renders(args):
    only = "512_dense|static-50|random-50|routed_s0|curriculum_s0|400_dense"
    asked = dataclasses.replace(args, only=only, lengths=(400,))
    assert flux.reproduce(asked) == 0
    made = load_results(args.out, "flux")
    results = {r.variant: r for r in made if r.task.endswith("512")}
    there = {r.variant: r for r in made if r.task.endswith("400")}
    assert list(there) == ["dense", "routed"]
    assert there["routed"].steps == 0
    assert list(results) == ["dense", "random-50", "routed+curriculum", "routed", "static-50"]
    assert results["dense"].usage == 1
    assert results["static-50"].usage == results["random-50"].usage == 0.5
    assert len(results["static-50"].details["sensitivity"]) == 2
    assert results["routed"].steps == 2
    assert all(r.sequences == 8 for r in results.values())
    folder = Path(args.out) / "flux"
    assert "static-50" in (folder / "table.md").read_text()
    assert (folder / "tradeoff.png").stat().st_size > 1000
    assert flux.reproduce(asked) == 0  # all of it is there
