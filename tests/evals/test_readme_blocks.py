import pytest

from routing_jax.evals.readme import stale_blocks, update_blocks

TEXT = """# Title

<!-- table: recall -->
| old |
<!-- end: recall -->

Between them, `<!-- table: not a block -->` in a line.

<!-- table: speed -->
<!-- end: speed -->
End.
"""


def test_only_the_named_block_changes():
    updated = update_blocks(TEXT, {"recall": "| new |\n| \\1 |"})
    assert updated == TEXT.replace("| old |", "| new |\n| \\1 |")


def test_updating_twice_changes_nothing_more():
    blocks = {"speed": "a much longer text\n\nthan before\n", "recall": "short"}
    once = update_blocks(TEXT, blocks)
    assert once != TEXT
    assert update_blocks(once, blocks) == once
    assert stale_blocks(once, blocks) == []


def test_stale_blocks_are_named():
    assert stale_blocks(TEXT, {"recall": "| old |", "speed": "1 ms"}) == ["speed"]
    assert stale_blocks(TEXT, {"recall": "| new |", "speed": ""}) == ["recall", "speed"]


def test_a_block_that_no_result_gives_is_stale():
    assert "speed" in stale_blocks(TEXT, {"recall": "| old |"})


BAD = [
    ("missing", TEXT, "other", "'other' is missing"),
    ("unclosed", TEXT.replace("<!-- end: speed -->", ""), "speed", "'speed' is not closed"),
    ("closed late", TEXT.replace("<!-- end: recall -->", ""), "recall", "'recall' is not closed"),
    ("crossed", TEXT.replace("end: recall", "end: speed"), "recall", "'recall' is not closed"),
    (
        "unopened",
        TEXT.replace("<!-- table: recall -->", ""),
        "recall",
        "recall -->' closes nothing",
    ),
    ("twice", TEXT + TEXT, "recall", "'recall' stands there twice"),
]


@pytest.mark.parametrize(("text", "name", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_a_bad_block_is_named(text, name, message):
    with pytest.raises(ValueError, match=message):
        update_blocks(text, {name: "new"})


def test_content_may_not_hold_a_marker():
    with pytest.raises(ValueError, match="'recall' must not hold"):
        update_blocks(TEXT, {"recall": "a\n<!-- end: recall -->\nb"})
