"""The experiment with mixed schemes: fair controls, and one small run of it from text to table."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from routing_jax.evals.results import load_results
from routing_jax.evals.scheme_tables import times_caption
from routing_jax.models import count_params, init_params
from routing_jax.train.data import CharacterConfig
from routing_jax.train.experiments import experiment, moas
from routing_jax.train.experiments.experiment import Run
from routing_jax.train.experiments.moas import VARIANTS, MoasArgs, character_classes, runs
from routing_jax.train.presets import get_preset

RESULTS = Path(__file__).resolve().parents[3] / "evals/results"
BASE = get_preset("moas").replace(data__vocab_size=283)


def parameters(config):
    return count_params(jax.eval_shape(lambda: init_params(config.model, jax.random.key(0))))


def test_the_published_models_are_among_the_variants():
    positions = 256 * 384
    for variant, published in (("mha", 7_190_016), ("average", 10_139_136), ("soft", 10_287_744)):
        assert parameters(VARIANTS[variant](BASE)) - positions == published
    assert VARIANTS["soft"](BASE) == BASE
    assert parameters(VARIANTS["mha+matched"](BASE)) == pytest.approx(parameters(BASE), rel=1e-3)
    nested = VARIANTS["nested-soft"](BASE)
    assert parameters(VARIANTS["mha+matched-nested"](BASE)) == pytest.approx(
        parameters(nested), rel=1e-3
    )
    # Nested, the router is all that is added to MHA.
    router = 4 * BASE.model.schemes.work(384)
    assert parameters(nested) - parameters(VARIANTS["mha"](BASE)) == router


def test_variants_differ_in_what_they_are_named_for():
    for variant, make in VARIANTS.items():
        config = make(get_preset("moas-2000"))
        assert config.curriculum.max_steps == 2000, variant
        assert config.optimizer == get_preset("moas-2000").optimizer, variant
        if "schemes" in config.model.layers:
            kind = config.model.schemes.kind
            assert kind in variant, variant
            assert config.model.schemes.nested == variant.startswith("nested"), variant
            detached = variant.endswith(("detached", "half"))
            quiet = detached or variant.endswith("no-noise")
            assert config.model.schemes.gate_noise == (not quiet), variant
            assert config.model.schemes.detached == detached, variant
        assert (config.curriculum.peak > 0) == ("kv-cost" in variant), variant
        if "kv-cost" in variant:
            assert (config.curriculum.weighs, config.curriculum.explore) == ("kv_cost", 0)
            assert config.curriculum.target == (0.5 if variant.endswith("half") else 0.45)
    weights = {
        VARIANTS[f"soft+balance-{w}"](BASE).curriculum.explore for w in ("0", "0.1", "1", "10")
    }
    assert weights == {0.0, 0.1, 1.0, 10.0}


@pytest.fixture
def texts(tmp_path):
    """Two texts that share most of their characters."""
    rng = np.random.default_rng(0)
    for name, letters in (("own", "abc d.\n1"), ("other", "abcé ")):
        (tmp_path / f"{name}.txt").write_text("".join(rng.choice(list(letters), 4000)))
    return str(tmp_path / "own.txt"), str(tmp_path / "other.txt")


def test_every_run_is_planned_once_with_five_seeds(texts):
    plan = list(runs(texts[:1]))
    names = [run.name for run in plan]
    assert len(set(names)) == len(names)
    assert {f"steps-2000_nested-hard+kv-cost_s{seed}" for seed in range(5)} <= set(names)
    assert {run.config.data.vocab_size for run in plan} == {8}
    assert all(run.config.seed == run.seed for run in plan)


def test_every_character_is_of_one_class(texts):
    classes = character_classes(CharacterConfig(source=texts[:1], vocab_size=10))
    assert {name: int(found.sum()) for name, found in classes.items()} == {
        "letter": 4, "digit": 1, "space": 2, "other": 1,
    }  # fmt: skip
    assert (np.sum(list(classes.values()), axis=0)[:8] == 1).all()


def shrink(config):
    return config.replace(
        data__length=16,
        model__layers=config.model.layers.replace("*4", ""),
        model__width=8,
        model__num_heads=2,
        model__num_kv_heads=1 if config.model.num_kv_heads == 1 else 2,
        model__head_dim=4,
        model__mlp_width=8,
        model__learned_positions=16,
        model__dtype="float32",
        curriculum__learn_steps=1,
        curriculum__ramp_steps=2,
        curriculum__hold_steps=1,
        batch_tokens=64,
        log_every=1,
        seed=0,
    )


def small(variant, source):
    config = VARIANTS[variant](get_preset("moas-2000"))
    if config.model.layers.startswith("schemes"):
        schemes = dataclasses.replace(config.model.schemes, names="mha,mqa", hidden=2)
        config = config.replace(model__schemes=schemes)
    config = shrink(config.replace(data__source=(source,), data__vocab_size=8))
    return Run("steps-2000", variant, 0, config)


def test_what_only_this_experiment_measures_goes_into_its_files(texts, tmp_path, monkeypatch):
    example = load_results(RESULTS, "routed-attention")[0]
    plan = [Run("steps-500", "soft", seed, BASE.replace(seed=seed)) for seed in range(2)]
    made = []

    def run(config, workdir, *, resume, labels, timed):
        assert timed
        made.append(config.seed)
        return dataclasses.replace(example, seed=config.seed, **labels)

    def measure(run, workdir, elsewhere):
        return {
            "seed": run.seed,
            "where": workdir.name,
            "elsewhere": {name: {} for name in elsewhere},
        }

    monkeypatch.setattr(moas, "runs", lambda text: iter(plan))
    monkeypatch.setattr(moas, "measure", measure)
    monkeypatch.setattr(experiment, "run", run)
    args = MoasArgs(str(tmp_path / "out"), str(tmp_path / "scratch"), text=texts[:1])
    for _ in range(2):
        assert moas.reproduce(args) == 0
        assert made == [0, 1]
    details = [result.details for result in load_results(tmp_path / "out", "moas")]
    assert [d["where"] for d in details] == ["steps-500_soft_s0", "steps-500_soft_s1"]
    assert "soft" in (tmp_path / "out" / "moas" / "table.md").read_text()
    assert (tmp_path / "out" / "moas" / "quality.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_experiment_runs_from_text_to_table_and_is_resumed(
    texts, tmp_path, monkeypatch, compile_cache
):
    variants = ("mha+matched", "nested-hard+kv-cost")
    monkeypatch.setattr(moas, "runs", lambda text: (small(v, text[0]) for v in variants))
    args = MoasArgs(
        str(tmp_path / "out"),
        str(tmp_path / "scratch"),
        jobs=2,
        text=texts[:1],
        elsewhere=texts[1:],
    )
    assert moas.reproduce(args) == 0
    folder = tmp_path / "out" / "moas"
    made = {path.name: path.read_bytes() for path in folder.glob("*.json")}
    assert sorted(made) == [f"steps-2000_{variant}_s0.json" for variant in variants]
    dense, mixed = (json.loads(text)["details"] for _, text in sorted(made.items()))
    assert dense["kv_bytes_stored"] == mixed["kv_bytes_stored"] == 2 * 2 * 4 * 4
    assert "share" not in dense
    assert np.shape(mixed["share"]) == (1, 2)
    assert sum(mixed["share"][0]) == pytest.approx(1, rel=1e-5)
    assert 0 < mixed["entropy"][0] <= np.log(2) + 1e-5
    assert set(mixed["by_class"]) == {"letter", "digit", "space", "other"}
    assert set(mixed["elsewhere"]) == {"other"}
    assert [row["step"] for row in mixed["history"]] == [1, 2, 3, 4]
    table = (folder / "table.md").read_text()
    for said in ("mha+matched", "nested-hard+kv-cost", "mha/mqa", "other, nats/character"):
        assert said in table
    assert (folder / "quality.png").stat().st_size > 1000
    result = load_results(tmp_path / "out", "moas")[1]
    assert result.bits_per_byte is None
    assert result.sequences == 24  # the whole held-out part, once
    assert moas.reproduce(args) == 0
    assert {path.name: path.read_bytes() for path in folder.glob("*.json")} == made


@pytest.mark.slow
def test_variants_are_timed_untrained(texts, tmp_path, monkeypatch, compile_cache):
    variants = ("mha", "nested-hard")
    plan = [
        run._replace(seed=seed) for run in (small(v, texts[0]) for v in variants) for seed in (0, 1)
    ]
    monkeypatch.setattr(moas, "runs", lambda text: iter(plan))
    file = tmp_path / "new" / "times.json"
    args = MoasArgs(str(tmp_path / "out"), text=texts[:1], times=str(file))
    assert moas.reproduce(args) == 0
    assert not (tmp_path / "out").exists()
    result = json.loads(file.read_text())
    parts = ("step", "forward", "decode", "decode-long")
    rows = {(row["part"], row["variant"]): row for row in result["rows"]}
    assert list(rows) == list(itertools.product(parts, variants))
    assert all(row["milliseconds"] > 0 for row in rows.values())
    for part, length in (("decode", 16), ("decode-long", result["long"])):
        dense, mixed = (rows[part, variant] for variant in variants)
        assert (dense["kv_cost"], dense["kv_bytes"]) == (1, length * 2 * 2 * 4 * 4)
        assert mixed["kv_bytes"] == round(mixed["kv_cost"] * dense["kv_bytes"])
        assert 0.5 <= mixed["kv_cost"] < 1
    assert result["device"] in times_caption(result)


def test_what_there_is_no_time_for_is_skipped_and_says_so(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(moas, "runs", lambda text: iter([small("soft", text[0])]))
    file = tmp_path / "times.json"
    parts = ("step", "decode-long")
    args = MoasArgs(
        str(tmp_path / "out"), text=texts[:1], times=str(file), timed=parts, max_minutes=1e-9
    )
    assert moas.reproduce(args) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["part"] for row in rows] == [*parts]
    for row in rows:
        assert row["milliseconds"] is None
        assert "skipped" in row["error"]


def test_texts_that_will_not_do_are_refused_before_anything_runs(texts, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("a few characters")
    for name, said in (
        ("empty.txt", r"empty\.txt' holds no text\.$"),
        ("short.txt", "characters in its validation split, too few for one window of length=256"),
    ):
        with pytest.raises(ValueError, match=said):
            moas.reproduce(MoasArgs(text=(str(tmp_path / name),)))
        with pytest.raises(ValueError, match=said):
            moas.reproduce(MoasArgs(text=texts[:1], elsewhere=(str(tmp_path / name),)))
