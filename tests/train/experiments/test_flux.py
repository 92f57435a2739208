"""The experiment 'flux': what is planned, and that it runs from a model to a table."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from routing_jax.evals.results import load_results
from routing_jax.models import init_routers
from routing_jax.train.base import held_out_prompts
from routing_jax.train.experiments import flux
from routing_jax.train.experiments.flux import PERCENT, FluxArgs, runs

from ..published_folder import write_model, write_text


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    return FluxArgs(
        out=str(folder / "out"),
        scratch=str(folder / "scratch"),
        base=str(write_model(folder / "Tiny.Model", max_position_embeddings=2048)),
        text=str(write_text(folder)),
        length=1280,  # sink and window are 1152 tokens
        trials=2,
        batch=2,
        steps=2,
    )


def test_every_router_has_its_controls_on_the_same_prompts(args):
    plan = list(runs(args))
    names = {run.name for run in plan}
    assert len(names) == len(plan)
    assert {run.task for run in plan} == {"tiny-text-streaming-1280"}
    variants = {run.variant for run in plan}
    assert {f"{kind}-{p}" for kind in ("static", "random") for p in PERCENT} <= variants
    assert {"dense", "sparse", "routed", "routed+curriculum"} <= variants
    assert {"static+tasks-75", "static+routed"} <= variants
    for run in plan:
        assert run.config.data == plan[0].config.data
        assert run.config.curriculum.max_steps == 2
        assert run.config.model.layers == "layer*2"
    routed, curriculum = ({r.variant: r for r in plan}[v] for v in ("routed", "routed+curriculum"))
    assert routed.config.budget.rate > 0 == routed.config.curriculum.peak
    assert curriculum.config.curriculum.peak > 0 == curriculum.config.budget.rate


def test_what_searches_is_the_same_in_all_runs_and_named(args):
    plan = list(runs(dataclasses.replace(args, retrieval="topk", answers="topk")))
    assert {run.task for run in plan} == {"tiny-text-streaming-topk-answers-1280"}
    sparse = {run.config.model.sparse for run in plan}
    assert [(s.mode, s.retrieval, s.answers) for s in sparse] == [("streaming", "topk", "topk")]
    with pytest.raises(ValueError, match="one of the last two must be topk"):
        list(runs(dataclasses.replace(args, answers="topk")))


def test_composed_runs_differ_from_those_beside_them_in_what_searches(args):
    plan = {run.name: run for run in runs(dataclasses.replace(args, composed=True))}
    composed = {name: run for name, run in plan.items() if "+composed" in run.variant}
    assert {run.variant for run in composed.values()} == {
        "dense+composed", "static+composed-75", "routed+composed",
    }  # fmt: skip
    for name, run in composed.items():
        peer = plan[name.replace("+composed", "")]
        sparse = dataclasses.replace(peer.config.model.sparse, retrieval="topk", answers="topk")
        start = peer.name if run.variant == "routed+composed" else ""  # its routers are its peer's
        assert Path(run.config.start_from).name == start
        config = peer.config.replace(model__sparse=sparse, start_from=run.config.start_from)
        assert run.config == config
    with pytest.raises(ValueError, match="composed is true and retrieval 'topk'; give one"):
        list(runs(dataclasses.replace(args, composed=True, retrieval="topk")))


def test_elsewhere_routers_are_those_that_were_trained_at_home(args):
    asked = dataclasses.replace(args, elsewhere=("stdlib",), lengths=(1344,))
    plan = list(runs(asked))
    names = [run.name for run in plan]
    moved = [run for run in plan if run.config.start_from and run.variant == "routed"]
    places = ("tiny-text-streaming-1280-elsewhere-stdlib", "tiny-text-streaming-1344")
    assert {run.task for run in moved} == set(places)
    for run in moved:
        home = Path(run.config.start_from).name
        assert names.index(home) < names.index(run.name)
        assert home == f"tiny-text-streaming-1280_routed_s{run.seed}"
        assert {f"{run.task}_{v}_s0" for v in ("dense", "static-75")} <= set(names)


def test_in_other_places_nothing_but_the_place_is_another(args, tmp_path):
    other = write_model(tmp_path / "Tiny.Tuned_2", seed=1, max_position_embeddings=2048)
    texts = ("stdlib", str(tmp_path / "Le_texte.fr.txt.gz"))
    asked = dataclasses.replace(args, elsewhere=texts, maths=True, finetuned=(str(other),))
    home = flux.planned_config(args)
    places = {run.task: run.config for run in runs(asked) if run.variant == "dense"}
    home_task, text, french, maths, tuned = places
    assert home_task == "tiny-text-streaming-1280"
    assert places[home_task] == home
    # A text that nothing is trained on is held out whole.
    elsewhere = home.replace(data__source="stdlib", data__validation_fraction=1.0)
    assert (text, places[text]) == (f"{home_task}-elsewhere-stdlib", elsewhere)
    assert french == f"{home_task}-elsewhere-le-texte-fr"
    assert (maths, places[maths]) == (f"{home_task}-maths", home.replace(data__mixture=("maths",)))
    assert tuned == f"{home_task}-finetuned-tiny-tuned-2"
    assert places[tuned] == home.replace(base=str(other), data__tokenizer=str(other))
    wider = write_model(tmp_path / "wider", hidden_size=48, max_position_embeddings=2048)
    with pytest.raises(ValueError, match=r"finetuned names .*wider, whose width is 48; it must be"):
        list(runs(dataclasses.replace(args, finetuned=(str(wider),))))
    with pytest.raises(ValueError, match=r"two tasks would be called .*-elsewhere-stdlib; give"):
        list(runs(dataclasses.replace(args, elsewhere=("stdlib", "texts/stdlib.txt"))))


def test_a_length_at_which_nothing_is_routed_is_refused(args):
    with pytest.raises(ValueError, match=r"data.length is 1216, 64 of it .* up to 1152 tokens"):
        list(runs(dataclasses.replace(args, lengths=(1216,))))


@pytest.mark.slow
def test_layers_that_routers_favour_are_found_on_prompts_that_are_not_scored(args, monkeypatch):
    (run,) = (r for r in runs(args) if (r.variant, r.seed) == ("static+routed", 0))
    router = init_routers(run.config.model, jax.random.key(0))["layers"]["block_0"]["mixer"][
        "router"
    ]
    read = []

    def recorded(config, task, count, split):
        read.append(split)
        return held_out_prompts(config, task, 2, split)

    monkeypatch.setattr(flux, "held_out_prompts", recorded)
    for favoured in ([1.0, 0.0], [0.0, 1.0]):
        bias = np.array([[-1e4, 1e4] if full else [1e4, -1e4] for full in favoured], np.float32)
        routers = {"layers": {"block_0": {"mixer": {"router": router | {"bias": bias}}}}}
        monkeypatch.setattr(flux, "starting_parameters", lambda config, found=routers: found)
        result = flux.transferred("flux", run)
        assert result.details["use"] == result.usage_per_layer == favoured
    assert set(read) == {"train"}


@pytest.mark.slow
def test_routers_and_ranking_of_home_are_measured_on_maths_and_in_another_model(args, tmp_path):
    other = str(write_model(tmp_path / "other", seed=1, max_position_embeddings=2048))
    asked = dataclasses.replace(
        args,
        out=str(tmp_path),
        only="1280_routed_s0|(maths|other)_(dense|static-75|routed_s0)|stdlib.*_dense",
        elsewhere=("stdlib",),
        maths=True,
        finetuned=(other,),
    )
    assert flux.reproduce(dataclasses.replace(asked, only="1280_dense|1280_routed_s0")) == 0
    assert flux.reproduce(asked) == 0
    made = {(r.task.removeprefix("tiny-text-streaming-1280"), r.variant): r
            for r in load_results(asked.out, "flux")}  # fmt: skip
    details = {place: result.details for place, result in made.items()}
    for variant in ("dense", "static-75", "routed"):
        (told,) = details["-maths", variant]["tasks"].values()
        assert len(told["nll"]) == 2
    assert set(details["-finetuned-other", "dense"]["tasks"]) == set(details["", "dense"]["tasks"])
    sensitivity = details["-maths", "static-75"]["sensitivity"]
    assert details["-finetuned-other", "static-75"]["sensitivity"] == sensitivity
    # Another model answers otherwise; its routers are those of home.
    places = ("", "-finetuned-other")
    here, there = (details[place, "dense"]["tasks"]["text"]["nll"] for place in places)
    assert here != there
    assert made["-finetuned-other", "routed"].config["start_from"].endswith("1280_routed_s0")
    assert "maths, nats" in (tmp_path / "flux" / "table.md").read_text()


@pytest.mark.slow
def test_reproducing_scores_controls_and_routers_and_renders(args):
    only = "1280_dense|static-50|tasks-75|random-50|routed(.composed)?_s0|curriculum_s0|1344_dense"
    asked = dataclasses.replace(args, only=only, lengths=(1344,), composed=True)
    assert flux.reproduce(asked) == 0
    made = load_results(args.out, "flux")
    results = {r.variant: r for r in made if r.task.endswith("1280")}
    there = {r.variant: r for r in made if r.task.endswith("1344")}
    assert list(there) == ["dense", "routed"]
    assert there["routed"].steps == 0
    static = ["static+routed", "static+tasks-75", "static-50"]
    routed = ["routed+composed", "routed+curriculum", "routed"]
    dense = ["dense+composed", "dense"]
    assert list(results) == [*dense, "random-50", *routed, *static]
    # Layers are routed alike; of so few blocks a search finds all, and costs its own work besides.
    assert results["routed+composed"].usage == results["routed"].usage
    nats = {v: results[v].details["tasks"]["text"]["nll"] for v in dense}
    np.testing.assert_allclose(nats["dense+composed"], nats["dense"], rtol=1e-4)
    assert results["dense+composed"].cost > results["dense"].cost
    assert results["dense"].usage == 1
    assert results["static-50"].usage == results["random-50"].usage == 0.5
    assert all(len(results[v].details["sensitivity"]) == 2 for v in static[1:])
    assert results["routed"].steps == 2
    assert all(r.sequences == 8 for r in results.values())
    folder = Path(args.out) / "flux"
    assert "static-50" in (folder / "table.md").read_text()
    assert flux.reproduce(asked) == 0  # all of it is there
