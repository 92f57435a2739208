import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.kernels import table_from_blocks, table_from_scores, union_tables

from .random_tables import listed_sets, random_table


def expected_rows(scores, capacity, block_q, block_kv, sinks, causal, wanted=None, starts=None):
    """(batch, head, tile) → listed blocks and the number dropped, straight from the definition."""
    B, K, M, J = scores.shape
    rows, dropped = {}, np.zeros((B, K, M), int)
    for b, k, m in np.ndindex(B, K, M):
        start = m * block_q if starts is None else int(starts[b, m])
        own = {p // block_kv for p in range(start, start + block_q)} & set(range(J))
        first = {j for j in range(min(sinks, J)) if not causal or j * block_kv < start + block_q}
        forced = own | first
        others = [j for j in range(J) if not causal or (j + 1) * block_kv <= start]
        if wanted is not None:
            others = [j for j in others if wanted[b, k, m, j]]
        others = [j for j in others if j not in forced and scores[b, k, m, j] > -np.inf]
        best = sorted(others, key=lambda j: (-scores[b, k, m, j], j))
        kept = best[: capacity - len(forced)]
        rows[b, k, m] = forced | set(kept)
        dropped[b, k, m] = len(others) - len(kept) if wanted is not None else 0
    return rows, dropped


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("block_q", "block_kv", "sinks"), [(8, 8, 1), (16, 8, 2), (8, 16, 0)])
@pytest.mark.parametrize("gated", [True, False])
def test_scores_choose_own_blocks_sinks_and_the_best(block_q, block_kv, sinks, causal, gated):
    rng = np.random.default_rng(1)
    M, J = 128 // block_q, 128 // block_kv
    scores = rng.integers(-3, 4, (2, 2, M, J)).astype(np.float32)  # ties are common
    scores[rng.random(scores.shape) < 0.2] = -np.inf
    wanted = rng.random(scores.shape) < 0.6 if gated else None
    table, dropped = jax.jit(
        lambda s, w: table_from_scores(
            s, 5, block_q=block_q, block_kv=block_kv, sinks=sinks, causal=causal, wanted=w
        )
    )(scores, wanted)
    rows, missing = expected_rows(scores, 5, block_q, block_kv, sinks, causal, wanted)
    assert listed_sets(table) == rows
    np.testing.assert_array_equal(dropped, missing)
    for row, blocks in rows.items():
        assert table.indices[row][: len(blocks)].tolist() == sorted(blocks)
        assert table.indices[row][len(blocks) :].tolist() == [0] * (5 - len(blocks))


def test_a_row_keeps_its_limit_and_what_is_forced():
    rng = np.random.default_rng(7)
    scores = rng.normal(size=(2, 2, 8, 8)).astype(np.float32)
    limits = rng.integers(0, 6, (2, 1, 8)).astype(np.int32)
    table, _ = jax.jit(
        lambda s, n: table_from_scores(s, 5, block_q=8, block_kv=8, sinks=1, row_limits=n)
    )(scores, limits)
    rows = listed_sets(table)
    for b, k, m in np.ndindex(2, 2, 8):
        capacity = max(int(limits[b, 0, m]), len({0, m}))
        want, _ = expected_rows(scores, min(5, capacity), 8, 8, 1, True)
        assert rows[b, k, m] == want[b, k, m]


def test_decoding_tiles_make_the_rows_of_prefill():
    rng = np.random.default_rng(2)
    scores = jnp.asarray(rng.normal(size=(2, 1, 16, 16)), jnp.float32)
    whole, _ = table_from_scores(scores, 4, block_q=8, block_kv=8, sinks=1)
    tiles = jnp.array([[3], [11]])
    part, _ = table_from_scores(
        jnp.take_along_axis(scores, tiles[:, None, :, None], axis=2),
        4,
        block_q=8,
        block_kv=8,
        sinks=1,
        tile_starts=tiles * 8,
    )
    for b, m in enumerate((3, 11)):
        np.testing.assert_array_equal(part.indices[b, :, 0], whole.indices[b, :, m])
        np.testing.assert_array_equal(part.counts[b, :, 0], whole.counts[b, :, m])


