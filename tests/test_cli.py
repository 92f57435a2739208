"""The command line, end to end in a temporary folder, and what it says to a mistake."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath

from routing_jax.checkpoint import Checkpointer
from routing_jax.cli import COMMANDS, main
from routing_jax.evals.results import read_result
from routing_jax.train import loop
from routing_jax.train.config import config_from_dict, config_to_dict
from routing_jax.train.experiments import routed_attention
from routing_jax.train.presets import PRESETS

REPOSITORY = Path(__file__).resolve().parents[1]
PNG = b"\x89PNG\r\n\x1a\n"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tiny_flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    assert main(["train", "recall-128", "--workdir", str(folder), *tiny_flags]) == 0
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def test_training_leaves_a_folder_that_tells_the_story(trained, tiny_run):
    assert {path.name for path in trained.iterdir()} == {
        "checkpoints",
        "config.json",
        "heatmap.png",
        "history.png",
        "metrics.jsonl",
        "result.json",
        "tensorboard",
    }
    assert config_from_dict(json.loads((trained / "config.json").read_text())) == tiny_run
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 25))
    result = read_result(trained / "result.json")
    assert (result.task, result.steps, result.sequences) == ("recall-128", 24, 16)
    assert len(result.heatmap) == 1
    assert len(result.heatmap[0]) == len(result.heatmap_tokens) == 16
    assert Checkpointer(trained / "checkpoints").steps() == [15, 20, 24]
    for name in ("heatmap.png", "history.png"):
        assert (trained / name).read_bytes().startswith(PNG)
    (events,) = (trained / "tensorboard").iterdir()
    assert events.stat().st_size > 1000


def test_eval_agrees_with_the_result(trained, capsys):
    result = read_result(trained / "result.json")
    before = contents(trained)
    assert main(["eval", str(trained)]) == 0
    shown = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert shown["step"] == "24"
    for name in ("accuracy", "loss", "usage", "cost", "kv_cost", "sequences"):
        assert float(shown[name]) == pytest.approx(getattr(result, name), rel=1e-5), name
    assert main(["eval", str(trained), "--step", "15", "--length", "8"]) == 0
    assert "step           15\n" in capsys.readouterr().out
    assert contents(trained) == before


def test_resuming_a_finished_run_shows_it_again_and_keeps_its_time(copy, tiny_flags, capsys):
    before, kept = read_result(copy / "result.json"), contents(copy / "checkpoints")
    assert main(["train", "recall-128", "--workdir", str(copy), *tiny_flags, "--resume"]) == 0
    after = read_result(copy / "result.json")
    assert f"{after.accuracy:.3%} of 16 held-out sequences" in capsys.readouterr().out
    assert (after.accuracy, after.history) == (before.accuracy, before.history)
    assert after.minutes > 0.5 * before.minutes
    assert contents(copy / "checkpoints") == kept


def test_sigterm_ends_with_143_and_a_checkpoint_to_go_on_from(
    tiny_flags, tmp_path, monkeypatch, capsys
):
    original = loop.batches

    def batches(*args, start_step=0, **kwargs):
        for step, batch in enumerate(original(*args, start_step=start_step, **kwargs), start_step):
            if step == 10:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    args = ["train", "recall-128", "--workdir", str(tmp_path), *tiny_flags]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "batches", batches)
        assert main(args) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM; step 11 is saved.\n"
    assert Checkpointer(tmp_path / "checkpoints").latest() == 11


def test_damaged_checkpoints_are_named_and_the_one_before_them_works(copy, tiny_flags, capsys):
    def largest(step):
        files = (copy / "checkpoints" / f"step_{step}" / "state").rglob("*")
        return max(files, key=lambda path: path.stat().st_size)

    rows = (copy / "metrics.jsonl").read_text()
    os.truncate(largest(24), largest(24).stat().st_size // 2)
    largest(20).write_bytes(largest(20).read_bytes()[:-1] + b"?")
    before = contents(copy)
    args = ["train", "recall-128", "--workdir", str(copy), *tiny_flags]
    for flags, step in ((["--resume"], 24), (["--resume-step", "20"], 20)):
        assert main([*args, *flags]) == 2
        assert re.fullmatch(
            rf"error: the checkpoint of step {step} in {copy}/checkpoints/step_{step} is damaged: "
            r"[^\n]*; the one of step 15 before it is intact: pass --resume-step 15\n",
            capsys.readouterr().err,
        )
    assert main(["eval", str(copy)]) == 2
    error = capsys.readouterr().err
    assert f"error: the checkpoint of step 24 in {copy}/checkpoints/step_24 is damaged: " in error
    assert error.endswith("; the one of step 15 before it is intact: pass --step 15\n")
    assert main(["eval", str(copy), "--step", "15"]) == 0
    capsys.readouterr()
    second = ["train", "recall-128", "--workdir", f"{copy}/x", *tiny_flags]
    # Not of this run's steps, so none to resume.
    assert main([*second, "--start-from", str(copy)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: start_from is '{copy}': the checkpoint of step 24 in ")
    assert error.endswith("; the one of step 15 before it is intact\n")
    assert contents(copy) == before
    assert main([*args, "--resume-step", "15"]) == 0
    assert (copy / "metrics.jsonl").read_text() == rows
    assert main(["eval", str(copy)]) == 0


NEW = ["--workdir", "{new}"]
TRAIN = ["train", "recall-128", *NEW]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["trian"], "command 'trian' is unknown; accepted: train, eval, "),
        (["train", "recall", *NEW], "preset 'recall' is unknown; accepted: recall-128, "),
        (["train", "recall-128"], "Missing .*--workdir"),
        ([*TRAIN, "--model.widht", "8"], "Unrecognized .* --model.widht, 8; .* --model.width or "),
        ([*TRAIN, "--model.width", "wide"], "Error parsing --model.width: .*'wide'"),
        ([*TRAIN, "--model.width", "0"], "model.width is 0; it must be at least 1"),
        (
            [*TRAIN, "--model.layers", "dense"],
            "model.layers is 'dense', where 'dense' is not ",
        ),
        ([*TRAIN, "--curriculum.weighs", "time"], "invalid choice 'time' .*--curriculum.weighs"),
        ([*TRAIN, "--optimizer.learning-rate", "nan"], "optimizer.learning_rate is nan; it "),
        ([*TRAIN, "--resume", "yes"], "Unrecognized .* yes"),
        ([*TRAIN, "--mesh.data", "3"], "mesh is data=3, fsdp=1, tensor=1; the axes must multiply"),
        ([*TRAIN, "--batch-tokens", "64"], "batch_tokens is 64; it must hold at least one microb"),
        ([*TRAIN, "--data.length", "2", "--curriculum.lengths"], "length=2 must be at least 4"),
        ([*TRAIN, "--curriculum.lengths", "2"], "length=2 must be at least 4"),
        ([*TRAIN, "--resume-step", "7"], "resume_step is 7; {new} has checkpoints of steps []"),
        ([*TRAIN, "--process-id", "0"], ".* are given without distributed, which they need"),
        (["train", "lm", *NEW, "--data.source", "{new}/text"], "source='{new}/text' does not exis"),
        (["train", "lm", *NEW, "--data.source", "{empty}"], "source='{empty}' holds no text"),
        (["eval", "{new}"], "{new} holds no run: there is no config.json in it"),
        (["eval"], "Missing from routing-jax eval: STR the run's folder"),
        (["presets", "all"], "presets takes no argument; 'all' was given"),
        (["data", "show"], "data takes 'prepare SOURCE OUT'; show was given"),
        (["data", "prepare", "{empty}", "{new}"], "source='{empty}' holds no text"),
        (
            ["reproduce", "chess"],
            "reproduce takes one of routed-attention, moas, block-routing, flux; 'chess' was given",
        ),
        (["reproduce", "routed-attention", "--only", "chess"], "only is 'chess', which names no r"),
        (["reproduce", "routed-attention", "--only", "("], r"only is '\(', which is no regular e"),
        (
            ["bench", "chess"],
            "bench takes 'mixing', 'attention', 'block-routing', 'serve-path' or 'tpu-schedule'",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(args, said, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    names = {"new": str(tmp_path / "new"), "empty": str(tmp_path / "empty")}
    assert main([arg.format(**names) for arg in args]) == 2
    error = capsys.readouterr().err
    for name, path in names.items():
        said = said.replace(f"{{{name}}}", re.escape(path))
    assert re.match(f"error: {said.replace('[]', re.escape('[]'))}", error), error
    assert re.fullmatch(r"error: [^\n]+\.\n", error), error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([*TRAIN[:-1], "gs://b/run"], "workdir is 'gs://b/run', which can't"),
        (["eval", "gs://b/run"], "workdir is 'gs://b/run', which can't"),
        ([*TRAIN, "--start-from", "gs://b/old"], "start_from is 'gs://b/old', which can't"),
        (["train", "lm", *NEW, "--data.source", "gs://b/text"], "source='gs://b/text' cannot"),
    ],
)
def test_a_bucket_out_of_reach_is_one_sentence_and_no_log(
    args, said, tmp_path, monkeypatch, capsys, caplog
):
    def asking(local):
        def ask(path):
            if not str(path).startswith("gs://"):
                return local(path)
            try:
                raise TimeoutError("no route to host")
            except TimeoutError:  # as gcsfs does
                logging.getLogger("gcsfs").exception("out of retries")
                raise

        return ask

    kind = type(epath.Path("gs://b/x"))
    for name in ("exists", "is_dir"):
        monkeypatch.setattr(kind, name, asking(getattr(kind, name)))
    assert main([arg.format(new=tmp_path / "new") for arg in args]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: {said} be re[^\n]*: TimeoutError: no route to host\.\n", error)
    assert not caplog.records
    assert not (tmp_path / "new").exists()


def test_a_folder_that_holds_a_run_is_refused_and_left_as_it_is(trained, tiny_flags, capsys):
    before = contents(trained)
    args = ["train", "recall-128", "--workdir", str(trained), *tiny_flags]
    assert main(args) == 2
    assert capsys.readouterr().err == (
        f"error: workdir {trained} holds this configuration already; pass --resume to go on with "
        "it, or a new folder.\n"
    )
    assert main([*args, "--seed", "9"]) == 2
    assert "holds a run with another configuration; pass --resume" in capsys.readouterr().err
    assert main([*args, "--resume", "--model.width", "16"]) == 2
    assert re.fullmatch(r"error: .* is of another model: leaf .*\n", capsys.readouterr().err)
    assert contents(trained) == before


@pytest.mark.parametrize("change", [lambda text: text[:200], lambda text: text[:-1] + ', "x": 1}'])
def test_a_configuration_that_cannot_be_read_is_one_sentence(copy, change, capsys):
    path = copy / "config.json"
    path.write_text(change(path.read_text()))
    assert main(["eval", str(copy)]) == 2
    assert re.fullmatch(
        rf"error: {path} cannot be read: [^\n]+\.\n", capsys.readouterr().err
    )  # fmt: skip


def test_a_bug_keeps_its_traceback(monkeypatch):
    def wrong(args):
        return int("a number that some library was given by mistake")

    monkeypatch.setitem(COMMANDS, "presets", (wrong, ""))
    # Raised in this file, which is not the package: not the user's to mend.
    with pytest.raises(ValueError, match="invalid literal"):
        main(["presets"])


def test_presets_are_listed(capsys):
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)


def test_help_names_every_command_and_explains_every_field(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)
    assert main(["train", "--help"]) == 0
    assert all(name in capsys.readouterr().out for name in ["recall-128"])
    with pytest.raises(SystemExit, match="0"):
        main(["train", "recall-128", "--help"])
    shown = capsys.readouterr().out
    for part, fields in config_to_dict(PRESETS["recall-128"]()).items():
        for name in fields if isinstance(fields, dict) else [None]:
            if (part, name) != ("data", "task"):
                flag = ".".join(filter(None, (part, name))).replace("_", "-")
                assert f"--{flag}" in shown, flag
    assert "(default: 129)" in shown  # the preset's value, not the class's


@pytest.mark.parametrize(
    ("module", "args", "said"),
    [
        ("routing_jax", ["presets"], ("recall-128 ", "", 0)),
        ("routing_jax.train", ["chess"], ("", "error: preset 'chess' is unknown", 2)),
    ],
)
def test_it_runs_as_a_module(module, args, said, tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", module, *args],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    out, error, code = said
    assert process.stdout.startswith(out)
    assert process.stderr.startswith(error)
    assert process.returncode == code
    assert list(tmp_path.iterdir()) == []


def test_a_prepared_corpus_trains_a_language_model(compile_cache, tmp_path, capsys):
    files = tmp_path / "files"
    files.mkdir()
    for i in range(40):
        (files / f"{i}.txt").write_text(f"page {i}: " + "a quick brown fox jumps " * 20)
    out = tmp_path / "prepared"
    assert main(["data", "prepare", str(files), str(out)]) == 0
    assert capsys.readouterr().out == f"written to {out}/text/1.0.0\n"
    held = contents(out)
    assert main(["data", "prepare", str(files), str(out)]) == 2
    assert "already holds 'text'" in capsys.readouterr().err
    assert contents(out) == held
    small = """
        --data.length 32 --model.width 8 --model.layers conv --model.mlp-width 0
        --curriculum.learn-steps 2 --curriculum.ramp-steps 1 --curriculum.hold-steps 1
        --batch-tokens 256 --eval-sequences 8
    """
    workdir = tmp_path / "lm"
    args = ["--workdir", str(workdir), "--data.source", str(out), *small.split()]
    assert main(["train", "lm", *args]) == 0
    assert "bits per byte" in capsys.readouterr().out
    result = read_result(workdir / "result.json")
    assert 0 < result.bits_per_byte < 20
    assert result.usage == 0


def test_reproduce_lists_its_runs_from_the_command_line(tmp_path, capsys):
    args = ["--list", "--only", "recall-128_(routed|conv)_s[01]$", "--out", str(tmp_path / "new")]
    assert main(["reproduce", "routed-attention", *args]) == 0
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [
        "recall-128_routed_s0",
        "recall-128_routed_s1",
        "recall-128_conv_s0",
        "recall-128_conv_s1",
    ]
    assert routed_attention.EXPERIMENT == "routed-attention"
    assert not (tmp_path / "new").exists()
