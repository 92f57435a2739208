"""The iterator: a step is a place in the data, whoever reads it and from wherever it starts."""

import itertools
import threading

import numpy as np
import pytest

from routing_jax.train.data import Batch, RecallConfig, TextConfig, batches
from routing_jax.train.data.recall import recall_batch

RECALL = RecallConfig(length=32, num_queries=2)
CONFIGS = [RECALL, TextConfig(length=64)]
config_and_split = pytest.mark.parametrize(
    ("config", "split"), list(itertools.product(CONFIGS, ["train", "validation"]))
)


def take(count, config, split="train", seed=0, batch_size=6, **kwargs):
    found = batches(config, split=split, seed=seed, batch_size=batch_size, **kwargs)
    return list(itertools.islice(found, count))


def same(some, others):
    return len(some) == len(others) and all(
        (a == b).all() for one, other in zip(some, others) for a, b in zip(one, other)
    )


@config_and_split
def test_a_later_start_is_skipping(config, split):
    assert same(take(9, config, split)[5:], take(4, config, split, start_step=5))


@config_and_split
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_hold_the_rows_of_the_global_batch_in_order(config, split, processes):
    whole = take(3, config, split)
    parts = [
        take(3, config, split, process_index=i, process_count=processes) for i in range(processes)
    ]
    assert parts[0][0].tokens.shape[0] == 6 // processes
    joined = [Batch(*map(np.concatenate, zip(*shares))) for shares in zip(*parts)]
    assert same(joined, whole)


@config_and_split
def test_two_iterators_agree_and_steps_differ(config, split):
    some = take(4, config, split)
    assert same(some, take(4, config, split))
    assert not same(some[:2], some[2:])


def test_batches_are_the_recall_tasks_own_in_order():
    kwargs = {"split": "validation", "seed": 3, "batch_size": 4, "length": 16, "place": "first"}
    expected = [recall_batch(RECALL, step=step, **kwargs) for step in range(100, 120)]
    assert same(take(20, RECALL, start_step=100, **kwargs), expected)


def test_a_dropped_iterator_takes_its_thread_with_it():
    before = threading.active_count()
    take(2, RECALL)
    for thread in threading.enumerate():
        if thread.name.startswith("grain"):
            thread.join(timeout=10)
    assert threading.active_count() <= before


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"split": "test"}, "split='test'"),
        ({"place": "last"}, "place='last'"),
        ({"seed": -1}, "seed=-1"),
        ({"start_step": -1}, "start_step=-1"),
        ({"length": 0}, "length=0"),
        ({"length": 3}, "length=3 must be at least 4"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 5, "process_count": 2}, "batch_size=5 must be a positive multiple"),
        ({"process_index": 2, "process_count": 2}, "process_index=2"),
    ],
)
def test_bad_arguments_are_named_at_once(kwargs, message):
    with pytest.raises(ValueError, match=message):
        batches(RECALL, **{"split": "train", "seed": 0, "batch_size": 4, **kwargs})


def test_a_missing_corpus_is_named_at_once(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        batches(TextConfig(source=str(tmp_path / "nowhere")), split="train", seed=0, batch_size=2)
