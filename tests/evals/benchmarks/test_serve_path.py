"""The serving benchmark: both sides are one model, and every row says what was measured."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.cli import main
from routing_jax.evals.benchmarks import serve_path
from routing_jax.evals.benchmarks.running import Clock
from routing_jax.evals.benchmarks.serve_path_cases import (
    DenseCache,
    Size,
    decisions,
    dense_decode,
    dense_prefill,
    filled_memory,
    held_bytes,
    kv_bytes,
    random_model,
    serving,
)
from routing_jax.evals.benchmarks.serve_path_config import ServePathConfig, dense_layers
from routing_jax.evals.report import readme_blocks
from routing_jax.generate.paged_decode import decode_tokens
from routing_jax.generate.paged_memory import empty_memory
from routing_jax.generate.paged_prefill import prefill_layer, prefill_prompts, prefill_short

pytestmark = pytest.mark.usefixtures("compile_cache")
CONFIG = ServePathConfig(
    model="tiny", lengths=(64,), decode_batches=(1,), sink=8, window=8, block=8, pool=4, chunk=32,
    steps=2, repeats=2, row_seconds=1e-9, who=("routed", "dense"), sparse_shares=(0.0,),
)  # fmt: skip


def test_the_paged_and_the_published_model_are_one():
    model, params = CONFIG.decoder, random_model(CONFIG)
    size = Size(1, 64, 0.0)  # as in the rows below, whose programs are compiled then
    sizes, tokens = serving(CONFIG, size), jax.random.randint(jax.random.key(1), (1, 64), 0, 64)
    plain = CONFIG.model_of("dense")
    logits, cache = dense_prefill(plain, params, tokens, 32, 4)
    lengths = jnp.full(1, 64, jnp.int32)
    memory = empty_memory(model, sizes)
    paged, memory = prefill_prompts(
        model, sizes, params, decisions(CONFIG, size), tokens, lengths, lengths + 6,
        jnp.arange(1), memory,
    )  # fmt: skip
    np.testing.assert_allclose(logits, paged, rtol=1e-4, atol=1e-4)
    room = ((0, 0), (0, 6), (0, 0), (0, 0))
    layers = [tuple(jnp.pad(part, room) for part in layer) for layer in cache]
    made = own = jnp.argmax(logits, axis=-1)
    dense, seen = DenseCache(layers, lengths), []
    for _ in range(4):
        made, dense = dense_decode(plain, params, made, dense)
        own, memory = decode_tokens(model, sizes, params, own, None, memory)
        np.testing.assert_array_equal(made, own)
        seen += made.tolist()
    assert len(set(seen)) > 2


def test_decoding_is_compiled_before_any_row_is_timed():
    config = dataclasses.replace(
        CONFIG, lengths=(72,), parts=("decode",), who=("composed", "dense"), sparse_shares=(0.5,)
    )
    params, folder = random_model(config), Path(jax.config.jax_compilation_cache_dir)

    def compiled():
        found = [*folder.glob("jit_read_tokens*"), *folder.glob("jit_dense_decode*")]
        return {path.name for path in found if path.name.endswith("-cache")}

    before = compiled()
    serve_path._compile_decoding(config, params, Clock(0))
    made = compiled() - before
    assert len(made) == 2
    jax.clear_caches()  # as if another process had compiled them
    rows = serve_path.run(config)["rows"]
    assert all(row["milliseconds"] > 0 for row in rows)
    assert compiled() - before == made


def test_short_prompts_are_read_by_one_program_and_held_as_on_the_dense_side():
    config = dataclasses.replace(CONFIG, lengths=(16,), parts=("prefill",), sparse_shares=(0.5,))
    compiled = prefill_layer._cache_size(), prefill_short._cache_size()
    routed, dense = serve_path.run(config)["rows"]
    assert (prefill_layer._cache_size(), prefill_short._cache_size() - 1) == compiled
    assert routed["kv_bytes"] == dense["kv_bytes"] > 0
    size, length = Size(1, 16, 0.5), jnp.full(1, 16, jnp.int32)
    model, sizes, params = config.decoder, serving(config, size), random_model(config)
    tokens = jax.random.randint(jax.random.key(1), (1, 16), 0, 64)
    logits, _ = dense_prefill(config.model_of("dense"), params, tokens, 16, 4)
    paged, _ = prefill_prompts(
        model, sizes, params, decisions(config, size), tokens, length, length, jnp.arange(1),
        empty_memory(model, sizes),
    )  # fmt: skip
    np.testing.assert_allclose(logits, paged, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["streaming", "triangle"])
@pytest.mark.parametrize(("who", "share"), [("routed", 0.0), ("routed", 1.0), ("composed", 0.5)])
def test_memory_is_what_its_pattern_holds(who, share, mode):
    config, size = dataclasses.replace(CONFIG, mode=mode), Size(2, 64, share)
    blocks, dense = (64 + 6) // 8 + 1, dense_layers(4, share)
    kept = [blocks if one or mode != "streaming" else 2 for one in dense]
    pages, token = 2 * sum(kept), 2 * (2 * 8 * 4)
    narrow = {"routed": 0, "composed": 8 * 2 * 2 * 4}[who]  # a quarter of eight channels
    memory = filled_memory(config, size, who)
    assert held_bytes(memory) == kv_bytes(config, size, who) == pages * (8 * token + narrow)
    assert int(memory.pool.available) == 0
    assert sorted(memory.tables[memory.tables >= 0].tolist()) == list(range(pages))
    searches = np.array(dense)[:, None] & (who != "routed")
    np.testing.assert_array_equal(memory.searches, np.broadcast_to(searches, (4, 2)))


def test_memory_is_that_of_a_prefill():
    """Pages and flags lie where prefill puts them, so that decoding does the same work."""
    size, who = Size(1, 64, 0.5), "composed"
    model, sizes = CONFIG.model_of(who), serving(CONFIG, size)
    length = jnp.full(1, 64, jnp.int32)
    _, read = prefill_prompts(
        model, sizes, random_model(CONFIG), decisions(CONFIG, size), jnp.zeros((1, 64), int),
        length, jnp.full(1, sizes.length), jnp.arange(1), empty_memory(model, sizes),
    )  # fmt: skip
    filled = filled_memory(CONFIG, size, who)
    same = ("pool", "tables", "whole", "searches", "lengths")
    jax.tree.map(
        np.testing.assert_array_equal,
        *([getattr(memory, name) for name in same] for memory in (read, filled)),
    )
    assert jax.tree.map(jnp.shape, read) == jax.tree.map(jnp.shape, filled)


def test_every_row_says_what_it_measured_and_becomes_a_block(tmp_path, capsys):
    out = tmp_path / "serve-path" / "cpu.json"
    who = ("routed", "composed", "dense")
    result = serve_path.main(dataclasses.replace(CONFIG, who=who, blocks=2, channels=4), out)
    rows = [
        (row["part"], row["who"], row["batch"], row["sparse_share"], row["blocks"])
        for row in result["rows"]
    ]
    assert rows == [
        ("router", "routed", 1, 0.0, None),
        *((part, one, 1, 0.0, 2 if one == "composed" else None)
          for part in ("prefill", "decode") for one in who),
    ]  # fmt: skip
    assert all(row["milliseconds"] > 0 and "error" not in row for row in result["rows"])
    # A row whose time is spent takes no second sample; the router's has its own measure.
    assert [row["samples"] for row in result["rows"]] == [2] + 6 * [1]
    assert all(row["least"] is None for row in result["rows"])  # of a device that it knows
    assert all((row["kv_bytes"] > 0) == (row["part"] != "router") for row in result["rows"])
    assert json.loads(out.read_text())["rows"] == result["rows"]
    block = readme_blocks(tmp_path)["serve-path-cpu-tiny"]
    assert "| 64 | 1 |" in block
    assert "the shape of tiny with random weights" in block
    assert (
        "| tokens | batch | dense | routed, 0 % sparse | composed (best 2 blocks by 4 channels), "
        in block
    )
    assert "KV GiB, routed | KV GiB, composed (best 2 blocks by 4 channels) |" in block
    assert "composed: the other layers see the same and the best blocks of 8 keys, for" in block
    said = capsys.readouterr().out
    assert "prefill 1×64 routed, 0 % sparse:" in said
    assert "decode 1×64 composed (best 2 blocks by 4 channels), 0 % sparse:" in said


def test_a_run_that_is_cut_off_leaves_what_it_measured(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    row = {"milliseconds": 2.0, "spread": 0.0, "samples": 1, "kv_bytes": 2**20}
    monkeypatch.setattr(serve_path, "_time_prefill", lambda *_: row)
    monkeypatch.setattr(serve_path, "_time_decode", stop)
    config = dataclasses.replace(CONFIG, parts=("prefill", "decode"))
    with pytest.raises(KeyboardInterrupt):
        serve_path.main(config, tmp_path / "serve-path" / "cpu.json")
    assert "| 64 | 1 | 2 | 2 (1.00×) |" in readme_blocks(tmp_path)["serve-path-cpu-tiny"]


def test_lengths_come_in_the_order_given_and_the_control_last():
    config = dataclasses.replace(
        CONFIG, who=("kernels", "routed", "dense"), lengths=(128, 64), decode_batches=(1, 3),
        seconds=1e-9,
    )  # fmt: skip
    rows = serve_path.run(config)["rows"]
    assert all("skipped" in row["error"] for row in rows)
    found = [(row["length"], row["part"], row["batch"], row["who"]) for row in rows]
    sizes = [("prefill", 1), ("decode", 1), ("decode", 3)]
    expected = []
    for length in (128, 64):
        expected.append((length, "router", 1, "routed"))
        expected += [(length, *size, who) for size in sizes for who in ("routed", "dense")]
    expected += [(length, *size, "kernels") for length in (128, 64) for size in sizes]
    assert found == expected


def test_what_fails_costs_its_own_row_only(monkeypatch):
    def fail(*_):
        raise MemoryError("out of memory")

    monkeypatch.setattr(serve_path, "_time_decode", fail)
    config = dataclasses.replace(CONFIG, parts=("decode",), who=("dense",), seconds=1e-9)
    (skipped,) = serve_path.run(config)["rows"]
    (failed,) = serve_path.run(dataclasses.replace(config, seconds=0.0))["rows"]
    assert "skipped" in skipped["error"]
    assert failed["error"] == "MemoryError: out of memory"
    assert (failed["milliseconds"], failed["kv_bytes"]) == (None, None)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--who", "routed", "dens"], "who"),
        (["--lengths", "0"], "lengths holds 0; each must be at least 1"),
        (["--sparse-shares", "1.5"], "sparse_shares holds 1.5; each must lie between 0 and 1"),
        (["--blocks", "0"], "blocks is 0; it must be at least 1"),
        (["--mode", "dense"], "mode"),
        (["--repeats", "0"], "repeats is 0; it must be at least 1"),
        (["--model", "gpt"], "model"),
    ],
)
def test_bad_fields_are_named(flags, said, capsys):
    assert main(["bench", "serve-path", *flags]) == 2
    assert said in capsys.readouterr().err
