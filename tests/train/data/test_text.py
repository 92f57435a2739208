"""Windows of text: what they cover, in which order, and that they stay inside their split."""

import numpy as np
import pytest

from routing_jax.train.data.corpus import load_corpus
from routing_jax.train.data.text import TextConfig, text_batch, window_count

LENGTH = 16


@pytest.fixture
def config(tmp_path):
    """A corpus of random letters: no two windows of it are alike."""
    rng = np.random.default_rng(0)
    for name in range(40):
        text = rng.integers(97, 123, 50 + 10 * name, dtype=np.uint8).tobytes()
        (tmp_path / f"{name:02}.txt").write_bytes(text)
    return TextConfig(length=LENGTH, source=str(tmp_path), validation_fraction=0.2)


def splits(config):
    return load_corpus(config.source, config.data_dir, config.validation_fraction)


def starts(config, split, batch):
    """Where in its split each window stands, found by searching."""
    text = getattr(splits(config), split).tobytes()
    windows = np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1)
    return [text.index(window.astype(np.uint8).tobytes()) for window in windows]


def make(config, step, split="train", seed=0, batch_size=5, **kwargs):
    return text_batch(config, split=split, seed=seed, step=step, batch_size=batch_size, **kwargs)


def test_targets_are_the_next_bytes(config):
    batch = make(config, 3)
    assert [a.dtype for a in batch] == [np.int32, np.int32, np.float32]
    assert batch.tokens.shape == batch.targets.shape == batch.weights.shape == (5, LENGTH)
    text = splits(config).train
    for start, tokens, targets in zip(starts(config, "train", batch), batch.tokens, batch.targets):
        assert (tokens == text[start : start + LENGTH]).all()
        assert (targets == text[start + 1 : start + LENGTH + 1]).all()
    assert (batch.weights == 1).all()


def test_an_epoch_covers_the_text_in_disjoint_windows_and_the_next_starts_elsewhere(config):
    count, size = window_count(config, split="train"), splits(config).train.size
    steps = range(2 * count // 5 + 1)
    found = [at for step in steps for at in starts(config, "train", make(config, step))]
    epochs = [found[:count], found[count : 2 * count]]
    for epoch in epochs:
        ordered = np.sort(epoch)
        assert (np.diff(ordered) == LENGTH).all()
        assert ordered[0] < LENGTH
        assert size - (ordered[-1] + LENGTH) <= 2 * LENGTH
        assert epoch != sorted(epoch)
    assert min(epochs[0]) != min(epochs[1])
    assert np.argsort(epochs[0]).tolist() != np.argsort(epochs[1]).tolist()


def test_a_validation_pass_reads_each_window_once_whatever_the_batch_size(config):
    count = window_count(config, split="validation")
    text = splits(config).validation
    assert count == (text.size - 1) // LENGTH
    for batch_size in (1, 5, 7, count + 3):
        steps = -(-count // batch_size)
        found = []
        for step in range(steps):
            batch = make(config, step, "validation", batch_size=batch_size)
            live = batch.weights.all(axis=1)
            assert (live == batch.weights.any(axis=1)).all()
            at = np.array(starts(config, "validation", batch))
            found += at[live].tolist()
        assert sorted(found) == list(range(0, count * LENGTH, LENGTH))
        again = make(config, steps, "validation", batch_size=batch_size, seed=9)
        first = make(config, 0, "validation", batch_size=batch_size)
        assert all((a == b).all() for a, b in zip(again, first))


def test_validation_order_is_scattered(config):
    at = starts(config, "validation", make(config, 0, "validation", batch_size=8))
    assert at != sorted(at)


def test_batches_depend_on_seed_and_step_alone(config):
    base = make(config, 2).tokens
    assert (make(config, 2).tokens == base).all()
    assert not (make(config, 2, seed=1).tokens == base).all()
    assert not (make(config, 3).tokens == base).all()


def test_no_window_of_one_split_stands_in_the_other(config):
    train = splits(config).train.tobytes()
    for step in range(10):
        for tokens in make(config, step, "validation").tokens:
            assert tokens.astype(np.uint8).tobytes() not in train


def test_the_shortest_corpus_that_will_do_and_one_byte_less(config):
    size = splits(config).validation.size
    assert make(config, 0, "validation", length=size - 1).tokens.shape == (5, size - 1)
    with pytest.raises(ValueError, match=f"{size} bytes in its validation split, too few"):
        make(config, 0, "validation", length=size)
    size = splits(config).train.size
    assert make(config, 0, length=size - 1).tokens.shape == (5, size - 1)
    with pytest.raises(ValueError, match=f"{size} bytes in its train split, too few"):
        make(config, 0, length=size)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 0}, "length=0"),
        ({"source": ""}, "source=''"),
        ({"data_dir": "somewhere"}, "data_dir='somewhere' must be empty"),
        ({"validation_fraction": 0.0}, "validation_fraction=0.0"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        TextConfig(**fields)
