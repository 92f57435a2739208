"""Writing a tfds data set: it reads back to the same bytes, and is there whole or not at all."""

import os
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from routing_jax.train.data import corpus
from routing_jax.train.data import prepare as prepare_module
from routing_jax.train.data.corpus import read_pieces
from routing_jax.train.data.prepare import prepare


@pytest.fixture
def texts(tmp_path):
    """A folder of text that is not all UTF-8, so that bytes and not strings must come back."""
    folder = tmp_path / "texts"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        (folder / f"{i:02}").write_bytes(rng.integers(1, 256, 5000, dtype=np.uint8).tobytes())
    (folder / "long").write_bytes(rng.integers(1, 256, 150_000, dtype=np.uint8).tobytes())
    return folder


def test_what_is_written_reads_back_to_the_same_bytes(texts, tmp_path):
    out = tmp_path / "out"
    folder = prepare(str(texts), str(out), "mine", validation_fraction=0.1)
    assert os.fspath(folder) == str(out / "mine" / "1.0.0")
    assert os.listdir(out) == ["mine"]
    direct = read_pieces(str(texts), "", 0.1)
    assert len(direct.train) > 2
    for source in (out, out / "mine", folder):
        assert read_pieces(str(source), "", 0.5) == direct  # its own split, not 0.5
    assert read_pieces("tfds:mine", str(out), 0.5) == direct
    assert read_pieces("tfds:mine:1.0.0:text", str(out), 0.5) == direct


def test_another_process_reads_it_without_tensorflow(texts, tmp_path):
    prepare(str(texts), str(tmp_path / "out"), "mine")
    script = (
        "import sys, tensorflow_datasets as tfds\n"
        f"splits = tfds.data_source('mine', data_dir={str(tmp_path / 'out')!r})\n"
        "print({name: sum(len(e['text']) for e in found) for name, found in splits.items()})\n"
        "assert 'tensorflow' not in sys.modules"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    direct = read_pieces(str(texts), "", 0.02)
    assert shown.strip() == str(
        {split: sum(map(len, found)) for split, found in direct._asdict().items()}
    )


def test_an_existing_data_set_is_left_as_it_is(texts, tmp_path):
    folder = prepare(str(texts), str(tmp_path / "out"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="already holds 'text'"):
        prepare("stdlib", str(tmp_path / "out"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    prepare(str(texts), str(tmp_path / "out"), "other")
    with pytest.raises(ValueError, match="holds several data sets"):
        read_pieces(str(tmp_path / "out"), "", 0.1)


def test_a_failure_half_way_leaves_nothing(texts, tmp_path, monkeypatch):
    real = prepare_module._build

    def fail(*args):
        real(*args)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module, "_build", fail)
    with pytest.raises(OSError, match="No space left"):
        prepare(str(texts), str(tmp_path / "out"))
    assert os.listdir(tmp_path / "out") == []


def test_a_bucket_is_copied_into_and_out_of(texts, tmp_path, monkeypatch):
    for module in (prepare_module, corpus):
        monkeypatch.setattr(module, "is_remote", lambda path: True)
    folder = prepare(str(texts), str(tmp_path / "out"))
    assert os.listdir(tmp_path / "out") == ["text"]
    assert read_pieces(str(folder), "", 0.5) == read_pieces(str(texts), "", 0.02)


def test_a_bucket_copied_into_half_way_is_left_without_a_data_set(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "is_remote", lambda path: True)
    path_type = type(epath.Path(tmp_path))
    seen, real = [], path_type.copy

    def copy(path, target):
        if path.name == "dataset_info.json":
            seen.extend(os.listdir(target.parent))
            raise OSError("connection lost")
        return real(path, target)

    monkeypatch.setattr(path_type, "copy", copy)
    with pytest.raises(OSError, match="connection lost"):
        prepare(str(texts), str(tmp_path / "out"))
    assert len(seen) == 3  # all but the file that makes it a data set
    assert os.listdir(tmp_path / "out") == []


def test_a_damaged_data_set_is_named(texts, tmp_path):
    folder = prepare(str(texts), str(tmp_path / "out"))
    for path in folder.iterdir():
        if "validation" in path.name:
            path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read by tfds") as caught:
        read_pieces(str(tmp_path / "out"), "", 0.1)
    assert "\n" not in str(caught.value)


def test_a_missing_feature_is_named(texts, tmp_path):
    prepare(str(texts), str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"has no feature 'body', only \['text'\]"):
        read_pieces("tfds:text:body", str(tmp_path / "out"), 0.1)


def test_bad_arguments_are_named(texts, tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match="name='My-Text' must be lower-case"):
        prepare(str(texts), out, "My-Text")
    with pytest.raises(ValueError, match="validation_fraction=2"):
        prepare(str(texts), out, validation_fraction=2)
    with pytest.raises(ValueError, match="does not exist"):
        prepare(str(tmp_path / "nowhere"), out)
    (tmp_path / "note").write_bytes(b"short")
    with pytest.raises(ValueError, match="nothing to hold out: give more than 5 bytes"):
        prepare(str(tmp_path / "note"), out)
    with pytest.raises(ValueError, match="note' cannot be written to"):
        prepare(str(texts), str(tmp_path / "note"))
    assert not os.path.exists(out)
