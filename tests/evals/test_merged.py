"""Several runs of a benchmark, read as one: nothing is compared across runs."""

import json

import pytest

from routing_jax.evals.merged import merged
from routing_jax.evals.provenance import dated_versions
from routing_jax.evals.report import _COMPARED, readme_blocks


def run(day, *rows, device="box", repeats=3, flags=""):
    """A result whose rows are (part, length, who, milliseconds)."""
    fields = ("part", "length", "who", "milliseconds")
    return {
        "device": device,
        "date": f"2026-01-0{day}T00:00:00+00:00",
        "xla_flags": flags,
        "versions": {"jax": "0"},
        "config": {"repeats": repeats, "window": 8},
        "rows": [dict(zip(fields, row)) for row in rows],
    }


def by_length(row):
    return row["part"], row["length"]


def times(result):
    return [(row["part"], row["length"], row["who"], row["milliseconds"]) for row in result["rows"]]


def test_a_group_is_the_latest_run_that_timed_all_of_it():
    first = run(1, ("prefill", 8, "dense", 4.0), ("prefill", 8, "routed", 2.0), repeats=9)
    second = run(2, ("prefill", 8, "dense", None), ("prefill", 8, "routed", 1.0))
    third = run(3, ("decode", 8, "dense", 7.0), flags="--quick")
    fourth = run(4, ("decode", 8, "dense", 6.0), ("decode", 9, "dense", None), flags="--quick")
    result = merged([third, first, fourth, second], by_length)
    assert times(result) == [
        ("prefill", 8, "dense", 4.0),  # not beside the second run's 1.0
        ("prefill", 8, "routed", 2.0),
        ("decode", 8, "dense", 6.0),
        ("decode", 9, "dense", None),  # which nobody has timed
    ]
    assert result["config"] == {"repeats": 9, "window": 8}
    said = "2026-01-01: prefill (8); 2026-01-04: decode (8, 9), XLA_FLAGS --quick. Versions: jax 0."
    assert dated_versions(result) == said
    alone = merged([first], by_length)
    assert times(alone) == times(first)
    assert dated_versions(alone) == "2026-01-01. Versions: jax 0."


def test_runs_that_differ_in_what_a_caption_says_are_refused():
    one, other = run(1, ("step", 8, "mha", 2.0)), run(2, ("decode", 8, "mha", 2.0))
    assert len(merged([one, other], by_length)["rows"]) == 2
    for changed in ({"versions": {"jax": "1"}}, {"config": other["config"] | {"window": 9}}):
        with pytest.raises(
            ValueError, match=r"runs of 2026-01-01 and 2026-01-02 differ in (ver|win)"
        ):
            merged([one, other | changed], by_length)
    replaced = run(2, ("step", 8, "mha", 2.0)) | {"versions": {"jax": "1"}}
    assert merged([one, replaced], by_length)["versions"] == {"jax": "1"}  # nothing else is left


def test_batches_and_passes_are_compared_apart(tmp_path):
    size = {"milliseconds": 2.0, "length": 8}
    decode = size | {"part": "decode", "who": "dense", "sparse_share": 0.0, "blocks": None,
                     "device_bytes": None, "kv_bytes": None, "least": None}  # fmt: skip
    row = size | {"part": "layer", "router": "learned", "budget": "12 %", "router_cost": 0.01,
                  "dense_milliseconds": 4.0, "speedup": 2.0}  # fmt: skip
    rows = {
        "serve-path": [decode | {"batch": 1}, decode | {"batch": 3}],
        "block-routing-speed": [row | {"pass": "forward"}, row | {"pass": "training"}],
    }
    for name, parts in rows.items():
        benches = [run(day) | {"rows": [one]} for day, one in enumerate(parts, 1)]
        for bench in benches:
            bench["config"] = {"repeats": 1, "model": "tiny"}
        result = merged(benches, _COMPARED[name])
        assert result["rows"] == parts
        said = dated_versions(result)
        assert (
            "2026-01-01: decode (8); 2026-01-02: decode (8 × 3)." in said or "layer forward" in said
        )


def test_a_run_of_which_nothing_is_left_says_nothing():
    timed, failed = run(1, ("step", 8, "mha", 2.0)), run(2, ("step", 8, "mha", None), repeats=9)
    result = merged([timed, failed | {"versions": {"jax": "1"}}], by_length)
    assert (result["date"], result["config"]["repeats"]) == (timed["date"], 3)
    assert result["versions"] == {"jax": "0"}
    assert merged([run(1)], by_length)["rows"] == []


def test_runs_of_several_devices_are_refused():
    with pytest.raises(ValueError, match=r"of 2 devices \(box, other\); give one"):
        merged([run(1), run(1, device="other")], by_length)
    with pytest.raises(ValueError, match="of 0 devices"):
        merged([], by_length)


def test_files_of_a_device_are_one_block(tmp_path):
    folder = tmp_path / "moas-times"
    folder.mkdir()
    parts = {"box": ("step", None), "box-long": ("decode-long", 2**20), "other": ("step", None)}
    for name, (part, size) in parts.items():
        row = {"part": part, "variant": "mha", "milliseconds": 2.0, "kv_cost": 1.0}
        bench = run(1, device=name[:3]) | {"rows": [row | {"kv_bytes": size}], "long": 64}
        (folder / f"{name}.json").write_text(json.dumps(bench))
    blocks = readme_blocks(tmp_path)
    assert sorted(blocks) == ["moas-times-box", "moas-times-other"]
    assert "| mha     | 2.00 (1.00×) |   2.00 (1.00×) |     1.00 |" in blocks["moas-times-box"]
