import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.kernels import (
    BlockTable,
    check_table,
    checked,
    dense_table,
    density,
    row_lengths,
    window_table,
    with_dense_rows,
)

from .random_tables import random_table


def small_table(**changes) -> BlockTable:
    table = BlockTable(
        jnp.array([[[1, 2, 2]]]), jnp.array([[[[0, 0], [0, 1], [0, 2]]]]), block_q=8, block_kv=8
    )
    return dataclasses.replace(table, **changes)


def test_is_a_pytree_with_static_block_sizes():
    leaves, structure = jax.tree.flatten(small_table())
    assert [leaf.shape for leaf in leaves] == [(1, 1, 3), (1, 1, 3, 2)]
    doubled = jax.jit(lambda table: jax.tree.map(lambda x: 2 * x, table))(small_table())
    assert (doubled.block_q, doubled.block_kv) == (8, 8)
    assert doubled.counts.tolist() == [[[2, 4, 4]]]
    assert structure != jax.tree.structure(small_table(block_q=16))


@pytest.mark.parametrize("causal", [True, False])
def test_density_counts_executed_tiles(causal):
    rng = np.random.default_rng(0)
    table = random_table(
        rng, batch=2, heads=2, tiles=4, blocks=7, capacity=3, block_q=16, block_kv=8, dense=0.3
    )
    T, S = 50, 52
    for (b, k), got in np.ndenumerate(density(table, T, S, causal=causal)):
        executed = full = 0
        for m in range(4):
            last = min(T, (m + 1) * 16) - 1
            visible = sum(1 for j in range(7) if not causal or j * 8 <= last)
            count = int(table.counts[b, k, m])
            executed += visible if count < 0 else count
            full += visible
        assert got == pytest.approx(executed / full)


def test_dense_costs_exactly_one():
    for T, block_q, block_kv in ((256, 64, 64), (250, 64, 128), (100, 128, 64)):
        table = dense_table(T, T, block_q=block_q, block_kv=block_kv)
        assert density(table, T, T).tolist() == [[1.0]]


def test_compacted_queries_cost_what_they_visit():
    table = dense_table(16, 64, block_q=8, block_kv=8)
    positions = jnp.array([[0, 1, 2, 3, 4, 5, 6, 7] + [-1] * 8, [*range(0, 64, 4)]])
    lengths = row_lengths(table, 16, 64, q_positions=positions)
    assert lengths.tolist() == [[[1, 0]], [[4, 8]]]
    full = 8 * 9 / 2
    np.testing.assert_allclose(
        density(table, 16, 64, q_positions=positions)[:, 0], [1 / full, 12 / full]
    )


def test_dense_rows_by_sample():
    table = window_table(32, 32, 0, block_q=8, block_kv=8)
    mixed = with_dense_rows(table, jnp.array([True, False])[:, None, None])
    assert mixed.counts.tolist() == [[[-1] * 4], [[1] * 4]]
    assert mixed.indices.shape == (2, 1, 4, 1)
    with pytest.raises(ValueError, match=r"dense must broadcast .* it has shape \(2, 1, 3\)"):
        with_dense_rows(table, jnp.zeros((2, 1, 3), bool))
    with pytest.raises(ValueError, match="dense has 5 tiles; the table has 1"):
        with_dense_rows(dense_table(8, 8, block_q=8, block_kv=8), jnp.zeros((1, 1, 5), bool))


BAD_TABLES = {
    "block size": ({"block_q": 0}, "block_q and block_kv must be at least 1; they are 0 and 8"),
    "counts dtype": ({"counts": jnp.ones((1, 1, 3))}, "counts must have dtype int32; .* float32"),
    "indices dtype": (
        {"indices": jnp.zeros((1, 1, 3, 2), jnp.int16)},
        "indices must have dtype int32; it has int16",
    ),
    "counts rank": ({"counts": jnp.ones((1, 3), jnp.int32)}, r"counts \[B,K,M\] must have shape"),
    "indices shape": (
        {"indices": jnp.zeros((1, 2, 3, 2), jnp.int32)},
        r"indices \[B,K,M,C\] must have shape \(1, 1, 3, C\); it has shape \(1, 2, 3, 2\)",
    ),
    "tiles": ({"block_q": 16}, r"must have 2 query tiles \(T=24, block_q=16\); .*\(1, 1, 3\)"),
    "count": ({"counts": jnp.array([[[1, 3, 2]]])}, r"lie in \[-1, 2\]; row \(0, 0, 1\) counts 3"),
    "index": (
        {"indices": jnp.array([[[[0, 0], [0, 1], [0, 3]]]])},
        r"lie in \[0, 3\); row \(0, 0, 2\) lists \[0, 3\]",
    ),
    "order": (
        {"indices": jnp.array([[[[0, 0], [1, 0], [0, 2]]]])},
        r"ascending within the count; row \(0, 0, 1\) lists \[1, 0\]",
    ),
    "repeat": (
        {"indices": jnp.array([[[[0, 0], [1, 1], [0, 2]]]])},
        r"ascending within the count; row \(0, 0, 1\) lists \[1, 1\]",
    ),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables_are_refused(name):
    changes, sentence = BAD_TABLES[name]
    with pytest.raises(ValueError, match=sentence):
        check_table(small_table(**changes), 24, 24, batch=2, kv_heads=4)


def test_a_table_of_another_batch_is_refused():
    table = small_table(counts=jnp.ones((3, 1, 3), jnp.int32), indices=jnp.zeros((3, 1, 3, 2), int))
    with pytest.raises(ValueError, match=r"must be 1 or those of k, \(2, 4\); .*\(3, 1, 3\)"):
        check_table(table, 24, 24, batch=2, kv_heads=4)


@pytest.mark.parametrize("name", ["count", "index", "order", "repeat"])
def test_traced_values_are_checked_where_asked(name):
    changes, sentence = BAD_TABLES[name]

    def check(table):
        check_table(table, 24, 24, batch=2, kv_heads=4)
        return table.counts

    run = jax.jit(checked(check))
    error, _ = run(small_table(**changes))
    assert sentence.split(";")[0].replace("\\", "") in (error.get() or "")
    assert run(small_table())[0].get() is None
    jax.jit(check)(small_table(**changes))  # elsewhere the check is not there at all
