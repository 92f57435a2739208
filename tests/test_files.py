"""A file is written whole, or what stood there stays; a bucket out of reach is named."""

import pytest
from etils import epath

from routing_jax.files import reached, write_whole


class UnreachableError(Exception):
    pass


def test_a_bucket_out_of_reach_is_one_sentence_and_no_other_path_is_asked(tmp_path, monkeypatch):
    def fail(path):
        raise UnreachableError("no route to host.\nRequest ID: 7")

    monkeypatch.setattr(type(epath.Path("gs://b/x")), "exists", fail)
    with pytest.raises(ValueError, match=r"^out is 'gs://b/x', which can't be reached: ") as caught:
        reached("gs://b/x", "out")
    assert str(caught.value).endswith("reached: UnreachableError: no route to host.")
    assert reached(tmp_path / "new", "out") == epath.Path(tmp_path / "new")


def test_a_bucket_that_holds_nothing_yet_is_reached(monkeypatch):
    monkeypatch.setattr(type(epath.Path("gs://b/x")), "exists", lambda path: False)
    assert str(reached("gs://b/x", "out")) == "gs://b/x"


def test_a_write_that_fails_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("old")
    write_whole(path, "new")
    assert path.read_text() == "new"
    write_whole(path, "new".encode("utf-16"))
    assert path.read_text("utf-16") == "new"
    write_whole(path, "new")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    with pytest.raises(NotADirectoryError, match=r"config\.json/below'$"):
        write_whole(path / "below", "text")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_file_that_cannot_be_put_in_place_is_named_and_leaves_no_draft(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match=r"taken(\.json)? can't be written: .*directory"):
        write_whole(tmp_path / "taken", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
