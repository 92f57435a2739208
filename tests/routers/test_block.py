"""Block routers: rows are what the scores say, by a plain loop in NumPy, within every budget."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing_jax.routers import (
    BlockRouter,
    BlockRouterConfig,
    KeyBlocks,
    TileQueries,
    assign_clusters,
    block_router_work,
    block_sums,
    means_of_sums,
    router_inputs,
    row_limits,
)
from routing_jax.routers.block_scores import project_few

pytestmark = pytest.mark.usefixtures("compile_cache")

B, M, J, K, G, H, D = 2, 12, 6, 2, 2, 4, 5
PLAIN = BlockRouterConfig(block_q=2, block_kv=4, budget="blocks", blocks=3, width=4, clusters=4)


STRIDE = 32.0  # of bias and slope, where nothing else of a router closes its gates


def make_inputs(seed):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    starts = np.tile(np.arange(M, dtype=np.int32) * 2, (B, 1))
    tiles = TileQueries(draw(B, M, D), draw(B, M, K * G, H), starts)
    params = {"query": draw(D, K, 4), "key": draw(D, K, 4), "bias": draw(K), "slope": draw(K)}
    return tiles, draw(B, J, D), draw(B, J, K * H), params


def route(config, seed=0, rng=None):
    tiles, means, key_means, params = make_inputs(seed)
    means = key_means if config.kind == "pooled" else means
    fixed = config.kind in ("window", "strided", "bigbird")
    means = means[..., :0] if fixed else means
    wanted = () if fixed or config.kind == "pooled" else ("query", "key")
    wanted += ("bias",) if config.kind == "learned" or config.budget == "gates" else ()
    wanted += ("slope",) if fixed and config.budget == "gates" else ()
    params = {k: v for k, v in params.items() if k in wanted}
    if config.budget == "gates" and config.kind != "learned":
        params |= {k: params[k] / STRIDE for k in ("bias", "slope") if k in params}
    return compiled(config)({"params": params}, tiles, KeyBlocks(means), rng)


@functools.cache
def compiled(config):
    return jax.jit(BlockRouter(config, K).apply)


def rows_of(table):
    """(b, k, m) → what the row lists."""
    counts = np.broadcast_to(table.counts, (B, K, M))
    indices = np.broadcast_to(table.indices, (B, K, M, table.capacity))
    return {at: indices[at][: counts[at]].tolist() for at in np.ndindex(B, K, M)}


def turned(x, places):
    """Pairs (x_i, x_{i+R/2}) as complex numbers, each turned by its place."""
    half = x.shape[-1] // 2
    pairs = x[..., :half] + 1j * x[..., half:]
    angle = places[:, None, None] * 10_000.0 ** (-np.arange(half) / half)
    pairs = pairs * np.exp(1j * angle)
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def numpy_scores(config, seed):
    """[B,K,M,J] in float64."""
    tiles, means, key_means, params = make_inputs(seed)
    bias, slope = (params[name][None, :, None, None] for name in ("bias", "slope"))
    if config.kind == "window":
        back = np.maximum(np.arange(M)[:, None] // 2 - np.arange(J), 1)
        return np.broadcast_to(bias - slope * np.log2(back), (B, K, M, J))
    if config.kind == "pooled":
        q = tiles.q.astype(float).reshape(B, M, K, G, H).mean(3)
        k = key_means.astype(float).reshape(B, J, K, H)
    else:
        q = np.einsum("bmd,dkr->bmkr", tiles.x.astype(float), params["query"])
        k = np.einsum("bjd,dkr->bjkr", means.astype(float), params["key"])
    if config.kind == "clusters":
        return q, k
    if config.kind != "pooled":
        q, k = turned(q, np.arange(M) // 2), turned(k, np.arange(J))
    scores = np.einsum("bmkr,bjkr->bkmj", q, k) / np.sqrt(q.shape[-1])
    if config.kind == "indexer" and config.budget == "gates":
        for m in range(M):  # log of a share of the row's softmax × the blocks that compete
            row = scores[:, :, m, config.sinks : m // 2 - config.local]
            if row.shape[-1]:
                row -= np.log(np.exp(row).mean(-1, keepdims=True))
    return scores + bias * (config.kind == "learned" or config.budget == "gates")


def numpy_row(config, scores, own, together=None):
    """What one row lists, from its scores [J]: the rule in plain words."""
    near = own - config.local
    always = set(range(max(0, near), own + 1)) | set(range(min(config.sinks, own)))
    others = list(range(config.sinks, near))
    ranked = sorted(others, key=lambda j: -scores[j])
    if config.budget == "blocks":
        most = config.blocks
    else:
        most = int(np.floor(config.fraction * (own + 1) + 0.5))
    if config.budget == "mass":
        share = np.exp([scores[j] for j in ranked])
        held = np.cumsum(share) / share.sum() if ranked else share
        most = min(most, len(always) + int(np.sum(held - share / share.sum() < config.mass)))
    if config.budget == "gates":
        ranked = [j for j in ranked if scores[j] > 0]
    if together is not None:
        ranked = [j for j in ranked if together[j]]
    return sorted(always | set(ranked[: max(0, most - len(always))]))


BUDGETS = st.one_of(
    st.integers(2, J).map(lambda n: {"budget": "blocks", "blocks": n}),
    st.sampled_from([0.1, 0.25, 0.5, 1.0]).map(lambda f: {"budget": "fraction", "fraction": f}),
)
SOFT = st.one_of(
    BUDGETS,
    st.sampled_from([0.2, 0.6, 0.95]).map(lambda p: {"budget": "mass", "mass": p, "fraction": 0.7}),
)


@given(
    kind=st.sampled_from(["pooled", "learned", "indexer", "random"]),
    budget=SOFT,
    always=st.sampled_from([(0, 0), (1, 0), (0, 1), (1, 1), (2, 2)]),
    seed=st.integers(0, 99),
)
@settings(max_examples=12)
def test_a_row_lists_what_its_scores_say(kind, budget, always, seed):
    if kind == "random" and budget["budget"] == "mass":
        kind = "learned"
    sinks, local = always
    budget = budget | {"blocks": max(budget.get("blocks", 0), 1 + sinks + local)}
    config = dataclasses.replace(PLAIN, kind=kind, sinks=sinks, local=local, **budget)
    scores = numpy_scores(config, seed)
    for (b, k, m), got in rows_of(route(config, seed).table).items():
        assert got == numpy_row(config, scores[b, k, m], m // 2)


@pytest.mark.parametrize("kind", ["learned", "indexer", "random", "window"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_open_gates_are_listed_and_what_has_no_room_is_counted(kind, fraction):
    config = dataclasses.replace(PLAIN, kind=kind, budget="gates", fraction=fraction)
    scores, routed = numpy_scores(config, 3), route(config, 3)
    for (b, k, m), got in rows_of(routed.table).items():
        own = m // 2
        assert got == numpy_row(config, scores[b, k, m], own)
        wish = numpy_row(dataclasses.replace(config, fraction=1.0), scores[b, k, m], own)
        assert int(routed.dropped[b, k, m]) == len(wish) - len(got)
        assert float(routed.listed[b, k, m]) == len(got)
    assert (int(routed.dropped.sum()) > 0) == (fraction < 1)


@pytest.mark.parametrize("budget", ["mass", "gates"])
def test_what_a_row_lists_falls_along_its_gradient(budget):
    """So that λ on cost can bring it down to any target."""
    config = dataclasses.replace(PLAIN, kind="learned", budget=budget, fraction=1.0, sinks=0)
    tiles, means, _, params = make_inputs(5)
    params.pop("slope")

    @jax.jit
    @jax.value_and_grad
    def listed(params):
        routed = BlockRouter(config, K).apply({"params": params}, tiles, KeyBlocks(means))
        return routed.listed.mean()

    counts = []
    for _ in range(100):
        count, slope = listed(params)
        counts.append(float(count))
        params = jax.tree.map(lambda p, g: p - g, params, slope)
    # The own block is always listed, and some mass is in one more if there is any.
    least = 1 + (budget == "mass") * np.mean(tiles.starts >= config.block_kv)
    assert least <= counts[-1] < least + 0.3 * (counts[0] - least)


def test_a_block_alone_holds_all_of_its_rows_mass_whatever_it_scores():
    """Distillation leaves a row's scores open but for a constant; an indexer's gates don't ask."""
    config = dataclasses.replace(PLAIN, kind="indexer", budget="gates", fraction=1.0, sinks=0)
    tiles, means, _, params = make_inputs(2)
    params.pop("slope")
    routed = BlockRouter(config, K).apply({"params": params}, tiles, KeyBlocks(means))
    alone = routed.routing.logits[:, :, 2:4, 0]  # of tiles in the second block
    np.testing.assert_allclose(alone - STRIDE * params["bias"][None, :, None], 0, atol=1e-4)


