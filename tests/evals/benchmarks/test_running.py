"""What every benchmark's run needs."""

import json

import pytest

from routing_jax.evals.benchmarks.running import write_json


def test_a_result_reads_back_equal_and_holds_no_nan(tmp_path):
    out = tmp_path / "rows.json"
    write_json({"rows": [1.5]}, out)
    with pytest.raises(ValueError, match="JSON"):
        write_json({"rows": [float("nan")]}, out)
    assert json.loads(out.read_text()) == {"rows": [1.5]}


def test_a_result_that_cannot_be_put_in_place_is_named_and_leaves_no_draft(tmp_path):
    taken = tmp_path / "taken.json"
    taken.mkdir()
    with pytest.raises(OSError, match=r"taken(\.json)? can't be written: .*directory"):
        write_json({"rows": []}, taken)
    assert list(tmp_path.iterdir()) == [taken]
