"""Block-routed attention: no router peeks, decoding repeats prefill, cost counts what runs."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.attention import (
    BlockRouted,
    FullAttention,
    HeadsConfig,
    LayerCache,
    block_routed_cost,
    empty_block_memory,
)
from routing_jax.routers import BlockRouterConfig

from ..processes import finish, start_python

pytestmark = pytest.mark.usefixtures("compile_cache")

B, T, D = 2, 22, 8  # the last tile and block are ragged
HEADS = HeadsConfig(num_heads=4, num_kv_heads=2, head_dim=4)
PLAIN = BlockRouterConfig(
    block_q=2, block_kv=4, budget="blocks", blocks=3, width=4, clusters=2, bias=0.0
)
ROUTERS = {
    "pooled": dataclasses.replace(PLAIN, kind="pooled"),
    "pooled, mass": dataclasses.replace(PLAIN, kind="pooled", budget="mass", mass=0.4, fraction=1),
    "learned": PLAIN,
    "learned, gates": dataclasses.replace(PLAIN, budget="gates", fraction=1.0),
    "learned, tree": dataclasses.replace(PLAIN, fanout=2, budget="fraction", fraction=0.8, local=1),
    "learned, weighed": dataclasses.replace(PLAIN, pooling="learned"),
    "indexer": dataclasses.replace(PLAIN, kind="indexer"),
    "indexer, weighed": dataclasses.replace(PLAIN, kind="indexer", pooling="learned"),
    "indexer, gates": dataclasses.replace(PLAIN, kind="indexer", budget="gates", fraction=1.0),
    "clusters": dataclasses.replace(PLAIN, kind="clusters", blocks=4),
    "random": dataclasses.replace(PLAIN, kind="random"),
    "random, gates": dataclasses.replace(PLAIN, kind="random", budget="gates", fraction=1.0),
    "window": dataclasses.replace(PLAIN, kind="window"),
    "window, gates": dataclasses.replace(PLAIN, kind="window", budget="gates", fraction=1.0),
    "strided": dataclasses.replace(PLAIN, kind="strided", blocks=4),
    "bigbird": dataclasses.replace(PLAIN, kind="bigbird", blocks=4),
}
# All others are run with the slow tests.
QUICK = ("pooled, mass", "learned, tree", "learned, weighed", "clusters")
EVERY = pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ROUTERS]
)
PLACES = np.tile(np.arange(T, dtype=np.int32), (B, 1))


@functools.cache
def make_params(router):
    """From numpy, as compiling an initialiser takes longer than the rest of a test."""
    rng = np.random.default_rng(1)
    mixer = BlockRouted(HEADS, router)
    shapes = jax.eval_shape(mixer.init, jax.random.key(0), inputs(), PLACES)["params"]
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)
    if router.budget == "gates" and router.kind != "learned":
        for name in ("bias", "slope"):  # a gate's numbers are 32 times these
            if name in params["router"]:
                params["router"][name] /= 32
    return params


def inputs(seed=0):
    return np.random.default_rng(seed).normal(size=(B, T, D)).astype(np.float32)


@functools.cache
def runner(router, mode="eval"):
    """Jitted: (params, x, positions, segment_ids, cache, rng) -> (y, cache, report)."""
    mixer = BlockRouted(HEADS, router)
    return jax.jit(lambda params, *args: mixer.apply({"params": params}, *args, mode=mode))


@EVERY
def test_later_tokens_change_nothing_before_them(name):
    """Not even which blocks are chosen, which no gradient would show."""
    router = ROUTERS[name]
    params, x = make_params(router), inputs()
    noisy = name == "clusters" or "gates" in name
    noise = (None, None, jax.random.key(3)) if noisy else ()
    run = runner(router, "train" if noise else "eval")
    y = run(params, x, PLACES, *noise)[0]
    for t in (1, 3, 4, 9, 16, 21):
        changed = np.where(np.arange(T)[None, :, None] < t, x, 5 * inputs(1) + 1)
        other = run(params, changed, PLACES, *noise)[0]
        np.testing.assert_allclose(other[:, :t], y[:, :t], rtol=1e-5, atol=1e-5)
        assert np.abs(other[:, t] - y[:, t]).max() > 1e-2


@pytest.mark.parametrize(
    "name",
    [n if n == "learned" else pytest.param(n, marks=pytest.mark.slow)
     for n in ROUTERS],
)  # fmt: skip
def test_no_gradient_reaches_back_from_later_tokens(name):
    router = ROUTERS[name]
    params, x = make_params(router), inputs()

    def last(x, t):
        return runner(router)(params, x, PLACES)[0][0, t].sum()

    gradient = jax.jit(jax.grad(last))
    for t in (0, 7, 13):
        size = np.abs(gradient(x, t)[0]).sum(-1)
        assert np.all(size[t + 1 :] == 0)
        assert np.all(size[t - t % 4 : t + 1] > 0)  # its own block
        assert size[:4].max() > 0  # the sink


def fresh_cache(router, batch=B, length=24):
    kv = jnp.zeros((batch, length, HEADS.num_kv_heads, HEADS.head_dim))
    memory = empty_block_memory(router, HEADS, batch, length // router.block_kv, D)
    return LayerCache(kv, kv, memory=memory)


LENGTHS = np.array([9, 4])  # one prompt ends within a tile and a block, the other at their end


@EVERY
def test_decoding_after_prefill_equals_the_whole_sequence(name):
    router = ROUTERS[name]
    params, x = make_params(router), inputs()
    want, _, whole = runner(router)(params, x, PLACES)
    width = LENGTHS.max()
    prompt = np.where(PLACES[:, :width] < LENGTHS[:, None], PLACES[:, :width], -1)
    y, cache, _ = runner(router, "prefill")(params, x[:, :width], prompt, None, fresh_cache(router))
    for b, n in enumerate(LENGTHS):
        np.testing.assert_allclose(y[b, :n], want[b, :n], rtol=1e-4, atol=1e-5)
    rows = np.arange(B)
    for step in range(12):
        at = LENGTHS + step
        positions = at[:, None].astype(np.int32)
        y, cache, report = runner(router, "decode")(
            params, x[rows, at][:, None], positions, None, cache
        )
        np.testing.assert_allclose(y[:, 0], want[rows, at], rtol=1e-4, atol=1e-5)
        assert 0 < float(report.usage) <= 1
    assert 0 < float(whole.usage) < 1


@pytest.mark.parametrize("name", ["learned", "learned, weighed"])
def test_decoding_alone_fills_the_memory_as_prefill_does(name):
    router = ROUTERS[name]
    params, x = make_params(router), inputs()
    _, want, _ = runner(router, "prefill")(params, x, PLACES, None, fresh_cache(router))
    cache = fresh_cache(router)
    for t in range(T):
        _, cache, _ = runner(router, "decode")(
            params, x[:, t : t + 1], PLACES[:, t : t + 1], None, cache
        )
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_finished_row_leaves_its_memory_alone():
    router = ROUTERS["learned"]
    params, x = make_params(router), inputs()
    _, cache, _ = runner(router, "prefill")(params, x[:, :8], PLACES[:, :8], None,
                                            fresh_cache(router))  # fmt: skip
    positions = np.array([[8], [-1]], np.int32)
    y, after, report = runner(router, "decode")(params, x[:, 8:9], positions, None, cache)
    for old, new in zip(jax.tree.leaves(cache), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old[1], new[1])
        assert np.any(old[0] != new[0])
    assert np.all(y[1] == 0)
    assert np.isfinite(report.cost)


def test_segments_that_fill_blocks_are_routed_as_if_alone():
    router = dataclasses.replace(PLAIN, sinks=0, blocks=2, fanout=2)
    params, x = make_params(router), inputs()
    segments = np.repeat([[0, 1]], [12, 10], axis=1).repeat(B, axis=0).astype(np.int32)
    packed = runner(router)(params, x, PLACES, segments)[0]
    parts = [np.roll(x, shift, axis=1) for shift in (0, 10)]  # each segment at the front
    alone = [runner(router)(params, part, PLACES)[0] for part in parts]
    np.testing.assert_allclose(packed[:, :12], alone[0][:, :12], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(packed[:, 12:], alone[1][:, :10], rtol=1e-4, atol=1e-5)


def test_a_block_pools_only_its_last_segment():
    """A boundary inside a block: what stood before it must not decide for what comes after."""
    router = dataclasses.replace(ROUTERS["learned"], sinks=0)
    params, x = make_params(router), inputs()
    segments = np.repeat([[0, 1]], [6, T - 6], axis=1).repeat(B, axis=0).astype(np.int32)
    changed = np.where(np.arange(T)[None, :, None] < 6, 9 * inputs(1), x)
    one, other = (runner(router)(params, v, PLACES, segments)[0] for v in (x, changed))
    np.testing.assert_allclose(one[:, 6:], other[:, 6:], rtol=1e-5, atol=1e-6)
    assert np.abs(one[:, :6] - other[:, :6]).max() > 1


def gradients(router, what, rng=None):
    params, x = make_params(router), inputs()

    def value(params, x):
        y, _, report = runner(router, "train")(params, x, PLACES, None, None, rng)
        return (y**2).sum() if what == "y" else getattr(report, what)

    return jax.jit(jax.grad(value, argnums=(0, 1)))(params, x)


@pytest.mark.parametrize(
    "name",
    [
        "learned, gates",
        "learned, weighed",
        "window, gates",
        "clusters",
        pytest.param("learned, tree", marks=pytest.mark.slow),
        pytest.param("indexer, gates", marks=pytest.mark.slow),
    ],
)
def test_attention_teaches_a_gated_router(name):
    own = gradients(ROUTERS[name], "y")[0]["router"]
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(own))


@pytest.mark.parametrize("name", ["indexer", pytest.param("random", marks=pytest.mark.slow)])
def test_attention_teaches_no_other_router(name):
    own = gradients(ROUTERS[name], "y")[0]["router"]
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(own))


def test_of_random_gates_only_how_many_there_are_is_taught():
    own = gradients(ROUTERS["random, gates"], "cost")[0]["router"]
    assert np.all(own.pop("bias") > 0)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(own))


@pytest.mark.parametrize(
    ("name", "share"), [("indexer", 1.0), ("indexer", 0.5), ("indexer, weighed", 0.5)]
)
def test_distilling_teaches_the_indexer_alone(name, share):
    router = dataclasses.replace(ROUTERS[name], distil=share)
    params, x = gradients(router, "aux", jax.random.key(0))
    own = params.pop("router")
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(own))
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves((params, x)))


@pytest.mark.parametrize("what", ["cost", "usage", "kv_cost", "aux"])
def test_the_penalty_reaches_the_gates_and_no_fixed_budget(what):
    own = gradients(ROUTERS["learned, gates"], what)[0]["router"]
    assert all(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(own))
    bias = own["bias"]
    assert np.all(bias > 0) or what == "aux"  # an open gate costs
    fixed = gradients(ROUTERS["learned"], what)[0]["router"]
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(fixed))


def test_clusters_feel_how_unevenly_they_are_filled():
    own = gradients(ROUTERS["clusters"], "aux")[0]["router"]
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(own))


@pytest.mark.parametrize("name", ["learned, gates", "clusters"])
def test_noise_follows_the_seed_and_stays_out_of_evaluation(name):
    router = ROUTERS[name]
    params, x = make_params(router), inputs()
    keys = [jax.random.key(k) for k in (0, 0, 1)]
    one, same, other = (runner(router, "train")(params, x, PLACES, None, None, k) for k in keys)
    np.testing.assert_array_equal(one[0], same[0])
    assert np.any(one[0] != other[0])
    # Usage is that of the noise-free gate, in training too.
    if name == "learned, gates":
        assert float(one[2].usage) == float(other[2].usage)
    still = [runner(router)(params, x, PLACES, None, None, k)[0] for k in keys]
    np.testing.assert_array_equal(still[0], still[2])
    np.testing.assert_allclose(still[0], runner(router, "masked")(params, x, PLACES)[0], rtol=1e-6)


def test_more_blocks_than_there_are_is_dense_and_says_so():
    router = dataclasses.replace(ROUTERS["pooled"], blocks=7)
    params, x = make_params(router), inputs()
    said = r"^blocks\.blocks is 7; 22 tokens are only 6 blocks of 4: every row is dense\.$"
    with pytest.warns(UserWarning, match=said):
        y, _, report = runner(router)(params, x, PLACES)
    full, _, _ = FullAttention(HEADS).apply({"params": params}, x, PLACES)
    np.testing.assert_allclose(y, full, rtol=1e-4, atol=1e-5)
    assert float(report.usage) == 1


@pytest.mark.filterwarnings("default")
def test_too_many_blocks_are_told_once_for_all_layers_and_calls(recwarn):
    router = dataclasses.replace(ROUTERS["pooled"], blocks=9)
    for _ in range(2):  # layers of a model, and programs of a run
        BlockRouted(HEADS, router).apply({"params": make_params(router)}, inputs(), PLACES)
    assert len([w for w in recwarn if "every row is dense" in str(w.message)]) == 1


def test_a_whole_budget_is_full_attention_but_for_the_gate():
    for kind, budget in (("indexer", "blocks"), ("learned", "fraction")):
        router = dataclasses.replace(PLAIN, kind=kind, budget=budget, blocks=6, fraction=1.0)
        params, x = make_params(router), inputs()
        if kind == "learned":
            params = {**params, "router": {**params["router"], "bias": np.full(2, 60, np.float32)}}
        y, _, report = runner(router)(params, x, PLACES)
        weights = {name: leaf for name, leaf in params.items() if name != "router"}
        full, _, _ = FullAttention(HEADS).apply({"params": weights}, x, PLACES)
        np.testing.assert_allclose(y, full, rtol=1e-4, atol=1e-5)
        assert float(report.usage) == 1


RAGGED = np.array([np.arange(T), np.where(np.arange(T) < 9, np.arange(T), -1)], np.int32)


@pytest.mark.parametrize("name", ["learned", "clusters", "window"])
def test_cost_counts_executed_tiles_and_the_routers_work(name):
    router = ROUTERS[name]
    params, x = make_params(router), inputs()
    mixer = BlockRouted(HEADS, router)
    ask = jax.jit(functools.partial(mixer.apply, mutable=["intermediates"]))
    (_, _, report), sown = ask({"params": params}, x, RAGGED)
    head_usage = np.asarray(sown["intermediates"]["head_usage"][0])
    tile = 2 * router.block_q * router.block_kv * HEADS.head_dim * HEADS.num_heads
    visible = [[m // 2 + 1 for m in range(11)], [m // 2 + 1 for m in range(5)]]
    full = sum(map(sum, visible))
    usage = head_usage.mean()
    work, K, R = 0, HEADS.num_kv_heads, router.feature_width
    if R:
        tokens, rows, blocks = T + 9, 11 + 5, 6
        work = tokens * D + (rows + tokens / 4) * D * K * R + rows * blocks * K * R
    assert float(report.usage) == pytest.approx(usage, rel=1e-6)
    assert float(report.cost) == pytest.approx(usage + work / (full * tile), rel=1e-5)
    assert float(report.kv_cost) == pytest.approx(usage / 2, rel=1e-6)
    if name != "clusters":  # every row has what the budget allows
        want = sum(min(3, v) for row in visible for v in row) / full
        np.testing.assert_allclose(head_usage, want, rtol=1e-6)
    (_, _, none), _ = ask({"params": params}, x, np.full_like(PLACES, -1))
    assert float(none.cost) == float(none.usage) == float(none.kv_cost) == 0


def test_cost_of_a_dense_table_is_one_and_the_router():
    visible = jnp.array([[1, 2, 3]])
    listed = jnp.array([[[1.0, 2.0, 3.0]]])
    report = block_routed_cost(listed, visible, jnp.float32(6 * 64), HeadsConfig(1, 1, 8), 4)
    assert float(report.cost) == 1 + 1
    assert float(report.usage) == float(report.kv_cost) == 1


@pytest.mark.parametrize("budget", ["blocks", "fraction"])
def test_one_sequence_may_be_shorter_than_a_block(budget):
    router = dataclasses.replace(ROUTERS["learned"], budget=budget)
    params = make_params(router)
    y, _, report = runner(router)(params, inputs()[:, :3], PLACES[:, :3])
    weights = {name: leaf for name, leaf in params.items() if name != "router"}
    full = FullAttention(HEADS).apply({"params": weights}, inputs()[:, :3], PLACES[:, :3])[0]
    np.testing.assert_allclose(y, full, rtol=1e-4, atol=1e-5)  # own blocks have no gate
    assert float(report.usage) == 1


def test_a_kernel_that_lacks_the_block_size_says_what_can():
    router = dataclasses.replace(ROUTERS["learned"], implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=r"mosaic_gpu.*xla"):
        BlockRouted(HEADS, router).apply({"params": make_params(router)}, inputs(), PLACES)


ON_EIGHT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from routing_jax.attention import BlockRouted, HeadsConfig
from routing_jax.routers import BlockRouterConfig
from routing_jax.sharding import make_mesh

x = np.random.default_rng(0).normal(size=(4, 22, 8)).astype(np.float32)
places = np.tile(np.arange(22, dtype=np.int32), (4, 1))
kind = sys.argv[1]
router = BlockRouterConfig(kind=kind, block_q=2, block_kv=4, budget="blocks", blocks=3, width=4)
mixer = BlockRouted(HeadsConfig(4, 2, 4), router)
shapes = jax.eval_shape(mixer.init, jax.random.key(0), x, places)
rng = np.random.default_rng(1)
params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)

def value(params, x):
    y, _, report = mixer.apply(params, x, places, mode="train")
    return (y**2).sum(), (y, report.cost)

run = jax.jit(jax.value_and_grad(value, has_aux=True))
alone = run(params, x)
with jax.set_mesh(make_mesh(2, 2, 2)):
    split = run(params, x)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), split, alone)
print(json.dumps([float(alone[0][0]), float(alone[0][1][1])]))
"""


# A table of its own for every head, and one for all.
@pytest.mark.parametrize("kind", ["learned", pytest.param("window", marks=pytest.mark.slow)])
def test_eight_devices_compute_what_one_does(kind):
    ((out, _),) = finish(start_python(ON_EIGHT, kind, devices=8))
    size, cost = json.loads(out)
    assert size > 1
    assert 0 < cost < 1
