import dataclasses
import json

import pytest

from routing_jax.cli import main as command
from routing_jax.evals.benchmarks import tpu_schedule
from routing_jax.evals.benchmarks.tpu_compiler import compiler_refusal
from routing_jax.evals.benchmarks.tpu_programs import TpuCase
from routing_jax.evals.benchmarks.tpu_schedule import (
    TpuScheduleConfig,
    column_counts,
    row_counts,
)
from routing_jax.evals.benchmarks.tpu_schedule_plot import plot
from routing_jax.evals.benchmarks.tpu_schedule_report import caption, table

CONFIG = TpuScheduleConfig(
    parts=("schedule", "memory"),
    chips=("v5e", "v6e"),
    length=1024,
    sparse_length=2048,
    blocks=(0, 4, 2, 64),
    head_dims=(64,),
    num_heads=4,
    num_kv_heads=2,
    tiles=((256, 256, 128), (512, 512, 256)),
    memory_lengths=(256,),
    memory_head_dims=(64,),
)
needs_compiler = pytest.mark.skipif(compiler_refusal() is not None, reason=str(compiler_refusal()))


def pretended(cases, *, schedules=False):
    """Reports as the compiler gives them; the larger of splash's tiles does not fit."""
    for case in cases:
        if case.tiles == (512, 512, 256):
            yield {"error": "JaxRuntimeError: out of vmem"}
            continue
        memory = {"argument_bytes": 1, "result_bytes": 2, "temporary_bytes": 3, "peak_bytes": 6}
        report = {"seconds": 1.0, "kernels": 1, "gathers": 0} | memory
        if schedules:
            parts = {"program": 100, "turn_8": 1100, "turn_4": 900, "turn_2": 700, "turn_1": 500}
            if case.program == "splash":
                parts = {"program": 10, "run": 1000, "first": 20, "last": 30}
            names = {
                "backward": ("block_sparse_query_gradients", "block_sparse_key_gradients"),
                "forward": ("block_sparse_forward",),
            }
            names = names.get(case.program, ("splash_mqa_fwd",))
            kernel = {"bundles": parts, "slots": {"MXU": 0.5}}
            if names[-1] == "block_sparse_key_gradients":
                columns = kernel | {"bundles": {k: v for k, v in parts.items() if k != "turn_8"}}
                report["schedule"] = dict(zip(names, (kernel, columns)))
            else:
                report["schedule"] = dict.fromkeys(names, kernel)
        yield report


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "made"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu_schedule, "compiler_refusal", lambda: None)
        patch.setattr(tpu_schedule, "compile_cases", pretended)
        return tpu_schedule.main(CONFIG, folder / "tpu.json"), folder


def test_rows_are_complete(result):
    result, folder = result
    assert json.loads((folder / "tpu.json").read_text()) == json.loads(json.dumps(result))
    assert sorted(path.name for path in folder.iterdir()) == ["tpu.json", "tpu.png"]
    ours = [r for r in result["rows"] if r["part"] == "schedule" and r["peer"] == "block_sparse"]
    assert [(r["length"], r["blocks"]) for r in ours[:4]] == [
        (1024, 0),
        (2048, 0),
        (2048, 4),
        (2048, 2),
    ]
    memory = [row for row in result["rows"] if row["part"] == "memory"]
    assert [(r["program"], r["blocks"]) for r in memory[:6]] == [
        ("forward", 0), ("forward", 64), ("backward", 0), ("backward", 64),
        ("decode", 0), ("decode", 64),
    ]  # fmt: skip


def test_bundles_are_those_of_each_part_as_often_as_it_runs(result):
    row = result[0]["rows"][0]
    # Two kv heads, eight tiles that see 1 to 8 blocks: each bit of 1 to 7 is set four times.
    assert row["counts"] == {"program": 16, "turn_8": 2, "turn_4": 8, "turn_2": 8, "turn_1": 8}
    assert row["bundles"] == 16 * 100 + 2 * 1100 + 8 * (900 + 700 + 500)
    splash = result[0]["rows"][1]
    # Four heads, four rows of four blocks of 256, ten of them visible.
    assert splash["counts"] == {"program": 64, "run": 40, "first": 16, "last": 16}
    assert splash["bundles"] == 64 * 10 + 40 * 1000 + 16 * 50
    assert row["of_splash"] == row["bundles"] / splash["bundles"]


