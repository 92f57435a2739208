"""The experiment 'flux': what is planned, who decides in its controls, and its table."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from routing_jax.evals.prompt_quality import fixed_layers, random_layers, ranked_layers
from routing_jax.evals.prompt_tables import flux_table
from routing_jax.evals.results import load_results
from routing_jax.train.experiments import flux
from routing_jax.train.experiments.flux import PERCENT, FluxArgs, runs

from ..published_folder import write_model, write_text

RESULTS = Path(__file__).resolve().parents[3] / "evals/results"


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


def test_controls_choose_as_many_layers_as_they_say():
    costs = np.array([0.5, -0.1, 0.2, 0.0])
    assert ranked_layers(costs, 0).all()
    assert ranked_layers(costs, 2).tolist() == [True, False, True, False]
    assert not ranked_layers(costs, 4).any()
    assert fixed_layers(costs > 0.1)(7, 2).tolist() == [
        [True] * 2,
        [False] * 2,
        [True] * 2,
        [False] * 2,
    ]
    choose = random_layers(6, 4, seed=1)
    whole = choose(0, 40)
    assert (whole.sum(axis=0) == 2).all()
    assert (choose(10, 5) == whole[:, 10:15]).all()  # however the prompts are batched
    assert (whole.sum(axis=1) > 3).all()


def told(example, variant, seed, right, nll, sparsity):
    tasks = {
        "passkey": {"right": right, "nll": None, "sparsity": sparsity, "dense_by_layer": [1.0]},
        "text": {"right": [0.5], "nll": nll, "sparsity": 1.0, "dense_by_layer": [0.0]},
    }
    return dataclasses.replace(
        example, task="tiny-512", variant=variant, seed=seed, details={"tasks": tasks}
    )


def test_the_table_pairs_each_way_of_routing_with_dense():
    example = load_results(RESULTS, "routed-attention")[0]
    ways = [
        told(example, "routed", 0, [1.0, 0.0, 1.0, 1.0], [1.2, 1.0], 0.5),
        told(example, "routed", 1, [1.0, 1.0, 1.0, 1.0], [1.4, 1.0], 0.7),
        told(example, "dense", 0, [1.0, 1.0, 1.0, 0.0], [1.0, 1.0], 0.0),
        told(example, "static-50", 0, [0.0, 0.0, 0.0, 0.0], [2.0, 2.0], 0.5),
    ]
    table = flux_table(ways)
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert [line.split("|")[1].strip() for line in lines] == ["dense", "static-50", "routed"]
    dense, static, routed = lines
    assert "75.0 % |" in dense
    assert "2.72" in dense
    # Differences of the seeds' mean: 0, −½, 0, 1.
    half = 1.96 * np.std([0, -50, 0, 100], ddof=1) / 2
    assert f"87.5 % (+12.5 ± {half:.1f})" in routed
    assert f"{math.exp(1.15):.2f} (+16.18 %" in routed
    assert "60.0 %" in routed
    assert f"({100 * math.expm1(1):+.2f} %" in static
    with pytest.raises(ValueError, match="tiny-512 has no result of variant 'dense'"):
        flux_table(ways[:1])


@pytest.mark.slow
def test_reproducing_scores_controls_and_routers_and_renders(args):
    only = "dense|static-50|random-50|routed_s0|curriculum_s0"
    asked = dataclasses.replace(args, only=only)
    assert flux.reproduce(asked) == 0
    results = {r.variant: r for r in load_results(args.out, "flux")}
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
