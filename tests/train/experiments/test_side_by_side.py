import functools
import os
import time

import pytest

from routing_jax.train.experiments import side_by_side as module
from routing_jax.train.experiments.experiment import ReproduceArgs
from routing_jax.train.experiments.side_by_side import Task, side_by_side


def test_each_gpu_gets_its_share_and_a_failure_stays_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_gpus", lambda: ["3", "5"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    # Each waits until both have begun, or until it is told to give up.
    meet = (
        "echo $CUDA_VISIBLE_DEVICES; touch {0}; n=0; "
        "until [ -e {1} ] || [ $n -gt 300 ]; do sleep 0.1; n=$((n+1)); done; [ -e {1} ]"
    )
    a, b = tmp_path / "a", tmp_path / "b"
    tasks = [
        Task("a", functools.partial(os.system, meet.format(a, b))),
        Task("b", functools.partial(os.system, meet.format(b, a))),
        Task("c", functools.partial(os._exit, 3)),
    ]
    told = {}
    left = side_by_side(tasks, 2, tmp_path / "logs", told=told.__setitem__)
    assert left == []
    assert told == {"a": 0, "b": 0, "c": 3}
    shown = {name: (tmp_path / "logs" / f"{name}.txt").read_text() for name in "abc"}
    assert shown == {"a": "3\n", "b": "5\n", "c": ""}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"


def test_a_task_waits_for_the_one_it_follows(tmp_path):
    first, second, third = (str(tmp_path / name) for name in ("first", "second", "third"))
    tasks = [
        Task("third", functools.partial(os.rename, second, third), after="second"),
        Task("second", functools.partial(os.rename, first, second), after="first"),
        Task("first", functools.partial(os.mkdir, first), after="made long ago"),
    ]
    ended = []
    side_by_side(
        tasks, 3, tmp_path / "logs", told=lambda name, status: ended.append((name, status))
    )
    assert ended == [("first", 0), ("second", 0), ("third", 0)]
    assert os.path.isdir(third)


def test_nothing_begins_when_the_time_is_over(tmp_path):
    tasks = [Task(name, functools.partial(time.sleep, 0.2)) for name in ("one", "two")]
    ended = []
    left = side_by_side(
        tasks, 1, tmp_path, told=lambda name, status: ended.append(name), seconds=0.1
    )
    assert (ended, left) == (["one"], ["two"])


def test_jobs_that_will_not_do_are_refused():
    with pytest.raises(ValueError, match=r"^jobs is 0; it must be at least 1\.$"):
        ReproduceArgs(jobs=0)
    with pytest.raises(ValueError, match=r"scratch is 'gs://b/c'; with several jobs"):
        ReproduceArgs(scratch="gs://b/c", jobs=2)
