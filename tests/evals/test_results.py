import dataclasses
import errno
import json
import math

import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from routing_jax.evals.results import (
    HISTORY_KEYS,
    MAX_HISTORY,
    Result,
    load_results,
    read_result,
    result_path,
    summary,
    thin_history,
    write_result,
)


def test_a_written_result_reads_back_equal(make_result, tmp_path):
    for i, changes in enumerate([{}, {"heatmap": None, "heatmap_tokens": None}, {"history": []}]):
        result = make_result(**changes)
        path = tmp_path / "new" / f"{i}.json"
        write_result(result, path)
        assert read_result(path) == result
        # Plain JSON with exactly the documented fields, readable without this package.
        assert json.loads(path.read_text()) == dataclasses.asdict(result)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(make_result, tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_result(make_result(), path)

    def disk_full(self, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(epath.Path(path)), "replace", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_result(make_result(accuracy=0.5), path)
    assert read_result(path).accuracy == 0.9998
    assert list(tmp_path.iterdir()) == [path]


def test_a_result_that_cannot_be_put_in_place_is_named(make_result, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match=r"taken(\.json)? can't be written: .*directory"):
        write_result(make_result(), tmp_path / "taken")


def test_what_json_cannot_hold_is_refused_before_anything_is_written(make_result, tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_result(make_result(config={"rate": math.nan}), tmp_path / "result.json")
    assert list(tmp_path.iterdir()) == []


BAD = [
    ("accuracy", 1.2, "from 0 to 1"),
    ("accuracy", "0.9", "from 0 to 1"),
    ("accuracy", True, "from 0 to 1"),
    ("accuracy", None, "from 0 to 1"),
    ("accuracy_first_place", -0.1, "or null"),
    ("cost", -1.0, "at least 0"),
    ("seed", 0.5, "whole number"),
    ("task", "recall_128", "letters"),
    ("variant", "../routed", "letters"),
    ("device", "", "a name"),
    ("versions", {"jax": 11}, "versions"),
    ("usage_per_layer", [0.1, 2], "numbers from 0 to 1"),
    ("history", [{"step": 0}], "lambda"),
    ("heatmap", [[0, 1], [1]], "0 or 1"),
    ("heatmap", [[0, 2], [1, 1]], "0 or 1"),
    ("heatmap", [[0, 1, 0]], "usage_per_layer"),
    ("heatmap_tokens", ["a"], "3 positions"),
]


@pytest.mark.parametrize(("field", "value", "accepted"), BAD)
def test_a_bad_field_is_named_with_its_file(make_result, tmp_path, field, value, accepted):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(dataclasses.asdict(make_result()) | {field: value}))
    with pytest.raises(ValueError, match=accepted) as error:
        read_result(path)
    message = str(error.value)
    assert str(path) in message
    assert field in message
    assert message.endswith(".")
    assert "\n" not in message


NEEDED = [field.name for field in dataclasses.fields(Result) if field.name != "details"]


@pytest.mark.parametrize("field", NEEDED)
def test_a_missing_field_is_named(make_result, tmp_path, field):
    values = dataclasses.asdict(make_result())
    del values[field]
    path = tmp_path / "result.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"{field} must not be missing") as error:
        read_result(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"accuracy": NaN}', "\0"])
def test_a_file_that_holds_no_result_is_refused(tmp_path, text):
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a result") as error:
        read_result(path)
    assert str(path) in str(error.value)


def test_an_unknown_field_is_refused(make_result, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(dataclasses.asdict(make_result()) | {"acuracy": 1.0}))
    with pytest.raises(ValueError, match="acuracy"):
        read_result(path)


def test_load_reads_one_experiment_and_skips_unfinished_writes(make_result, tmp_path):
    results = [make_result(seed=seed, variant=v) for v in ("full", "routed") for seed in (0, 1)]
    for result in [*results, make_result(experiment="other")]:
        write_result(
            result,
            result_path(tmp_path, result.experiment, result.task, result.variant, result.seed),
        )
    (tmp_path / "routed-attention" / ".x.json.123").write_text("{")
    assert load_results(tmp_path, "routed-attention") == results
    assert load_results(str(tmp_path), "other") == [make_result(experiment="other")]
    assert load_results(tmp_path, "none") == []


def test_load_refuses_a_result_under_another_name(make_result, tmp_path):
    write_result(
        make_result(seed=1), result_path(tmp_path, "routed-attention", "recall-128", "routed", 0)
    )
    with pytest.raises(ValueError, match=r"recall-128_routed_s1\.json"):
        load_results(tmp_path, "routed-attention")


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_summary_equals_numpy(values):
    runs = [_Run(value) for value in values]
    figures = summary(runs, "accuracy")
    assert figures.seeds == len(values)
    assert figures.mean == pytest.approx(np.mean(values))
    assert figures.std == pytest.approx(np.std(values, ddof=1), abs=1e-9)
    assert (figures.lowest, figures.highest) == (np.min(values), np.max(values))


@dataclasses.dataclass
class _Run:
    accuracy: float | None


def test_summary_leaves_nulls_out():
    assert summary([_Run(None), _Run(None)], "accuracy") is None
    assert summary([], "accuracy") is None
    one = summary([_Run(0.5), _Run(None)], "accuracy")
    assert (one.seeds, one.mean, one.lowest) == (1, 0.5, 0.5)
    assert math.isnan(one.std)


@given(st.integers(0, 1000))
def test_thin_history_keeps_order_ends_and_short_histories(count):
    rows = [dict.fromkeys(HISTORY_KEYS, 0.0) | {"step": i, "rate": 1.0} for i in range(count)]
    thin = thin_history(rows)
    steps = [row["step"] for row in thin]
    assert len(thin) == min(count, MAX_HISTORY)
    assert steps == sorted(set(steps))
    assert steps[:1] + steps[-1:] == [row["step"] for row in rows[:1] + rows[-1:]]
    assert max(np.diff(steps), default=1) <= math.ceil(count / MAX_HISTORY) + 1
    assert all(tuple(row) == HISTORY_KEYS for row in thin)
