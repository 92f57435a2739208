"""Reading sources: which bytes come in, on which side they land, and what is refused."""

import gzip
import os
import sys

import numpy as np
import pytest
from etils import epath

from routing_jax.train.data.corpus import (
    PIECE_BYTES,
    cut,
    load_corpus,
    read_pieces,
    split_pieces,
)


def everything(pieces):
    return sorted(pieces.train + pieces.validation)


def test_identical_pieces_never_straddle_the_split():
    rng = np.random.default_rng(0)
    distinct = [rng.bytes(100) for _ in range(50)]
    pieces = [distinct[i] for i in rng.integers(0, 50, 400)]
    for fraction in (0.01, 0.2, 0.5, 0.99):
        split = split_pieces(pieces, fraction)
        assert not set(split.train) & set(split.validation)
        assert everything(split) == sorted(pieces)
        assert split.train
        held = sum(map(len, split.validation))
        assert fraction * 40_000 <= held <= fraction * 40_000 + 2_500 or fraction == 0.99
    assert split_pieces(pieces, 1.0) == ([], pieces)


def test_the_split_does_not_depend_on_order_or_file_names(tmp_path):
    texts = [bytes([65 + i]) * 1000 for i in range(20)]
    for folder, order in (("a", texts), ("b", texts[::-1])):
        (tmp_path / folder).mkdir()
        for i, text in enumerate(order):
            (tmp_path / folder / f"{i:02}").write_bytes(text)
    first, second = (read_pieces(str(tmp_path / f), "", 0.25) for f in "ab")
    assert sorted(first.validation) == sorted(second.validation)
    assert len(first.validation) == 5
    assert first.train == [text for text in texts if text in first.train]  # in the files' order


def test_documents_are_cut_at_64_kib():
    document = os.urandom(2 * PIECE_BYTES + 1)
    pieces = list(cut([document, b"", b"end"]))
    assert [len(piece) for piece in pieces] == [PIECE_BYTES, PIECE_BYTES, 1, 3]
    assert b"".join(pieces) == document + b"end"


def test_a_folder_gives_its_text_files_unzipped_and_leaves_out_the_rest(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "a.txt").write_bytes(b"plain")
    (tmp_path / "deep" / "b.txt.gz").write_bytes(gzip.compress(b"zipped"))
    (tmp_path / "deep" / "er" / "c").write_bytes("naïve".encode())
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "picture").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".secret").write_bytes(b"secret")
    (tmp_path / ".hidden" / "d").write_bytes(b"hidden")
    found = everything(read_pieces(str(tmp_path), "", 0.1))
    assert found == ["naïve".encode(), b"plain", b"zipped"]


def test_a_single_file_is_a_corpus(tmp_path):
    text = os.urandom(3 * PIECE_BYTES).replace(b"\0", b"x")
    (tmp_path / "book.gz").write_bytes(gzip.compress(text, 1))
    corpus = load_corpus(str(tmp_path / "book.gz"), "", 0.02)
    assert (corpus.train.size, corpus.validation.size) == (2 * PIECE_BYTES + 1, PIECE_BYTES)
    assert corpus.train[PIECE_BYTES] == 0  # the separator between pieces
    assert corpus.train.dtype == np.uint8
    assert not corpus.train.flags.writeable


def test_stdlib_is_python_source_without_tests():
    corpus = load_corpus("stdlib", "", 0.02)
    assert corpus.train.size > 5_000_000
    assert 0.02 <= corpus.validation.size / corpus.train.size < 0.03
    text = corpus.train.tobytes() + corpus.validation.tobytes()
    assert b"class JSONDecoder" in text
    assert b"import pytest" not in text
    assert load_corpus("stdlib", "", 0.02) is corpus  # read once a process


def refused(source, message, data_dir=""):
    with pytest.raises(ValueError, match=message) as caught:
        read_pieces(str(source), data_dir, 0.1)
    assert "\n" not in str(caught.value)
    assert str(source) in str(caught.value)


def test_sources_that_cannot_be_read_are_named(tmp_path):
    refused(tmp_path / "nowhere", "does not exist: give 'stdlib'")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no text")
    (tmp_path / "zero").write_bytes(b"\0\0")
    refused(tmp_path / "zero", "holds no text")
    whole = gzip.compress(os.urandom(1000))
    for name, content in (
        ("cut.gz", whole[:500]),
        ("not.gz", b"plain"),
        ("bad.gz", whole[:10] + b"\xff" * 50),
    ):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "cannot be read")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "dangling").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="dangling' cannot be read: No such file"):
        read_pieces(str(tmp_path / "links"), "", 0.1)


def test_a_bucket_out_of_reach_is_named(monkeypatch):
    class UnreachableError(Exception):
        """As raised by a bucket's client: of its own type, on several lines."""

    def fail(path):
        raise UnreachableError("no route to host\nretried 6 times")

    monkeypatch.setattr(type(epath.Path("gs://b/x")), "is_dir", fail)
    refused("gs://b/x", "cannot be read: UnreachableError: no route to host")


def test_tfds_names_are_checked(tmp_path):
    refused("tfds:", "must be 'tfds:NAME'")
    refused("tfds:a:b:c", "must be 'tfds:NAME'")
    refused("tfds:no_such_set", "names no data set of tfds's catalogue", str(tmp_path))


@pytest.mark.parametrize("missing", ["tensorflow_datasets", "array_record"])
def test_missing_packages_are_named_with_their_extra(monkeypatch, missing):
    for module in [m for m in sys.modules if m.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install 'routing_jax\[datasets\]'"):
        read_pieces("tfds:text", "", 0.1)
