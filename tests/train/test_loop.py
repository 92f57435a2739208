"""The loop: stopping and going on leaves no trace, and nothing that was saved is lost."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from routing_jax import cli
from routing_jax.checkpoint import Checkpointer
from routing_jax.evals.results import read_result
from routing_jax.train import loop
from routing_jax.train.loop import Interrupted, Trained, TrainingDiverged, train, train_mesh
from routing_jax.train.metrics import read_metrics

from ..processes import start_python


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def lines(folder):
    return (folder / "metrics.jsonl").read_text()


def newest(folder):
    return Checkpointer(folder / "checkpoints").latest()


def before_batch(monkeypatch, number, act):
    """Calls act(batch) in place of the batch that step `number` reads."""
    original = loop.batches

    def spoiled(*args, start_step=0, **kwargs):
        stream = original(*args, start_step=start_step, **kwargs)
        for step, batch in enumerate(stream, start_step + 1):
            yield act(batch) if step == number else batch

    monkeypatch.setattr(loop, "batches", spoiled)


def terminate(batch):
    os.kill(os.getpid(), signal.SIGTERM)
    return batch


class Whole(NamedTuple):
    """A run that was never stopped."""

    trained: Trained
    text: str
    folder: Path

    def copy(self, folder):
        return Path(shutil.copytree(self.folder, folder / "copy"))


@pytest.fixture(scope="module")
def whole(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return Whole(train(tiny_run, folder, quiet=True), lines(folder), folder)


def test_all_phases_are_in_the_run(whole):
    rows = [json.loads(line) for line in whole.text.splitlines()]
    assert whole.trained.step == 24
    assert [row["step"] for row in rows] == list(range(1, 25))
    # Accuracy holds after step 6, and the loop knows when step 7 is under way.
    assert [row["length"] for row in rows] == [8] * 7 + [16] * 17
    assert [row["lambda"] for row in rows] == [0.0] * 12 + [0.125, 0.25, 0.375] + [0.5] * 9


def test_stopped_again_and_again_a_run_is_the_one_never_stopped(
    whole, tiny_run, tmp_path, monkeypatch
):
    # Around the change of length, the ramp, a checkpoint of its own accord, and the end.
    folder, start = tmp_path / "stopped", None
    for stop in (2, 6, 7, 8, 10, 13, 16, 24):
        with monkeypatch.context() as patch:
            before_batch(patch, stop, terminate)
            with pytest.raises(Interrupted, match=f"step {stop} is saved"):
                train(tiny_run, folder, resume_step=start, quiet=True)
        start = newest(folder)
        assert start == stop
        assert len(lines(folder).splitlines()) == stop
    trained = train(tiny_run, folder, resume_step=start, quiet=True)
    assert lines(folder) == whole.text
    assert trained.step == whole.trained.step
    same(trained.state, whole.trained.state)


def test_a_run_reads_from_its_first_batch_on_and_so_does_what_resumes_it(
    whole, tiny_run, tmp_path, monkeypatch
):
    config = tiny_run.replace(first_batch=100)
    later = train(config, tmp_path / "later", quiet=True)
    assert later.step == whole.trained.step
    assert lines(tmp_path / "later") != whole.text
    with monkeypatch.context() as patch:
        before_batch(patch, 110, terminate)
        with pytest.raises(Interrupted, match="step 10 is saved"):
            train(config, tmp_path / "stopped", quiet=True)
    trained = train(config, tmp_path / "stopped", resume_step=10, quiet=True)
    assert lines(tmp_path / "stopped") == lines(tmp_path / "later")
    same(trained.state, later.state)


def test_going_back_to_an_older_checkpoint_repeats_the_same_losses(whole, tiny_run, tmp_path):
    folder = whole.copy(tmp_path)
    steps = Checkpointer(folder / "checkpoints").steps()
    assert steps == [15, 20, 24]
    trained = train(tiny_run, folder, resume_step=15, quiet=True)
    assert lines(folder) == whole.text
    same(trained.state, whole.trained.state)


SIGNALLED = """
import os, sys
from routing_jax import cli
from routing_jax.train import loop
original = loop.batches
def batches(*args, start_step=0, **kwargs):
    for step, batch in enumerate(original(*args, start_step=start_step, **kwargs), start_step):
        if step == 10:  # the save of step 10 is under way
            os.kill(os.getpid(), int(sys.argv[1]))
        yield batch
