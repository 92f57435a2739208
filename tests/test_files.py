"""A file is written whole, or what stood there stays."""

import pytest

from routing_jax.files import write_whole


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