def test_tiles_may_start_inside_a_block():
    scores = np.zeros((1, 1, 2, 4), np.float32)
    starts = np.array([[4, 12]])
    table, _ = table_from_scores(
        scores, 3, block_q=8, block_kv=8, tile_starts=jnp.asarray(starts), sinks=1
    )
    assert listed_sets(table) == expected_rows(scores, 3, 8, 8, 1, True, starts=starts)[0]


@pytest.mark.parametrize(("block_q", "block_kv"), [(8, 8), (16, 8), (8, 16)])
def test_no_row_peeks_past_its_first_query(block_q, block_kv):
    rng = np.random.default_rng(3)
    M, J = 64 // block_q, 64 // block_kv
    scores = rng.normal(size=(1, 1, M, J)).astype(np.float32)
    complete = (np.arange(J)[None] + 1) * block_kv <= np.arange(M)[:, None] * block_q
    poisoned = np.where(complete, scores, np.nan).astype(np.float32)
    rows = [
        table_from_scores(jnp.asarray(s), 4, block_q=block_q, block_kv=block_kv, sinks=1).table
        for s in (scores, poisoned)
    ]
    np.testing.assert_array_equal(rows[0].counts, rows[1].counts)
    np.testing.assert_array_equal(rows[0].indices, rows[1].indices)


def test_selection_refuses_what_cannot_fit():
    scores = jnp.zeros((1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"own blocks and the sinks, 3 blocks; it is 2"):
        table_from_scores(scores, 2, block_q=16, block_kv=8, sinks=1)
    with pytest.raises(ValueError, match=r"wanted \[B,K,M,J\] must have shape \(1, 1, 4, 4\)"):
        table_from_scores(scores, 2, block_q=8, block_kv=8, wanted=jnp.ones((1, 1, 4, 3), bool))
    with pytest.raises(ValueError, match=r"tile_starts \[B,M\] must have shape \(1, 4\)"):
        table_from_scores(scores, 2, block_q=8, block_kv=8, tile_starts=jnp.zeros((4,), int))
    # A capacity that holds every block holds the forced ones, however many they are.
    table, _ = table_from_scores(scores[..., :2], 2, block_q=32, block_kv=8, sinks=4)
    assert table.capacity == 2


def test_lists_are_sorted_and_lose_their_repeats():
    rng = np.random.default_rng(4)
    blocks = rng.integers(0, 9, (2, 2, 5, 6))
    listed = rng.random(blocks.shape) < 0.6
    table = jax.jit(lambda b, u: table_from_blocks(b, u, block_q=8, block_kv=8))(blocks, listed)
    for row, got in listed_sets(table).items():
        assert got == set(blocks[row][listed[row]].tolist())
        count = int(table.counts[row])
        assert count == len(got)
        assert table.indices[row][:count].tolist() == sorted(got)


def test_union_lists_what_either_lists():
    rng = np.random.default_rng(5)
    sizes = {"tiles": 4, "blocks": 6, "block_q": 8, "block_kv": 8, "dense": 0.2}
    first = random_table(rng, batch=3, heads=1, capacity=3, **sizes)
    second = random_table(rng, batch=1, heads=2, capacity=2, **sizes)
    union = jax.jit(union_tables)(first, second)
    sets = listed_sets(first), listed_sets(second), listed_sets(union)
    assert union.indices.shape == (3, 2, 4, 5)
    for b, k, m in np.ndindex(3, 2, 4):
        if first.counts[b, 0, m] < 0 or second.counts[0, k, m] < 0:
            assert union.counts[b, k, m] == -1
        else:
            assert sets[2][b, k, m] == sets[0][b, 0, m] | sets[1][0, k, m]
            assert union.counts[b, k, m] == len(sets[2][b, k, m])


def test_union_refuses_other_blocks_and_tiles():
    rng = np.random.default_rng(6)
    sizes = {"batch": 2, "heads": 1, "blocks": 6, "capacity": 2, "block_kv": 8}
    first = random_table(rng, tiles=4, block_q=8, **sizes)
    with pytest.raises(
        ValueError, match=r"share block_q and block_kv; they have \(8, 8\) and \(16"
    ):
        union_tables(first, random_table(rng, tiles=4, block_q=16, **sizes))
    with pytest.raises(ValueError, match=r"counts of shapes \(2, 1, 4\) and \(2, 1, 3\)"):
        union_tables(first, random_table(rng, tiles=3, block_q=8, **sizes))
