"""The search by beam: exact when broad, a NumPy beam when not, and logarithmic."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from routing_jax.routers import (
    BlockRouter,
    BlockRouterConfig,
    KeyBlocks,
    TileQueries,
    beam_scores,
    beam_search,
)

pytestmark = pytest.mark.usefixtures("compile_cache")

B, M, J, K, R = 2, 20, 20, 2, 4


def draw(seed):
    rng = np.random.default_rng(seed)
    queries, keys = rng.normal(size=(B, M, K, R)), rng.normal(size=(B, J, K, R))
    return queries.astype(np.float32), keys.astype(np.float32)


def numpy_beam(query, keys, own, fanout, beam):
    """Candidate blocks of one row: complete nodes compete, the one that is not is opened."""
    depth = 0
    while math.ceil(len(keys) / fanout**depth) > fanout:
        depth += 1
    nodes = list(range(math.ceil(len(keys) / fanout**depth)))
    for level in range(depth, -1, -1):
        size = fanout**level
        whole = [n for n in nodes if (n + 1) * size <= own // size * size]
        score = {n: query @ keys[n * size : (n + 1) * size].mean(0) for n in whole}
        if level == 0:
            return score
        kept = sorted(whole, key=lambda n: -score[n])[:beam]
        nodes = [c for n in [*kept, own // size] for c in range(n * fanout, (n + 1) * fanout)]
    raise AssertionError


@pytest.mark.parametrize(("fanout", "beam"), [(2, 1), (2, 3), (3, 2), (4, 20)])
def test_candidates_are_those_of_a_plain_beam(fanout, beam):
    queries, keys = draw(fanout)
    own = np.tile(np.arange(M, dtype=np.int32), (B, 1))
    found, scores = jax.jit(lambda q, k: beam_search(q, k, own, fanout=fanout, beam=beam))(
        queries, keys
    )
    for b, k, m in np.ndindex(B, K, M):
        want = numpy_beam(queries[b, m, k].astype(float), keys[b, :, k].astype(float), m,
                          fanout, beam)  # fmt: skip
        real = np.isfinite(scores[b, k, m])
        got = dict(zip(found[b, k, m][real].tolist(), scores[b, k, m][real].tolist()))
        assert len(got) == real.sum()  # none twice
        assert got.keys() == want.keys()
        for j, score in want.items():
            assert got[j] == pytest.approx(score / R**0.5, rel=1e-4, abs=1e-5)
        if beam >= J:
            assert got.keys() == set(range(m))


@pytest.mark.parametrize(("sinks", "local"), [(1, 0), (2, 3)])
def test_a_broad_beam_chooses_what_scoring_every_block_chooses(sinks, local):
    flat = BlockRouterConfig(
        block_q=4, block_kv=4, budget="fraction", fraction=0.99, width=R, sinks=sinks, local=local
    )
    params, tiles, blocks = inputs()
    made = [
        jax.jit(BlockRouter(c, K).apply)({"params": params}, tiles, blocks)
        for c in (flat, dataclasses.replace(flat, fanout=3))
    ]
    np.testing.assert_array_equal(made[0].table.counts, made[1].table.counts)
    slots = np.arange(J) < np.asarray(made[0].table.counts)[..., None]
    for a, b in ((r.table.indices, r.bias) for r in made[1:]):
        np.testing.assert_array_equal(np.where(slots, a, 0),
                                      np.where(slots, made[0].table.indices, 0))  # fmt: skip
        np.testing.assert_allclose(b, made[0].bias, rtol=1e-4, atol=1e-5)


def inputs():
    rng = np.random.default_rng(0)

    def some(*shape):
        return rng.normal(size=shape).astype(np.float32)

    starts = np.tile(np.arange(M, dtype=np.int32) * 4, (B, 1))
    params = {"query": some(5, K, R), "key": some(5, K, R), "bias": some(K)}
    tiles = TileQueries(some(B, M, 5), some(B, M, K, 4), starts)
    return params, tiles, KeyBlocks(some(B, J, 5))


def test_no_candidate_reads_a_key_from_its_own_block_on():
    queries, keys = draw(9)
    for own in (0, 1, 5, 12, 19):
        at = np.full((B, M), own, np.int32)
        spoilt = np.where(np.arange(J)[None, :, None, None] < own, keys, np.nan)
        run = jax.jit(lambda k, at=at: beam_search(queries, k, at, fanout=2, beam=2))
        for a, b in zip(run(keys), run(spoilt)):
            np.testing.assert_array_equal(a, b)


def test_scores_grow_with_the_logarithm_of_the_length():
    """Each doubling of the blocks adds as much, where scoring them all doubles."""
    counts = [beam_scores(2**n, 2, 8) for n in range(6, 16)]
    steps = np.diff(counts)
    assert np.all(steps == steps[0])
    assert counts[-1] < 2**15 / 50
