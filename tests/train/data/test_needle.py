"""Needles: each fact stands whole in the noise, and a question's answer is its value."""

import dataclasses

import numpy as np
import pytest

from routing_jax.train.data import NeedleConfig, batches
from routing_jax.train.data.needle import needle_batch

CONFIG = NeedleConfig(length=64, num_needles=5, num_queries=2, num_keys=9, num_values=4)
NEEDLE, ASK = CONFIG.vocab_size - 2, CONFIG.vocab_size - 1


def draw(config=CONFIG, step=0, size=64, **changes):
    given = {"split": "train", "seed": 3} | changes
    return needle_batch(config, step=step, batch_size=size, **given)


@pytest.mark.parametrize(("length", "behind"), [(64, 0), (21, 0), (13, 0), (64, 7), (26, 13)])
def test_a_question_is_answered_by_the_one_fact_of_its_key(length, behind):
    batch = draw(dataclasses.replace(CONFIG, after=behind), length=length)
    end = length - behind
    for tokens, targets, weights in zip(*batch):
        (facts,) = np.nonzero(tokens == NEEDLE)
        told = {tokens[at + 1]: tokens[at + 2] for at in facts}
        assert len(told) == len(facts) == min(5, (end - 4) // 3)
        assert all(key < 9 <= value < 13 for key, value in told.items())
        asked = np.flatnonzero(weights)
        assert asked.tolist() == [end - 3, end - 1]
        assert np.all(tokens[asked - 1] == ASK)
        assert [targets[at] for at in asked] == [told[tokens[at]] for at in asked]
        rest = np.delete(tokens[: end - 4], (facts[:, None] + np.arange(3)).ravel())
        for noise in (rest, tokens[end:]):
            assert np.all((noise >= 13) & (noise < NEEDLE))


def test_facts_stand_anywhere():
    one = NeedleConfig(length=64, num_needles=1)
    tokens = draw(one, size=4096).tokens
    places = np.argmax(tokens == one.vocab_size - 2, axis=1)
    counts = np.bincount(places, minlength=60)[:60]
    expected = 4096 / 60
    assert np.all(np.abs(counts - expected) < 5 * expected**0.5)


def test_batches_follow_seed_step_and_split():
    base = draw().tokens
    np.testing.assert_array_equal(base, draw().tokens)
    for other in ({"seed": 4}, {"split": "validation"}, {"step": 1}):
        assert np.any(draw(**other).tokens != base)
    through = next(batches(CONFIG, split="train", seed=3, batch_size=64))
    np.testing.assert_array_equal(through.tokens, base)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_values": 1}, "num_values=1 and num_noise=256 must be at least 2 and 1"),
        ({"num_needles": 65}, "num_needles=65 must lie from 1 to num_keys=64"),
        ({"num_queries": 2}, "num_queries=2 must lie from 1 to num_needles=1"),
        ({"length": 4}, "length=4 must be at least 5: one fact, one ask"),
        ({"after": -1}, "after=-1 must be at least 0"),
        (
            {"length": 16, "num_needles": 9},
            "num_needles=9 must be at most 4 at length=16 and after=0",
        ),
        (
            {"length": 32, "num_needles": 9, "after": 15},
            "num_needles=9 must be at most 5 at length=32 and after=15",
        ),
    ],
)
def test_a_bad_field_is_named(fields, said):
    with pytest.raises(ValueError, match=rf"^{said}\.$"):
        NeedleConfig(**fields)
