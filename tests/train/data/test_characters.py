"""Characters of text: order, split, vocabulary, and what is refused."""

import gzip

import numpy as np
import pytest

from routing_jax.train.data import CharacterConfig, batches, vocabulary, window_count
from routing_jax.train.data.characters import load_characters


@pytest.fixture
def files(tmp_path):
    """Two files, the second before the first in the alphabet, one of them packed."""
    (tmp_path / "b.txt").write_text("böse " * 20)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(("an aside, " * 10).encode()))
    return str(tmp_path / "b.txt"), str(tmp_path / "a.txt.gz")


def test_files_are_joined_as_given_and_the_last_tenth_is_held_out(files):
    config = CharacterConfig(length=4, source=files, vocab_size=20)
    letters = np.array(list(vocabulary(config)))
    train, validation = ("".join(letters[part]) for part in load_characters(config))
    assert train + validation == "böse " * 20 + "an aside, " * 10
    assert len(train) == 180
    assert list(letters) == sorted(set("böse an aside, "))


def test_another_text_is_read_in_the_vocabulary_given(files):
    config = CharacterConfig(4, (files[1],), vocab_size=20, vocabulary_source=(files[0],))
    letters = np.array(list(vocabulary(config)))
    text = "".join("".join(letters[part]) for part in load_characters(config))
    assert text == "".join(c for c in "an aside, " * 10 if c in "böse ")


def test_one_pass_of_batches_reads_each_held_out_window_once(files):
    config = CharacterConfig(length=4, source=files, vocab_size=20)
    held = load_characters(config).validation
    count = window_count(config, split="validation")
    assert count == (held.size - 1) // 4
    stream = batches(config, split="validation", seed=0, batch_size=count)
    batch = next(stream)
    assert (batch.weights == 1).all()
    found = sorted(map(tuple, batch.tokens.tolist()))
    assert found == sorted(tuple(held[4 * i : 4 * i + 4].tolist()) for i in range(count))


def test_bad_text_is_refused_in_one_sentence(files, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("böse".encode("latin-1"))

    def read(name, **fields):
        config = CharacterConfig(source=(str(tmp_path / name),), **{"vocab_size": 20, **fields})
        return window_count(config, split="validation")

    for name, said, fields in (
        ("empty.txt", r"empty\.txt' holds no text\.$", {}),
        ("latin.txt", r"latin\.txt' is not UTF-8: ", {}),
        ("nowhere.txt", r"nowhere\.txt' does not exist", {}),
        ("b.txt", r"has 10 characters in its validation split, too few for one window of length=16",
         {"length": 16}),
        ("b.txt", r"^vocab_size=3 must be at least 5, the characters of '.*b\.txt'\.$",
         {"vocab_size": 3}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            read(name, **fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"length": 0}, "length=0 must be at least 1"),
        ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
        ({"source": ()}, r"source=\(\) must name at least one"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0 must lie between"),
    ],
)
def test_a_bad_field_is_named_with_its_value(fields, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        CharacterConfig(**fields)