@pytest.mark.parametrize("width", [512, 300])
def test_parts_of_a_width_add_up(width):
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(2, 3, width)), rng.normal(size=(width, 2, 4))
    got = project_few(jnp.asarray(x, jnp.float32), jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(got, np.einsum("bmd,dkr->bmkr", x, weights), rtol=1e-4, atol=1e-4)


def test_gates_with_few_numbers_begin_where_others_do():
    tiles, means, _, _ = make_inputs(0)
    for kind, extra in (("random", {}), ("indexer", {}), ("window", {"slope": 0.2})):
        config = dataclasses.replace(PLAIN, kind=kind, budget="gates")
        blocks = KeyBlocks(means[..., :0] if kind == "window" else means)
        params = BlockRouter(config, K).init(jax.random.key(0), tiles, blocks)["params"]
        for name, start in {"bias": config.bias, **extra}.items():
            np.testing.assert_allclose(STRIDE * params[name], start, rtol=1e-6)


def test_blocks_of_the_tiles_cluster_are_listed():
    config = dataclasses.replace(PLAIN, kind="clusters", budget="fraction", fraction=0.6)
    q, k = numpy_scores(config, 1)
    softmax = [np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (q, k)]
    scores = np.einsum("bmke,bjke->bkmj", *softmax)
    mine, theirs = q.argmax(-1), k.argmax(-1)
    for (b, h, m), got in rows_of(route(config, 1).table).items():
        together = theirs[b, :, h] == mine[b, m, h]
        assert got == numpy_row(config, scores[b, h, m], m // 2, together)


def test_a_cluster_without_blocks_leaves_its_own_block_and_the_sinks():
    queries = jnp.array([5.0, 0.0]).reshape(1, 1, 1, 2)
    keys = jnp.array([[0.0, 5.0]] * 4).reshape(1, 4, 1, 2)
    clusters = assign_clusters(queries, keys, None, 1.0)
    assert not clusters.together.any()
    assert np.all(np.isfinite(clusters.scores))
    one = assign_clusters(queries[..., :1], keys[..., :1], None, 1.0)  # one cluster holds all
    assert one.together.all()
    assert float(one.aux) == 1


def test_unequal_clusters_cost_up_to_their_number():
    even, apart = np.eye(4), (np.eye(4)[[0, 0, 1, 1]], np.eye(4)[[2, 2, 3, 3]])
    for tiles, blocks, aux in ((even, even, 1.0), (even[[0] * 4],) * 2 + (4.0,), (*apart, 2.0)):
        logits = (jnp.asarray(50 * x, jnp.float32)[None, :, None] for x in (tiles, blocks))
        assert float(assign_clusters(*logits, None, 1.0).aux) == pytest.approx(aux, rel=1e-4)


def own_of(m):
    return m // 2


@pytest.mark.parametrize("kind", ["window", "strided", "bigbird"])
@pytest.mark.parametrize("blocks", [2, 3, 4])
def test_fixed_patterns_fill_the_same_budget(kind, blocks):
    config = dataclasses.replace(PLAIN, kind=kind, blocks=blocks)
    table = route(config).table
    for (_, _, m), got in rows_of(table).items():
        own = own_of(m)
        assert len(got) == min(blocks, own + 1)
        assert own in got
        assert 0 in got
        assert max(got) == own
        if kind == "window":
            near = range(max(1, own - blocks + 2), own + 1)
            assert got == sorted({0, *near})
        if kind == "bigbird":
            half = (blocks - 2) // 2 if own + 1 >= blocks else 0
            assert set(range(max(0, own - half), own + 1)) <= set(got)
    if kind == "strided":
        wide = dataclasses.replace(config, sinks=0, blocks=2)
        for (_, _, m), got in rows_of(route(wide).table).items():
            own = own_of(m)
            if own:  # one other block: a whole stride back, to the start
                assert got == [0, own]


@pytest.mark.parametrize(("kind", "far"), [("strided", {4, 8, 12}), ("bigbird", {15, 14})])
def test_fixed_patterns_begin_where_local_blocks_end(kind, far):
    config = BlockRouterConfig(
        kind=kind, block_q=4, block_kv=4, sinks=0, local=3, budget="blocks", blocks=8
    )
    tiles = TileQueries(jnp.zeros((1, 1, D)), jnp.zeros((1, 1, 1, H)), jnp.array([[19 * 4]]))
    table = BlockRouter(config, 1).apply({}, tiles, KeyBlocks(jnp.zeros((1, 20, 0)))).table
    assert table.counts.tolist() == [[[8]]]
    got = set(table.indices.ravel().tolist())
    assert {16, 17, 18, 19} | far <= got
    assert len(got) == 8


def test_random_blocks_of_bigbird_differ_from_row_to_row_and_stay_the_same():
    config = BlockRouterConfig(
        kind="bigbird", block_q=4, block_kv=4, sinks=0, budget="blocks", blocks=4
    )
    tiles = TileQueries(jnp.zeros((1, 64, D)), jnp.zeros((1, 64, 1, H)), jnp.arange(64)[None] * 4)
    router = BlockRouter(config, 1)
    whole = router.apply({}, tiles, KeyBlocks(jnp.zeros((1, 64, 0)))).table
    far = {tuple(row[:2].tolist()) for row in np.asarray(whole.indices[0, 0, 40:])}
    assert len(far) > 20
    one = tiles._replace(x=tiles.x[:, :1], q=tiles.q[:, :1], starts=tiles.starts[:, 50:51])
    alone = router.apply({}, one, KeyBlocks(jnp.zeros((1, 64, 0)))).table
    np.testing.assert_array_equal(alone.indices[0, 0, 0], whole.indices[0, 0, 50])


@pytest.mark.parametrize("fraction", [0.05, 0.12, 0.25, 0.5])
def test_a_fraction_is_what_is_spent_at_any_length(fraction):
    config = BlockRouterConfig(kind="window", fraction=fraction)
    for blocks in (64, 128, 512):
        own = np.arange(blocks)
        listed = np.asarray(row_limits(config, jnp.asarray(own)[None], blocks))[0, 0]
        spent = listed.sum() / (own + 1).sum()
        assert spent == pytest.approx(fraction, abs=0.01 + 1.5 / blocks)
        assert listed.max() <= config.capacity(blocks)


@pytest.mark.parametrize("kind", ["learned", "clusters", "pooled"])
def test_the_choice_depends_on_no_seed_without_noise_and_on_nothing_else_with(kind):
    budget = "gates" if kind == "learned" else "blocks"
    config = dataclasses.replace(PLAIN, kind=kind, budget=budget, fraction=1.0)
    quiet = [route(config, 4) for _ in range(2)]
    noisy = [route(config, 4, jax.random.key(k)) for k in (7, 7, 8)]
    for pair in (quiet, noisy[:2]):
        jax.tree.map(np.testing.assert_array_equal, *pair)
    differ = np.any(noisy[0].table.counts != noisy[2].table.counts) or np.any(
        noisy[0].table.indices != noisy[2].table.indices
    )
    assert differ == (kind != "pooled")


def test_sums_leave_out_padding_and_earlier_segments():
    x = np.random.default_rng(0).normal(size=(2, 10, 3)).astype(np.float32)
    valid = np.arange(10)[None] < np.array([[10], [6]])
    segments = np.array([[0] * 6 + [1] * 4, [0] * 3 + [2] * 7])
    sums, sizes = block_sums(x, valid, 4, segments)
    for b, j in np.ndindex(2, 3):
        inside = [s for s in range(4 * j, min(4 * j + 4, 10)) if valid[b, s]]
        end = 4 * j + 3
        if end < 10:  # of a block that is not complete nothing is read
            inside = [s for s in inside if segments[b, s] == segments[b, end]]
            np.testing.assert_allclose(sums[b, j], x[b, inside].sum(0), rtol=1e-5, atol=1e-6)
            assert sizes[b, j] == len(inside)


@pytest.mark.parametrize("kind", ["learned", "indexer"])
def test_learned_pooling_weighs_each_token_by_its_direction(kind):
    rng = np.random.default_rng(0)
    x, q = (rng.normal(size=(2, 10, *shape)).astype(np.float32) for shape in ((D,), (K * G, H)))
    valid = np.arange(10)[None] < np.array([[10], [6]])
    config = dataclasses.replace(PLAIN, kind=kind, pooling="learned")
    for direction in (np.zeros(D), rng.normal(size=D), np.full(D, 1e3)):
        params = {"pool": {"direction": direction.astype(np.float32)}}
        weights = BlockRouter(config, K).apply({"params": params}, x, method="weights")
        _, blocks, sums = router_inputs(config, x, q, q[..., :K, :], valid, None, weights)
        exact = np.exp(np.clip(x.astype(float) @ direction, -15, 15)) * valid
        for b, j in np.ndindex(2, 3):
            own = exact[b, 4 * j : 4 * j + 4, None]
            mean = (own * x[b, 4 * j : 4 * j + 4]).sum(0) / max(own.sum(), 1e-30)
            np.testing.assert_allclose(blocks.means[b, j], mean, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(sums[b, j, -1], own.sum(), rtol=1e-4)
        with pytest.raises(ValueError, match=r"weights are not given; blocks.pooling is 'learned'"):
            router_inputs(config, x, q, q[..., :K, :], valid)
        # What is remembered of blocks says as much, where they are complete.
        np.testing.assert_array_equal(means_of_sums(config, sums)[0, :2], blocks.means[0, :2])


@pytest.mark.parametrize("kind", ["pooled", "learned", "clusters"])
def test_overhead_is_small_at_the_sizes_it_is_meant_for(kind):
    """Below 5 % of dense attention's multiply-adds, from 4k tokens up."""
    config = BlockRouterConfig(kind=kind, clusters=16)
    for length in (4096, 16384, 65536):
        blocks = length // 64
        work = block_router_work(
            config, tokens=length, tiles=blocks, blocks=blocks, width=512, kv_heads=4, head_dim=128
        )
        dense = 2 * 4 * 128 * 64 * 64 * blocks * (blocks + 1) / 2
        assert float(work) < 0.05 * dense


@pytest.mark.parametrize("kind", ["pooled", "learned"])
def test_work_of_many_long_sequences_is_counted_past_two_thousand_million(kind):
    """In a layer, tiles and tokens are counted on the device, in 32 bits."""
    config = BlockRouterConfig(kind=kind)
    work = functools.partial(
        block_router_work, config, blocks=2048, width=4096, kv_heads=8, head_dim=128
    )
    got = jax.jit(lambda n: work(tokens=64 * n, tiles=n))(jnp.int32(4 * 2048))
    pooled = 64 * 8192 * 1024 + 8192 * 2048 * 1024
    learned = 64 * 8192 * 4096 + 8192 * ((4096 + 2048) * 256 + 4096 * 256)
    assert float(got) == pytest.approx(pooled if kind == "pooled" else learned, rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "clever"}, r"blocks\.kind is 'clever'; accepted: pooled, learned, .*"),
        ({"budget": "all"}, r"blocks\.budget is 'all'; accepted: blocks, .*"),
        ({"pooling": "max"}, r"blocks\.pooling is 'max'; accepted: mean, learned"),
        (
            {"kind": "pooled", "pooling": "learned"},
            r"blocks\.pooling is 'learned', which needs blocks\.kind 'learned' or 'indexer'; it is "
            "'pooled'",
        ),
        ({"fraction": 0.0}, r"blocks\.fraction is 0\.0; it must lie in \(0, 1\]"),
        ({"fraction": 1.5}, r"blocks\.fraction is 1\.5; it must lie in \(0, 1\]"),
        ({"mass": -1.0}, r"blocks\.mass is -1\.0; it must lie in \(0, 1\]"),
        ({"blocks": 1}, r"blocks\.blocks is 1; it must hold .* and the sinks, 2 blocks"),
        ({"blocks": 3, "local": 2}, r"blocks\.blocks is 3; it must hold .*, 4 blocks"),
        ({"local": -1}, r"blocks\.local is -1; it must be at least 0"),
        ({"width": 3}, r"blocks\.width is 3; it must be even, as RoPE turns pairs"),
        ({"block_q": 0}, r"blocks\.block_q is 0; it must be at least 1"),
        ({"block_q": 48}, r"blocks\.block_q is 48; it must divide blocks\.block_kv = 64"),
        ({"clusters": 0}, r"blocks\.clusters is 0; it must be at least 1"),
        ({"sinks": -1}, r"blocks\.sinks is -1; it must be at least 0"),
        ({"temperature": 0.0}, r"blocks\.temperature is 0\.0; it must be above 0"),
        ({"fanout": 1}, r"blocks\.fanout is 1; it must be 0 or at least 2"),
        (
            {"budget": "gates", "kind": "pooled"},
            r".*'indexer' or 'random' or 'window'; it is 'pooled'",
        ),
        ({"budget": "mass", "kind": "window"}, r".*'pooled' or 'learned' or 'indexer'; it is .*"),
        ({"fanout": 4, "kind": "clusters"}, r"blocks\.fanout is 4; it needs .*"),
        ({"kind": "indexer", "distil": 1.5}, r"blocks\.distil is 1\.5; it must lie in \[0, 1\]"),
        ({"distil": 1.0}, r"blocks\.distil needs blocks\.kind 'indexer'; it is 'learned'"),
    ],
)
def test_a_bad_field_is_named(fields, said):
    with pytest.raises(ValueError, match=rf"^{said}\.$"):
        BlockRouterConfig(**fields)