def test_both_kernels_of_the_backward_pass_are_counted(result):
    rows = [row for row in result[0]["rows"] if row["program"] == "key_gradients"]
    assert [(row["length"], row["blocks"]) for row in rows[:4]] == [
        (1024, 0), (2048, 0), (2048, 4), (2048, 2),
    ]  # fmt: skip
    # Eight blocks that 8 to 1 tiles see, in two heads.
    assert rows[0]["counts"] == {"program": 16, "turn_4": 12, "turn_2": 8, "turn_1": 8}
    assert rows[0]["bundles"] == 16 * 100 + 12 * 900 + 8 * 700 + 8 * 500
    assert "| v5e | dk, dv | 64 | 1.000 |" in table(result[0]["rows"])
    assert all(row.get("of_splash") is None for row in rows)


def test_the_report_says_ratios_failures_and_what_it_is_blind_to(result):
    rows = result[0]["rows"]
    said = table(rows)
    assert "256×256×128" in said
    assert f"{rows[0]['of_splash']:.2f}" in said
    assert "12 of 12 programs compiled" in said
    assert "not measured" in said
    assert "Compiled, not run" in caption(result[0])
    assert "decoding: one query" in caption(result[0])
    failed = [row for row in rows if "error" in row]
    assert len(failed) == 2
    assert all(row["bundles"] is None for row in failed)


def test_without_lists_nothing_is_drawn(result, tmp_path):
    dense = [row for row in result[0]["rows"] if not row.get("blocks")]
    assert plot(dense, tmp_path / "x.png") is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("blocks", [0, 1, 3, 10])
def test_counts_are_those_of_a_list_written_out(blocks):
    case = TpuCase("v5e:2x2", "forward", 2048, 64, num_heads=6, num_kv_heads=3)
    listed = [min(m + 1, blocks or 16) for m in range(16)]
    counts = {"program": 16, "turn_8": sum(n // 8 for n in listed)}
    counts |= {f"turn_{size}": sum(n // size % 2 for n in listed) for size in (4, 2, 1)}
    assert row_counts(case, blocks, 0) == {name: 3 * count for name, count in counts.items()}
    columns = column_counts(case, blocks, 0)
    assert columns["program"] == 3 * 16
    assert sum(columns[f"turn_{size}"] * size for size in (4, 2, 1)) == 3 * sum(listed)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("parts", ("speed",)),
        ("passes", ()),
        ("chips", ("v4",)),
        ("tiles", ((384, 512, 256),)),
        ("tiles", ((512, 512, 384),)),
        ("length", 1000),
        ("num_kv_heads", 3),
        ("blocks", (-1,)),
        ("head_dims", ()),
        ("memory_heads", 0),
        ("memory_programs", ("splash",)),
    ],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=f"^{field} "):
        dataclasses.replace(CONFIG, **{field: value})


def test_without_the_compiler_the_command_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tpu_schedule, "compiler_refusal", lambda: "it needs libtpu")
    assert command(["bench", "tpu-schedule", "--out", str(tmp_path / "x.json")]) == 2
    assert "it needs libtpu" in capsys.readouterr().err


@pytest.mark.tpu
@needs_compiler
def test_work_follows_the_listed_blocks_in_the_compilers_own_schedule(tmp_path):
    config = dataclasses.replace(
        CONFIG,
        parts=("schedule",),
        passes=("forward",),
        chips=("v5e",),
        sparse_length=32768,
        blocks=(0, 128, 64),
        head_dims=(128,),
        num_heads=2,
        num_kv_heads=1,
        tiles=((512, 512, 512),),
    )
    rows = tpu_schedule.main(config, tmp_path / "tpu.json")["rows"]
    assert [row.get("error") for row in rows] == [None] * 5
    assert all(row["parts"]["program"] > 0 and 0 < row["slots"]["MXU"] < 1 for row in rows)
    assert all(
        row["parts"]["turn_8"] < 8 * row["parts"]["turn_1"] for row in rows if "blocks" in row
    )
    assert rows[-1]["density"] < 0.5
    assert all(row["per_block"] < 1.1 for row in rows[2:])
