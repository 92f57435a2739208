"""Recall tasks: what a slow solver finds by looking, and that nothing else gives it away."""

import itertools

import numpy as np
import pytest

from routing_jax.train.data.recall import RecallConfig, recall_batch

CONFIGS = {
    "marked": RecallConfig(length=64),
    "odd": RecallConfig(length=63, num_queries=3),
    "many": RecallConfig(length=64, num_queries=16, num_keys=100, num_values=7),
    "unmarked": RecallConfig(length=64, num_queries=5, marked=False),
    "mqar": RecallConfig(length=64, num_queries=6, style="mqar"),
    "mqar_odd": RecallConfig(length=61, num_queries=15, style="mqar", num_keys=15),
    "mqar_unmarked": RecallConfig(length=64, num_queries=6, style="mqar", marked=False),
}


def make(config, step=0, split="train", seed=0, batch_size=32, **kwargs):
    return recall_batch(config, split=split, seed=seed, step=step, batch_size=batch_size, **kwargs)


def solve(config, tokens, marked):
    """{position: value} by reading one sequence from left to right, knowing only the vocabulary.

    A key followed by a value for the first time is told; a key behind a MARKER is asked. Without
    marks a key seen before is asked, and its value is the first one it was told with.
    """
    told, answers = {}, {}
    for at, token in enumerate(tokens):
        if token >= config.keys:
            continue
        if token in told and (not marked or tokens[at - 1] == config.marker):
            answers[at] = told[token]
        elif at + 1 < len(tokens) and config.keys <= tokens[at + 1] < config.marker:
            told.setdefault(token, tokens[at + 1])
    return answers


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [None, 40, 9])
@pytest.mark.parametrize("place", ["random", "first"])
def test_a_slow_solver_finds_the_queries_and_their_values(name, length, place):
    config = CONFIGS[name]
    batch = make(config, length=length, place=place)
    expected = length or config.length
    assert batch.tokens.shape == batch.targets.shape == batch.weights.shape == (32, expected)
    assert [a.dtype for a in batch] == [np.int32, np.int32, np.float32]
    for tokens, targets, weights in zip(*batch):
        answers = solve(config, tokens.tolist(), config.marked)
        assert answers == {int(at): targets[at] for at in np.flatnonzero(weights)}
        assert set(weights.tolist()) <= {0.0, 1.0}
        assert len(answers) == min(config.num_queries, expected // 4 or 1) or not config.marked
        assert not targets[weights == 0].any()
        asked = tokens[weights > 0]
        assert len(set(asked.tolist())) == len(asked) >= 1
    assert batch.tokens.min() >= 0
    assert batch.tokens.max() < config.vocab_size


def test_the_layout_of_marked_pairs():
    config = RecallConfig(length=128)
    assert (config.keys, config.marker, config.filler, config.vocab_size) == (63, 127, 128, 129)
    tokens = make(config).tokens
    assert (np.sort(tokens[:, 0:126:2]) == np.arange(63)).all()  # every key once
    assert ((tokens[:, 1:126:2] >= 63) & (tokens[:, 1:126:2] < 127)).all()
    assert (tokens[:, 126] == config.marker).all()
    assert (make(config).weights.nonzero()[1] == 127).all()


def test_the_published_place_is_length_minus_two_before_the_query():
    for config in (RecallConfig(length=128), RecallConfig(length=64, num_queries=4)):
        batch = make(config, place="first")
        first = batch.weights.argmax(axis=1)
        rows = np.arange(32)
        assert (batch.tokens[rows, first] == batch.tokens[:, 0]).all()
        assert (batch.targets[rows, first] == batch.tokens[:, 1]).all()
    config = RecallConfig(length=128)
    assert make(config, place="first").weights.argmax(axis=1)[0] - 1 == config.length - 2


def test_unmarked_queries_stand_bare_and_a_token_left_over_comes_last():
    config = RecallConfig(length=64, num_queries=1, marked=False)
    batch = make(config)
    assert not (batch.tokens == config.marker).any()
    assert (batch.weights.argmax(axis=1) == 62).all()
    assert (batch.tokens[:, 63] == config.filler).all()
    assert ((batch.tokens == config.filler).sum(axis=1) == 1).all()


def test_the_queried_pair_is_uniform_over_places_and_values():
    config = RecallConfig(length=34, num_values=8)  # 16 pairs
    batch = make(config, batch_size=16_000)
    asked = batch.tokens[:, -1:]
    places = (batch.tokens[:, 0:32:2] == asked).argmax(axis=1)
    for found, choices in ((places, 16), (batch.targets[:, -1] - config.keys, 8)):
        counts = np.bincount(found, minlength=choices)
        expected = 16_000 / choices
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert len(counts) == choices
        assert chi_square < 50  # the 1e-5 tail of 15 degrees of freedom is 48


def test_mqar_asks_each_pair_once_at_gaps_that_fall_off():
    config = RecallConfig(length=256, num_queries=8, style="mqar", marked=False)
    batch = make(config, batch_size=2000)
    rows, at = batch.weights.nonzero()
    assert (batch.weights.sum(axis=1) == 8).all()
    asked = batch.tokens[rows, at].reshape(2000, 8)
    assert (np.sort(asked) == np.sort(batch.tokens[:, 0:16:2])).all()
    slots = (at - 16) // 2
    assert ((at - 16) % 2 == 0).all()
    # The first slot is drawn 1/1.0 : 1/2 : 1/3 ...: nearly always among eight of 120.
    frequency = np.bincount(slots, minlength=120) / 2000
    assert frequency[0] > 0.7
    octaves = [frequency[2**i : 2 ** (i + 1)].mean() for i in range(6)]
    assert all(near > 1.3 * far for near, far in itertools.pairwise(octaves))


def test_mqar_slots_follow_numpys_own_weighted_choice():
    config = RecallConfig(length=24, num_queries=2, style="mqar", marked=False)
    batch = make(config, batch_size=8000)
    ours = np.bincount((batch.weights.nonzero()[1] - 4) // 2, minlength=10) / 8000
    weights = np.arange(1, 11) ** (0.01 - 1)
    rng = np.random.default_rng(0)
    drawn = [rng.choice(10, 2, replace=False, p=weights / weights.sum()) for _ in range(8000)]
    theirs = np.bincount(np.ravel(drawn), minlength=10) / 8000
    np.testing.assert_allclose(ours, theirs, atol=0.03)


def test_mqar_noise_is_values_and_untold_keys_none_of_them_twice():
    config = RecallConfig(length=64, num_queries=4, style="mqar", marked=False)
    batch = make(config, batch_size=500)
    spare, body, noise_keys, noise = config.keys - 4, batch.tokens[:, 8:], 0, 0
    for told, row, weights in zip(batch.tokens[:, 0:8:2], body, batch.weights[:, 8:]):
        silent = row[weights == 0]
        keys = silent[silent < config.keys].tolist()
        assert len({*told.tolist(), *keys}) == len(told) + len(keys)
        noise_keys += len(keys)
        noise += silent.size
    assert abs(noise_keys / noise - spare / (spare + config.num_values)) < 0.02


def test_mqar_markers_stand_before_queries_and_nowhere_else():
    config = CONFIGS["mqar"]
    batch = make(config)
    assert ((batch.tokens[:, :-1] == config.marker) == (batch.weights[:, 1:] > 0)).all()


def test_a_batch_depends_on_each_of_seed_step_and_split_and_on_nothing_else():
    config = CONFIGS["mqar"]
    base = make(config).tokens
    assert (make(config).tokens == base).all()
    for other in (make(config, seed=1), make(config, step=1), make(config, split="validation")):
        assert not (other.tokens == base).all(axis=1).any()


@pytest.mark.parametrize("length", [16, 64])
def test_train_and_validation_share_no_sequence(length):
    config = RecallConfig(length=64)
    seen = {
        split: {row.tobytes() for step in range(20) for row in
                make(config, step=step, split=split, batch_size=64, length=length).tokens}
        for split in ("train", "validation")
    }  # fmt: skip
    assert len(seen["train"]) == 20 * 64
    assert not seen["train"] & seen["validation"]


def test_a_shorter_length_keeps_the_vocabulary_and_asks_less():
    config = RecallConfig(length=128, num_queries=8)
    for length, queries in ((128, 8), (16, 4), (8, 2), (4, 1)):
        batch = make(config, length=length)
        assert (batch.weights.sum(axis=1) == queries).all()
    keys = np.unique(make(config, length=8, batch_size=200).tokens[:, 0])
    assert len(keys) > 40  # of 56: not only the few that a sequence of 8 needs


def test_the_floor_is_one_attended_token_a_query():
    for config in CONFIGS.values():
        assert config.floor() == make(config).weights[0].sum()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 3}, "length=3 must be at least 4"),
        ({"length": 2, "marked": False}, "length=2 must be at least 3"),
        ({"length": 3, "marked": False, "style": "mqar"}, "length=3 must be at least 4"),
        ({"length": 16, "num_queries": 5}, "num_queries=5 must be at most 4"),
        ({"num_queries": 0}, "num_queries=0"),
        ({"num_values": 1}, "num_values=1"),
        ({"num_keys": 62}, "num_keys=62 must be 0 or at least 63"),
        ({"num_keys": -1}, "num_keys=-1"),
        ({"style": "pear"}, "style='pear'"),
        ({"keys_per_token": -1}, "keys_per_token=-1 must be at least 0"),
        ({"keys_per_token": 9, "style": "mqar"}, "keys_per_token=9 must be .* 0 for style='mqar'"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        RecallConfig(**fields)


def test_shorter_sequences_draw_from_few_keys_and_the_task_from_all():
    config = RecallConfig(length=128, keys_per_token=4)
    for length, drawn_from in ((4, 16), (8, 32), (64, 63), (128, 63)):
        tokens = make(config, batch_size=400, length=length).tokens
        keys = set(tokens[tokens < config.keys].tolist())
        assert keys == set(range(drawn_from))
    everything = RecallConfig(length=128)
    np.testing.assert_array_equal(make(config).tokens, make(everything).tokens)


def test_lengths_out_of_range_are_named():
    with pytest.raises(ValueError, match="length=3 must be at least 4"):
        make(RecallConfig(length=64), length=3)
    with pytest.raises(ValueError, match="length=128 must hold at most 31 pairs"):
        make(RecallConfig(length=64), length=128)