loop.batches = batches
sys.exit(cli.main(sys.argv[2:]))
"""


def test_a_killed_process_resumes_to_the_same_losses(whole, tiny_flags, tmp_path):
    folder = tmp_path / "killed"
    args = ["recall-128", "--workdir", str(folder), *tiny_flags]
    killed = start_python(SIGNALLED, int(signal.SIGKILL), "train", *args)
    _, error = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, error
    assert newest(folder) in (5, 10)
    assert cli.main(["train", *args, "--resume"]) == 0
    assert lines(folder) == whole.text
    assert read_result(folder / "result.json").steps == 24


def poison(batch):
    return batch._replace(weights=batch.weights * np.nan)


def test_a_loss_that_is_not_finite_stops_with_the_last_finite_state(
    whole, tiny_run, tmp_path, monkeypatch
):
    folder = tmp_path / "diverged"
    with monkeypatch.context() as patch:
        before_batch(patch, 9, poison)
        with pytest.raises(TrainingDiverged, match="of step 9 is not finite") as caught:
            train(tiny_run, folder, quiet=True)
    # Step 9 changed nothing, and step 10 was under way before its loss was read.
    assert f"state is saved as step 9 in {folder}/checkpoints" in str(caught.value)
    assert lines(folder).splitlines() == whole.text.splitlines()[:8]
    trained = train(tiny_run, folder, resume_step=newest(folder), quiet=True)
    assert trained.step == 24
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [*range(1, 9), *range(10, 25)]
    assert np.isfinite([row["loss"] for row in rows]).all()


def test_a_huge_learning_rate_diverges_and_a_lower_one_goes_on_from_there(tiny_run, tmp_path):
    huge = tiny_run.replace(optimizer__learning_rate=1e38, optimizer__warmup_steps=0)
    with pytest.raises(TrainingDiverged, match=r"resume with a lower optimizer\.learning_rate"):
        train(huge, tmp_path, quiet=True)
    start = newest(tmp_path)
    mesh = train_mesh(tiny_run)
    state, _ = Checkpointer(tmp_path / "checkpoints").restore(
        start, loop.abstract_state(tiny_run, mesh)
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state)))


def test_metrics_are_read_after_the_next_step_is_dispatched(tiny_run, tmp_path, monkeypatch):
    events = []
    put_batch, device_get = loop.put_batch, jax.device_get

    def put(*args):
        events.append("dispatch")
        return put_batch(*args)

    def get(values):
        if isinstance(values, dict) and "finite" in values:
            events.append("read")
        return device_get(values)

    monkeypatch.setattr(loop, "put_batch", put)
    monkeypatch.setattr(jax, "device_get", get)
    train(tiny_run.replace(checkpoint_every=100), tmp_path, quiet=True)
    # One step comes after the end: that it was the end is read while it runs.
    assert events == ["dispatch"] + ["dispatch", "read"] * 24


def test_resuming_a_finished_run_takes_no_step(whole, tiny_run, tmp_path, monkeypatch):
    folder = whole.copy(tmp_path)
    before = {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*.json")}
    before_batch(monkeypatch, 25, lambda batch: pytest.fail("a step was taken"))
    trained = train(tiny_run, folder, resume_step=24, quiet=True)
    assert lines(folder) == whole.text
    assert (trained.step, newest(folder)) == (24, 24)
    assert {path: path.read_bytes() for path in before} == before
    # The time of the training that led here still counts.
    assert trained.seconds >= 0.5 * whole.trained.seconds


def test_a_mesh_that_does_not_fit_leaves_no_folder(tiny_run, tmp_path):
    with pytest.raises(ValueError, match=r"^mesh is data=3"):
        train(tiny_run.replace(mesh__data=3), tmp_path / "new", quiet=True)
    assert not (tmp_path / "new").exists()
