import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.kernels import BlockTable, transpose_table

from .jaxprs import array_sizes
from .random_tables import listed_sets, random_table


@pytest.mark.parametrize("seed", range(3))
def test_every_listed_block_finds_its_tiles(seed):
    rng = np.random.default_rng(seed)
    J = 7
    table = random_table(
        rng, batch=2, heads=3, tiles=5, blocks=J, capacity=4, block_q=8, block_kv=8, dense=0.2
    )
    transposed = jax.jit(transpose_table, static_argnums=1)(table, J)
    rows = listed_sets(table)
    for b, k in np.ndindex(2, 3):
        offsets = transposed.offsets[b, k]
        assert offsets[0] == 0
        for j in range(J):
            entries = np.asarray(transposed.entries[b, k])[int(offsets[j]) : int(offsets[j + 1])]
            tiles, slots = entries // transposed.capacity, entries % transposed.capacity
            assert tiles.tolist() == [m for m in range(5) if j in rows[b, k, m]]
            for tile, slot in zip(tiles, slots):
                assert table.indices[b, k, tile, slot] == j
        dense = np.flatnonzero(table.counts[b, k] < 0).tolist()
        assert transposed.dense_counts[b, k] == len(dense)
        assert transposed.dense_tiles[b, k].tolist() == dense + [5] * (5 - len(dense))


def test_nothing_is_as_large_as_tiles_times_blocks():
    M = J = 1024
    table = BlockTable(jnp.ones((1, 1, M), jnp.int32), jnp.zeros((1, 1, M, 2), jnp.int32), 8, 8)
    jaxpr = jax.make_jaxpr(lambda t: transpose_table(t, J))(table)
    assert max(array_sizes(jaxpr)) <= 4 * M


def test_indices_out_of_range_are_left_out():
    table = BlockTable(
        jnp.array([[[2, 2]]]), jnp.array([[[[-1, 1], [1, 9]]]]), block_q=8, block_kv=8
    )
    transposed = transpose_table(table, 3)
    assert transposed.offsets.tolist() == [[[0, 0, 2, 2]]]
    assert transposed.entries[0, 0, :2].tolist() == [1, 2]
