"""The same run on one device, on eight, and on two processes gives the same losses."""

import socket
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from routing_jax.cli import main
from routing_jax.evals.evaluate import Evaluation
from routing_jax.evals.results import read_result
from routing_jax.train.command import TrainArgs, parse
from routing_jax.train.loop import train
from routing_jax.train.metrics import read_metrics
from routing_jax.train.presets import get_preset
from routing_jax.train.run import evaluate_run

from ..processes import finish, start_python

TEXT = """
    --data.length 16 --data.num-values 4 --curriculum.lengths --curriculum.learn-steps 4
    --curriculum.ramp-steps 2 --curriculum.hold-steps 2 --model.width 16 --model.head-dim 8
    --model.num-heads 2 --model.num-kv-heads 2 --model.mlp-width 16 --model.layers routed
    --batch-tokens 256 --eval-sequences 32 --log-every 2 --checkpoint-every 100
"""
FLAGS = TEXT.split()


@pytest.fixture(scope="module")
def alone(compile_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    config = parse(TrainArgs, FLAGS, "test", TrainArgs(get_preset("recall-128"), "")).config
    trained = train(config, folder, quiet=True)
    return Alone(folder, evaluate_run(config, trained.state.params))


class Alone(NamedTuple):
    """The run on one device."""

    folder: Path
    evaluation: Evaluation


def assert_same_losses(folder, alone):
    rows, want = read_metrics(folder), read_metrics(alone.folder)
    assert [row["step"] for row in rows] == [1, 2, 4, 6, 8]
    for row, other in zip(rows, want, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            np.testing.assert_allclose(row[name], other[name], rtol=2e-5, err_msg=name)


def assert_same_result(folder, alone):
    result, other = read_result(folder / "result.json"), alone.evaluation
    assert (result.accuracy, result.sequences) == (other.accuracy, other.sequences)
    for name in ("loss", "usage", "cost", "kv_cost", "usage_per_layer"):
        np.testing.assert_allclose(getattr(result, name), getattr(other, name), rtol=2e-5)


EIGHT = """
import contextlib, sys
from routing_jax import cli
folder, *flags = sys.argv[1:]
main = ["train", "recall-128", *flags, "--workdir"]
mesh = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"]
assert cli.main([*main, f"{folder}/all", *mesh]) == 0
with open(f"{folder}/on_eight.txt", "w") as said, contextlib.redirect_stdout(said):
    assert cli.main(["eval", f"{folder}/all", "--mesh.fsdp", "4"]) == 0
assert cli.main([*main, f"{folder}/none", "--batch-tokens", "192"]) == 2
"""


@pytest.fixture(scope="module")
def eight(compile_cache, tmp_path_factory):
    """A run on eight devices, and what was said to one that was refused."""
    folder = tmp_path_factory.mktemp("eight")
    ((_, error),) = finish(start_python(EIGHT, folder, *FLAGS, devices=8))
    return folder, error


def test_eight_devices_give_the_losses_of_one(alone, eight):
    folder, error = eight
    assert_same_losses(folder / "all", alone)
    assert_same_result(folder / "all", alone)
    assert error == (
        "error: batch_tokens is 192: 12 sequences of 16 do not divide among mesh.data × mesh.fsdp "
        "× accumulation = 8.\n"
    )
    assert not (folder / "none").exists()


@pytest.mark.parametrize("said", ["on_eight.txt", None], ids=["eight devices", "one device"])
def test_a_run_is_evaluated_on_the_devices_at_hand(eight, said, capsys):
    folder, _ = eight
    workdir = folder / "all"  # trained with mesh.fsdp=2 and mesh.tensor=2
    if said is None:
        assert jax.device_count() == 1
        assert main(["eval", str(workdir)]) == 0
        text = capsys.readouterr().out
    else:
        text = (folder / said).read_text()
    shown = dict(line.split(None, 1) for line in text.splitlines())
    result = read_result(workdir / "result.json")
    for name in ("sequences", "accuracy", "loss", "usage", "cost", "kv_cost"):
        assert float(shown[name]) == pytest.approx(getattr(result, name), rel=2e-5), name


TWO = """
import os, signal, sys
import jax
from etils import epath
from routing_jax import cli
from routing_jax.train import loop
from routing_jax.train.run import read_config, run
folder, port, index, *flags = sys.argv[1:]
original = loop.batches
def batches(*args, start_step=0, **kwargs):
    for step, batch in enumerate(original(*args, start_step=start_step, **kwargs), start_step):
        if step == 2 and index == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch
loop.batches = batches
join = ["--distributed", "--num-processes", "2", "--process-id", index]
join += ["--coordinator-address", f"localhost:{port}"]
assert cli.main(["train", "recall-128", "--workdir", folder, *flags, *join]) == 143
config = read_config(epath.Path(folder))
try:
    loop.train_mesh(config.replace(mesh__data=1, mesh__tensor=2))
except ValueError as error:
    assert "mesh.data × mesh.fsdp = 1 must be a multiple of the 2 processes" in str(error), error
else:
    raise AssertionError("a batch whose rows no process could read alone")
run(config, folder, resume=True, quiet=True)
"""


def test_two_processes_stop_together_and_give_the_losses_of_one(alone, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # Only process 1 is told to stop; both do, at the next step that is logged.
    both = [start_python(TWO, tmp_path, port, index, *FLAGS) for index in range(2)]
    for _, error in finish(*both):
        assert "stopped by SIGTERM; step 4 is saved.\n" in error
    assert_same_losses(tmp_path, alone)
    assert_same_result(tmp_path, alone)
