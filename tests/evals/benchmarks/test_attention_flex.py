"""FlexAttention is given the very pairs of query and key that a table lets through."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.evals.benchmarks import attention_flex
from routing_jax.evals.benchmarks.attention_agreement import differences
from routing_jax.evals.benchmarks.attention_cases import cases
from routing_jax.evals.benchmarks.attention_config import AttentionBenchConfig
from routing_jax.evals.benchmarks.attention_flex import flex_lists
from routing_jax.kernels import BlockTable, table_from_scores, with_dense_rows

CONFIG = AttentionBenchConfig(
    lengths=(512,),
    blocks=(2,),
    head_dims=(64,),
    agreement_length=512,
    decode_length=1024,
    decode_pages=(2,),
    cache_bytes=0,
    repeats=2,
    target_ms=1,
)
TAKEN = [case for case in cases(CONFIG, "agreement") if case.variant != "block_bias"]
needs_torch = pytest.mark.skipif(
    attention_flex.flex_refusal() is not None, reason=str(attention_flex.flex_refusal())
)


def random_table(seed: int, length: int, block_q: int, block_kv: int) -> BlockTable:
    """Lists of three blocks for two kv heads, some rows dense, some empty."""
    rng = np.random.default_rng(seed)
    shape = (1, 2, -(-length // block_q), -(-length // block_kv))
    scores = jnp.asarray(rng.normal(size=shape), jnp.float32)
    table = table_from_scores(scores, 3, block_q=block_q, block_kv=block_kv).table
    table = with_dense_rows(table, jnp.asarray(rng.random(shape[:3]) < 0.3))
    counts = np.where(rng.random(shape[:3]) < 0.2, 0, table.counts)
    return BlockTable(counts, np.asarray(table.indices), block_q, block_kv)


@pytest.mark.parametrize(("block_q", "block_kv"), [(8, 8), (8, 4), (4, 8)])
@pytest.mark.parametrize("queries", [48, 19])
def test_lists_let_through_what_the_table_does(block_q: int, block_kv: int, queries: int) -> None:
    length = 48
    seed = block_q + queries
    positions = np.sort(np.random.default_rng(seed).permutation(length)[:queries])
    table = random_table(seed, length, block_q, block_kv)
    tiles = -(-queries // block_q)
    counts, indices = table.counts[:, :, :tiles], table.indices[:, :, :tiles]
    lists = flex_lists(BlockTable(counts, indices, block_q, block_kv), positions, length)
    blocks = length // block_kv
    for array in (lists.indices, lists.full_indices):
        assert array.shape == (1, 2, tiles, blocks)  # the width is read as the number of blocks
        assert array.dtype == np.int32
        assert array.min() >= 0
        assert array.max() < blocks
    for head in range(2):
        for tile in range(tiles):
            at = positions[tile * block_q : (tile + 1) * block_q, None]
            row = (0, head, tile)
            count = counts[row]
            listed = set(range(blocks)) if count < 0 else set(indices[row][:count].tolist())
            full = lists.full_indices[row][: lists.full_counts[row]].tolist()
            partial = lists.indices[row][: lists.counts[row]].tolist()
            seen = {
                j: at >= np.arange(j * block_kv, (j + 1) * block_kv)[None] for j in range(blocks)
            }
            assert sorted(full) == [j for j in sorted(listed) if seen[j].all()]
            assert sorted(partial) == [
                j for j in sorted(listed) if seen[j].any() and not seen[j].all()
            ]


def test_a_block_shorter_than_its_tiles_gets_tiles_that_divide_it() -> None:
    assert attention_flex._kernel_options(128) is None
    options = attention_flex._kernel_options(64)
    assert options is not None
    assert all(64 % size == 0 for size in options.values())
    assert options["BLOCK_N1"] % options["BLOCK_M1"] == options["BLOCK_M2"] % options["BLOCK_N2"]


def test_nothing_is_measured_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_flex.importlib.util, "find_spec", lambda name: None)
    case = cases(CONFIG, "forward")[0]
    assert not attention_flex.takes(CONFIG, case)
    with pytest.raises(RuntimeError, match="PyTorch is not installed"):
        attention_flex.time_flex(CONFIG, case)


@pytest.mark.parametrize(("torch", "given", "left"), [(True, {}, "0.5"), (False, {}, None)])
def test_torch_gets_half_of_the_memory(torch, given, left, monkeypatch) -> None:
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(attention_flex.importlib.util, "find_spec", lambda name: torch or None)
    attention_flex.leave_memory_for_torch()
    assert os.environ.get("XLA_CLIENT_MEM_FRACTION") == left
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
    attention_flex.leave_memory_for_torch()
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.9"


@needs_torch
@pytest.mark.gpu
@pytest.mark.parametrize("case", TAKEN, ids=str)
def test_flex_attention_computes_the_same(case) -> None:
    found = differences(CONFIG, case, "flex")
    assert set(found) == {"y", "dq", "dk", "dv"}
    assert max(found.values()) < 0.02


@needs_torch
@pytest.mark.gpu
@pytest.mark.parametrize("part", ["forward", "forward_backward", "decode"])
def test_flex_attention_is_timed(part) -> None:
    for case in cases(CONFIG, part):
        if attention_flex.takes(CONFIG, case):
            assert attention_flex.time_flex(CONFIG, case).milliseconds > 0


def test_queries_of_a_group_share_a_list_on_the_device() -> None:
    """What a mask is built from are the tables that the jax programs use at the same seed."""
    case = next(c for c in cases(CONFIG, "forward") if c.blocks and c.variant is None)
    table = jax.device_get(attention_flex.make_table(case, 7))
    lists = flex_lists(table, np.arange(case.queries), case.length)
    np.testing.assert_array_equal(lists.counts + lists.full_counts, table.counts)
    assert (lists.counts == 1).all()  # the own block alone is partly visible
