"""The attention benchmark times the right work on the right tables, and loses no row."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.cli import main as command
from routing_jax.evals.benchmarks import attention, attention_programs, environment
from routing_jax.evals.benchmarks.attention_cases import (
    cases,
    dense_flops,
    flops,
    listed_blocks,
    make_positions,
    make_table,
    random_pages,
)
from routing_jax.evals.benchmarks.attention_report import break_even, table, with_ratios
from routing_jax.evals.benchmarks.program import count_sets

CONFIG = attention.AttentionBenchConfig(
    peers=("block_sparse", "dense"),
    lengths=(64,),
    blocks=(0, 2),
    head_dims=(16,),
    num_heads=4,
    num_kv_heads=2,
    block=8,
    variant_blocks=(0, 2),
    few_queries=13,
    agreement_length=32,
    decode_batches=(2,),
    decode_length=64,
    decode_pages=(0, 3),
    table_length=64,
    table_blocks=2,
    matmul_size=16,
    copy_bytes=1024,
    dtype="float32",
    repeats=2,
    chain=1,
    target_ms=0.01,
    cache_bytes=0,
)
ONE = dataclasses.replace(CONFIG, parts=("forward",), variants=())
# Fewer variants: each is a compilation of a kernel and its gradient.
RAN = dataclasses.replace(CONFIG, variants=("few_queries", "block_bias"), variant_blocks=(2,))


def test_lists_are_random_distinct_and_hold_the_own_block() -> None:
    case = cases(dataclasses.replace(ONE, lengths=(256,), blocks=(4,)), "forward")[0]
    first, second = (jax.device_get(make_table(case, seed)) for seed in (0, 1))
    assert (first.indices != second.indices).any()
    assert (first.indices[0, 0] != first.indices[0, 1]).any()
    for tile in range(32):
        for head in range(2):
            count = first.counts[0, head, tile]
            row = first.indices[0, head, tile][:count].tolist()
            assert count == len(set(row)) == min(4, tile + 1)
            assert row[-1] == tile


def test_work_is_counted_as_by_hand() -> None:
    """Against a count of every multiply-add of the listed blocks, and of the causal triangle."""
    case = cases(ONE, "forward")[1]
    assert case.blocks == 2
    tiles = 1 + 2 * 7  # the first tile has no earlier block to list
    assert listed_blocks(case, 0) == tiles * CONFIG.num_kv_heads
    per_block = 2 * (8 * 8 * 16) * 2  # two products, a multiplication and an addition each
    assert flops(case, listed_blocks(case, 0)) == per_block * tiles * CONFIG.num_heads
    both = case._replace(part="forward_backward")
    assert flops(both, 1) == 3.5 * flops(case, 1)
    assert dense_flops(case) == 2 * 2 * 16 * CONFIG.num_heads * 64**2 / 2
    assert dense_flops(both) == 3.5 * dense_flops(case)
    dense = listed_blocks(case._replace(blocks=0), 0)
    assert dense == 8 * 9 / 2 * CONFIG.num_kv_heads


def test_few_queries_stand_anywhere_and_ascend() -> None:
    case = next(c for c in cases(CONFIG, "forward") if c.variant == "few_queries")
    positions = make_positions(case, 0)
    assert positions is not None
    assert positions.shape == (1, 13)
    assert (np.diff(positions[0]) > 0).all()
    visible = sum(int(positions[0][i : i + 8].max()) // 8 + 1 for i in (0, 8))
    assert listed_blocks(case, 0) == visible * CONFIG.num_kv_heads


def test_variants_change_what_their_names_say() -> None:
    found = {c.variant: c for c in cases(CONFIG, "forward") if c.blocks or c.variant}
    plain = found[None]._replace(variant="group3")
    assert found["group3"] == plain._replace(num_heads=9, num_kv_heads=3, head_dim=64)
    assert found["blocks64"] == plain._replace(variant="blocks64", block=4)
    assert found["block_bias"] == plain._replace(variant="block_bias")


def test_decoding_lists_distinct_pages() -> None:
    case = cases(CONFIG, "decode")[1]
    counts, blocks = (np.asarray(x) for x in random_pages(case, 0))
    assert counts.tolist() == [[3, 3], [3, 3]]
    assert all(len(set(row)) == 3 and max(row) < 8 for row in blocks.reshape(-1, 3).tolist())


@pytest.mark.parametrize("part", ["decode", "table"])
def test_every_output_is_written(part) -> None:
    for case in cases(CONFIG, part):
        for program in attention_programs.programs(CONFIG, case, 1):
            after = jax.jit(program.step)(program.state(0))
            floats = [x for x in jax.tree.leaves(after) if jnp.issubdtype(x.dtype, jnp.floating)]
            assert all(bool(jnp.isfinite(x).all()) for x in floats), (case, program.peer)


def test_the_fused_backward_is_measured_where_the_library_has_one() -> None:
    config = attention.AttentionBenchConfig(
        peers=("block_sparse", "fused"), lengths=(1024,), blocks=(2,), variant_blocks=(2,)
    )
    measured = {
        (case.part, case.variant, case.head_dim)
        for part in ("forward", "forward_backward")
        for case in cases(config, part)
        for program in attention_programs.programs(config, case, 1)
        if program.peer == "fused"
    }
    of = {(None, 128), (None, 64), ("few_queries", 128), ("group3", 64)}
    assert measured == {("forward_backward", *one) for one in of}


def test_a_table_that_lists_every_page_decodes_as_dense_attention_does() -> None:
    case = cases(CONFIG, "decode")[0]
    sparse, dense = attention_programs.programs(CONFIG, case, 1)
    assert (sparse.peer, dense.peer) == ("block_sparse", "dense")
    y = [jax.jit(p.step)(p.state(5))["y"] for p in (sparse, dense)]
    np.testing.assert_allclose(*y, atol=1e-5)


@pytest.fixture(scope="module")
def ran(compile_cache: None, tmp_path_factory) -> tuple[dict[str, Any], Any]:
    out = tmp_path_factory.mktemp("bench") / "made" / "attention.json"
    return attention.main(RAN, out), out


def test_rows_are_complete(ran) -> None:
    result, out = ran
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert sorted(path.name for path in out.parent.iterdir()) == ["attention.json", "attention.png"]
    assert set(result) >= {"device", "versions", "driver", "ptxas", "date", "config", "seconds"}
    rows = result["rows"]
    assert [row for row in rows if "error" in row] == []
    timed = [row for row in rows if row["part"] != "agreement"]
    assert list(dict.fromkeys(row["part"] for row in rows)) == list(RAN.parts)
    for row in timed:
        assert row["milliseconds"] > 0
        assert row["spread"] >= 0
        assert (row["unit"] is None) == (row["part"] == "table")
        assert row["rate"] is None or row["rate"] > 0
    sparse = [row for row in timed if row["part"] == "forward" and row["peer"] == "block_sparse"]
    assert [(row["variant"], row["blocks"]) for row in sparse] == [
        (None, 0),
        (None, 2),
        ("few_queries", 0),
        ("block_bias", 2),
    ]
    assert all("dense" in row["ratio"] for row in sparse)
    assert [row["variant"] for row in sparse if "unbiased" in row["ratio"]] == ["block_bias"]
    assert all(
        "forward" in row["ratio"]
        for row in timed
        if row["part"] == "table" and row["peer"] != "forward"
    )


def test_peers_agree_with_float32(ran) -> None:
    rows = [row for row in ran[0]["rows"] if row["part"] == "agreement"]
    assert {row["peer"] for row in rows} == {"block_sparse", "dense"}
    assert {row["variant"] for row in rows} == {None, *RAN.variants}
    for row in rows:
        names = ["y", "dq", "dk", "dv"] + ["dbias"] * (row["variant"] == "block_bias")
        assert list(row["difference"]) == names
        assert max(row["difference"].values()) < 1e-5


def test_a_failure_costs_only_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise MemoryError("too\nbig")

    monkeypatch.setattr(attention_programs, "block_sparse_attention", refuse)
    rows = attention.run(dataclasses.replace(ONE, blocks=(0,)))["rows"]
    assert [row.get("error") for row in rows] == ["MemoryError: too big", None]
    assert (rows[0]["milliseconds"], rows[0]["rate"]) == (None, None)
    assert rows[1]["milliseconds"] > 0
    assert "failed" in table(rows)
    assert json.dumps(rows, allow_nan=False)


def test_what_is_not_begun_in_time_is_skipped() -> None:
    rows = attention.run(dataclasses.replace(CONFIG, seconds=1e-9))["rows"]
    assert {row["part"] for row in rows} == set(CONFIG.parts)
    assert all("skipped" in row["error"] for row in rows)
    assert "skipped" in table(rows)


def test_sets_outgrow_the_cache_by_what_a_call_reads() -> None:
    case = cases(CONFIG, "decode")[1]
    listed = listed_blocks(case, 0)
    assert listed == 2 * 2 * 3
    (reading,) = attention_programs.programs(CONFIG, case, listed)
    size = 2 * listed * 8 * 16 * 4
    for cache, sets in ((size - 1, 1), (size, 2), (3 * size, 4)):
        config = dataclasses.replace(CONFIG, cache_bytes=cache)
        assert count_sets(config, reading) == sets


def rows_of(*measured: tuple[str, int, float, float]) -> list[dict[str, Any]]:
    sizes = {"part": "forward", "variant": None, "block": 8, "length": 64, "unit": "TFLOP/s"}
    names = ("peer", "blocks", "density", "milliseconds")
    return [sizes | dict(zip(names, values)) | {"rate": 1.0} for values in measured]


def test_ratios_say_how_much_faster_a_row_is() -> None:
    rows = with_ratios(
        rows_of(
            ("dense", 0, 1.0, 8.0),
            ("block_sparse", 2, 0.25, 2.0),
            ("flex", 2, 0.25, 3.0),
            ("block_sparse", 4, 0.5, 4.0),
        )
    )
    assert [row["ratio"] for row in rows] == [
        {},
        {"dense": 4.0, "flex": 1.5},
        {"dense": pytest.approx(8 / 3), "block_sparse": pytest.approx(2 / 3)},
        {"dense": 2.0},
    ]


@pytest.mark.parametrize(
    ("dense", "density"), [(1.5, 0.25 * 1.5), (2.0, 0.5), (3.5, 0.875), (9.0, 1.0), (0.5, None)]
)
def test_break_even_lies_between_what_was_measured(dense: float, density: float | None) -> None:
    rows = rows_of(
        ("dense", 0, 1.0, dense),
        ("block_sparse", 0, 1.0, 4.0),
        ("block_sparse", 4, 0.5, 2.0),
        ("block_sparse", 2, 0.25, 1.0),
    )
    assert [row["density"] for row in break_even(rows)] == [density]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("parts", ("backward",)),
        ("peers", ("triton",)),
        ("lengths", ()),
        ("lengths", (60,)),
        ("blocks", (-1,)),
        ("block", 7),
        ("num_kv_heads", 3),
        ("few_queries", 65),
        ("dtype", "float16"),
        ("repeats", 0),
    ],
)
def test_bad_fields_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} "):
        dataclasses.replace(CONFIG, **{field: value})


def test_the_command_takes_parts(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ceiling.json"
    flags = ["--parts", "ceiling", "--matmul-size", "16", "--copy-bytes", "1024"]
    assert command(["bench", "attention", *flags, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["peer"], row["unit"]) for row in rows] == [
        ("matmul", "TFLOP/s"),
        ("copy", "GB/s"),
    ]
    assert not out.with_suffix(".png").exists()  # there is nothing to draw
    assert "matmul alone" in capsys.readouterr().out


def test_the_assembler_says_its_version(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", "")
    assert environment.ptxas_version() is None
    folder = tmp_path / "nvidia" / "cu13" / "bin"
    folder.mkdir(parents=True)
    said = "Cuda compilation tools, release 13.0, V13.0.88"
    (folder / "ptxas").write_text(f"#!/bin/sh\necho '{said}'\n")
    (folder / "ptxas").chmod(0o755)
    assert environment.ptxas_version() == "13.0.88"
