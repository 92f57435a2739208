"""Layer routing: full or an oracle's sparse attention by sample, decided by the prompt alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.attention import FullAttention, HeadsConfig, LayerRouted, Prompts
from routing_jax.attention.layer_routed import gated
from routing_jax.generate import decode_step, prefill
from routing_jax.models import Decoder, DecoderConfig, init_params
from routing_jax.routers import LayerRouterConfig, SparseModeConfig

pytestmark = pytest.mark.usefixtures("compile_cache")

B, T, D, BLOCK = 3, 48, 8, 8
HEADS = HeadsConfig(num_heads=4, num_kv_heads=2, head_dim=4)
ROUTER = LayerRouterConfig(pool=3)
SPARSE = SparseModeConfig(sink=8, window=16, last=4, blocks=1, block_q=4, block_kv=BLOCK)
SEARCHING = dataclasses.replace(SPARSE, retrieval="topk", answers="topk")
LENGTHS = np.array([40, 29, 45])
SLOW_TRIANGLE = pytest.param("triangle", marks=pytest.mark.slow)
POSITIONS = np.where(np.arange(T) < LENGTHS[:, None] + 3, np.arange(T), -1).astype(np.int32)
PLACES = jnp.asarray(POSITIONS)
MODEL = DecoderConfig(
    vocab_size=16, width=D, layers="layer*2", num_heads=4, num_kv_heads=2, head_dim=4,
    mlp_width=0, dtype="float32", layer_router=ROUTER, sparse=SPARSE,
)  # fmt: skip


def mixer(sparse="streaming"):
    if isinstance(sparse, str):
        sparse = dataclasses.replace(SPARSE, mode=sparse)
    return LayerRouted(HEADS, ROUTER, sparse)


def random(shapes, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: np.float32(rng.normal(size=s.shape) / max(1, s.shape[0]) ** 0.5), shapes
    )


def start():
    x = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
    shapes = jax.eval_shape(mixer().init, jax.random.key(0), x, POSITIONS)["params"]
    return random(shapes), x


PARAMS, X = start()


@functools.partial(jax.jit, static_argnames=("mode", "sparse"))
def run(choice, lengths, x, mode, sparse):
    prompts = Prompts(lengths, 1.0, choice)
    y, _, report = mixer(sparse).apply(
        {"params": PARAMS}, x, PLACES, None, None, None, mode, prompts
    )
    return y, report


def mix(choice, mode="eval", sparse="streaming", lengths=LENGTHS, x=X):
    choice = None if choice is None else np.array(choice)
    return jax.device_get(run(choice, lengths, x, mode, sparse))


def oracle(visible):
    """Attention in NumPy where query t sees key s if `visible` [B,T,S] says so."""
    turned = {}
    for name in ("query", "key"):
        y = np.einsum("BTD,DNH->BTNH", X, PARAMS[name])
        turns = np.exp(1j * POSITIONS[:, :, None] * 10_000.0 ** (-np.arange(2) / 2))[:, :, None]
        pairs = (y[..., :2] + 1j * y[..., 2:]) * turns
        turned[name] = np.concatenate([pairs.real, pairs.imag], axis=-1)
    keys = turned["key"].repeat(2, axis=2)
    values = np.einsum("BTD,DNH->BTNH", X, PARAMS["value"]).repeat(2, axis=2)
    scores = np.einsum("BTNH,BSNH->BNTS", turned["query"], keys) / 2
    scores = np.where(visible[:, None], scores, -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("BNTS,BSNH,NHD->BTD", weights, values, PARAMS["out"])


def test_each_sample_attends_as_it_is_routed():
    t, s = np.arange(T)[:, None], np.arange(T)[None]
    near = (t // BLOCK - s // BLOCK < 2) | (s < BLOCK)
    choice = np.array([True, False, False])
    visible = (s <= t) & (near | choice[:, None, None])
    got, report = mix(choice)
    valid = POSITIONS >= 0
    np.testing.assert_allclose(got[valid], oracle(visible)[valid], rtol=1e-4, atol=1e-5)
    assert report.usage == pytest.approx(1 / 3)
    np.testing.assert_array_equal(report.choice, valid & choice[:, None])


@pytest.mark.parametrize("sparse", ["streaming", SLOW_TRIANGLE, "topk"])
def test_skipping_is_masking(sparse):
    choice = [True, False, False]
    (skipped, report), (masked, other) = (mix(choice, m, sparse) for m in ("eval", "masked"))
    valid = POSITIONS >= 0
    np.testing.assert_allclose(skipped[valid], masked[valid], rtol=1e-4, atol=1e-5)
    assert report.cost == other.cost < 1.5


def test_full_is_full_attention_and_costs_what_it_costs():
    params = {name: PARAMS[name] for name in ("query", "key", "value", "out")}
    want, _, _ = FullAttention(HEADS).apply({"params": params}, X, POSITIONS)
    full, spent = mix([True] * 3)
    _, saved = mix([False] * 3)
    valid = POSITIONS >= 0
    np.testing.assert_allclose(full[valid], np.asarray(want)[valid], rtol=1e-4, atol=1e-5)
    # Tiles of 4 queries and 8 keys: what a token at t sees fully, and in sink and window.
    tiles = [np.arange(0, length + 3, 4) // BLOCK + 1 for length in LENGTHS]
    seen = sum(tile.sum() for tile in tiles)
    near = sum(np.minimum(tile, 3).sum() for tile in tiles)
    work = B * ROUTER.work(4, 4) / (seen * 4 * BLOCK * 2 * 4 * 4)
    assert spent.cost == pytest.approx(1 + work, rel=1e-5)
    assert saved.cost == pytest.approx(near / seen + work, rel=1e-5)
    assert saved.kv_cost == pytest.approx(near / seen / 2, rel=1e-5)
    assert (spent.usage, saved.usage) == (1, 0)


def test_tokens_that_search_each_for_itself_cost_what_they_find():
    choice = np.array([True, False, True])  # the second streams
    _, report = mix(choice, sparse=SEARCHING)
    visits = work = seen = 0
    for length, searches in zip(LENGTHS, choice):
        for start in range(0, length + 3, 4):
            blocks = start // BLOCK + 1
            seen += blocks
            if not searches:
                visits += min(blocks, 3)  # sink and window
            elif start < length:  # and one more; the prompt's last tokens see everything
                visits += blocks if start + 4 > length - SPARSE.last else min(blocks, 4)
        for place in range(length, length + 3) if searches else ():
            blocks = place // BLOCK + 1
            visits += min(blocks, 4) / 4  # a query of a tile's four
            work += blocks * BLOCK * 2 * 4  # two channels of each key, for four heads
    work += B * (ROUTER.work(4, 4) + T // 4 * T * 2 * 4)
    expected = visits / seen + work / (seen * 4 * BLOCK * 2 * 4 * 4)
    assert report.cost == pytest.approx(expected, rel=1e-5)
    assert report.kv_cost == pytest.approx(visits / seen / 2, rel=1e-5)


def test_only_the_prompt_decides():
    _, report = mix(None)
    chosen = report.choice[:, 0]
    changed = np.where(np.arange(T)[:, None] < LENGTHS[:, None, None], X, -X)
    assert (mix(None, x=changed)[1].choice[:, 0] == chosen).all()

    # The auxiliary loss follows from the scores.
    same, other = (
        [mix(None, lengths=lengths, x=x)[1].aux for x in (X, changed)]
        for lengths in (LENGTHS, LENGTHS + 2)
    )
    assert same[0] == same[1]
    assert other[0] != other[1]


def test_a_prompt_of_which_sparse_attention_sees_everything_is_attended_fully():
    sparse = dict(PARAMS["router"], bias=np.array([100.0, -100.0], np.float32))
    lengths = jnp.array([24, 25, 10])  # sink and window are 24 tokens

    def choices(mode, given=None):
        params = {"params": PARAMS | {"router": sparse}}
        rng, prompts = jax.random.key(0), Prompts(lengths, 1.0, given)
        apply = jax.jit(mixer().apply, static_argnums=6)
        report = apply(params, X, PLACES, None, None, rng, mode, prompts)[2]
        return report.choice[:, 0].tolist()

    assert choices("eval") == [True, False, True]
    assert choices("train") == [False] * 3  # where routers are taught
    assert choices("eval", jnp.zeros(B, bool)) == [False] * 3  # where no router is asked


def test_training_passes_the_choice_forward_and_the_gate_backward():
    def loss(router, rng):
        params = {"params": PARAMS | {"router": router}}
        prompts = Prompts(jnp.array(LENGTHS), 1.5)
        y, _, report = mixer().apply(params, X, PLACES, None, None, rng, "train", prompts)
        return jnp.sum(y**2), (y, report)

    def cost(router):
        return mixer().apply({"params": PARAMS | {"router": router}}, X, PLACES)[2].cost

    router = PARAMS["router"]
    grads, (y, report) = jax.jit(jax.grad(loss, has_aux=True))(router, jax.random.key(3))
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    hard, _ = mix(report.choice[:, 0])
    valid = POSITIONS >= 0
    np.testing.assert_allclose(np.asarray(y)[valid], hard[valid], rtol=1e-4, atol=1e-5)
    spent = jax.jit(jax.grad(cost))(router)
    assert spent["bias"][1] > 0 > spent["bias"][0]


def test_training_has_the_gradient_of_both_branches_weighed_by_the_gate():
    def training(x, router, rng):
        params = {"params": PARAMS | {"router": router}}
        prompts = Prompts(jnp.array(LENGTHS), 1.5)
        (y, _, report), sown = mixer().apply(
            params, x, PLACES, None, None, rng, "train", prompts, mutable=["intermediates"]
        )
        return jnp.sum(jnp.sin(y)), (sown["intermediates"]["gate"][0], report.choice[:, 0])

    def mixture(x, gate):
        full, sparse = (run(jnp.full(B, dense), LENGTHS, x, "eval", "streaming")[0]
                        for dense in (True, False))  # fmt: skip
        weight = gate[:, None, None]
        return jnp.sum(jnp.sin(weight * full + (1 - weight) * sparse))

    # A bias of 0, so that the noise sends samples both ways.
    router, rng = PARAMS["router"] | {"bias": np.zeros(2, np.float32)}, jax.random.key(6)
    got, (gate, choice) = jax.jit(jax.grad(training, argnums=(0, 1), has_aux=True))(X, router, rng)
    assert 0 < choice.sum() < B
    by_input, by_gate = jax.jit(jax.grad(mixture, argnums=(0, 1)))(X, gate)
    np.testing.assert_allclose(got[0], by_input, rtol=1e-3, atol=1e-5)
    assert jnp.abs(by_gate).min() > 1e-3

    def gates(router):
        return training(X, router, rng)[1][0]

    (by_router,) = jax.jit(lambda router: jax.vjp(gates, router)[1](by_gate))(router)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, got[1], by_router)


def test_a_gates_gradient_survives_sixteen_bits():
    """Branches that differ little: of their own two sums, in bfloat16, no difference is left."""
    shape, rng = (1, 512, 1, 4), np.random.default_rng(0)
    full, cotangent = (jnp.bfloat16(1 + rng.random(shape) / 8) for _ in range(2))
    sparse = full * jnp.bfloat16(1 - 2**-7)

    def loss(gate):
        y = gated(full, sparse, jnp.array([True]), gate)
        return jnp.sum(y.astype(jnp.float32) * cotangent.astype(jnp.float32))

    want = np.sum((np.float64(full) - np.float64(sparse)) * np.float64(cotangent))
    np.testing.assert_allclose(jax.grad(loss)(jnp.ones(1)), [want], rtol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"retrieval": "topk"},
        {"retrieval": "topk", "answers": "topk"},
        pytest.param({"mode": "triangle"}, marks=pytest.mark.slow),
        pytest.param({"mode": "topk", "answers": "topk"}, marks=pytest.mark.slow),
        pytest.param(
            {"mode": "triangle", "retrieval": "topk", "answers": "topk"}, marks=pytest.mark.slow
        ),
    ],
)
def test_prefill_decides_and_decoding_obeys(changes):
    config = MODEL.replace(sparse=dataclasses.replace(SPARSE, **changes))
    params = random(jax.eval_shape(lambda: init_params(config, jax.random.key(0))), 10)
    for layer in ("layers_0", "layers_1"):  # what all prompts share says nothing
        router = params[layer]["block_0"]["mixer"]["router"]
        for bias in (
            router["bias"],
            router["shift"],
            *(router[f"hidden_{i}"]["bias"] for i in range(4)),
        ):
            bias[:] = 0
        router["scale"][:] = 1
    tokens = np.random.default_rng(2).integers(0, 16, (B, T), dtype=np.int32)
    steps = 3

    whole = jax.jit(Decoder(config).apply)(
        {"params": params}, tokens, PLACES, prompts=Prompts(jnp.array(LENGTHS))
    )
    choice = whole.reports.choice[:, :, 0]
    assert (choice.sum(axis=1) > 0).all()
    assert (choice.sum(axis=1) < B).all()
    prompt = np.where(np.arange(T) < LENGTHS[:, None], tokens, 0)
    logits, cache = jax.jit(lambda t: prefill(config, params, t, jnp.array(LENGTHS), T + 5))(prompt)
    step = jax.jit(lambda token, cache: decode_step(config, params, token, cache))
    rows = np.arange(B)
    for i in range(steps):
        want = whole.logits[rows, LENGTHS - 1 + i]
        np.testing.assert_allclose(logits, want, rtol=2e-4, atol=2e-4)
        logits, cache = step(tokens[rows, LENGTHS + i], cache)
    assert [layer.memory.dense.tolist() for layer in cache.layers] == choice.tolist()


def test_choices_reach_their_layers_with_and_without_scan():
    params = random(jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0))), 5)
    stacked = {k: v for k, v in params.items() if not k.startswith("layers_")}
    layers = [params["layers_0"], params["layers_1"]]
    stacked["layers"] = jax.tree.map(lambda *p: np.stack(p), *layers)
    tokens = np.random.default_rng(2).integers(0, 16, (B, T), dtype=np.int32)
    choice = jnp.array([[True, False, False], [False, False, True]])
    outs = [
        jax.jit(Decoder(config).apply)(
            {"params": p}, tokens, PLACES, prompts=Prompts(jnp.array(LENGTHS), 1.0, choice)
        )
        for config, p in ((MODEL, params), (MODEL.replace(scan=True, remat=True), stacked))
    ]
    for out in outs:
        assert (out.reports.choice[:, :, 0] == choice).all()
    np.testing.assert_allclose(outs[0].logits, outs[1].logits, rtol=1e-4, atol=1e-5)


def test_packed_sequences_are_refused():
    with pytest.raises(ValueError, match="segment_ids are given; layer routing takes one sequence"):
        mixer().apply({"params": PARAMS}, X, PLACES, np.zeros((B, T), np.int32))
