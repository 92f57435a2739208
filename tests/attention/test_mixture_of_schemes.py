"""Mixed schemes: what each computes, skipping equals masking, decode reads its part alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.attention import (
    FullAttention,
    HeadsConfig,
    LayerCache,
    MixtureOfSchemes,
    mixture_of_schemes,
    scheme_cost,
    scheme_heads,
)
from routing_jax.attention.mixture_of_schemes import decode_schemes
from routing_jax.attention.nested_heads import head_basis
from routing_jax.kernels.decode import contiguous
from routing_jax.models import DecoderConfig, count_params, init_params
from routing_jax.routers import Routing, SchemesConfig

B, T, D, N, H = 3, 32, 12, 6, 4
HEADS = HeadsConfig(N, N, H)
COUNTS = (6, 2, 1)
FULL = np.tile(np.arange(T, dtype=np.int32), (B, 1))
RAGGED = np.where(np.array([[T], [5], [20]]) > FULL, FULL, -1)
SEGMENTS = np.tile(np.repeat(np.arange(3, dtype=np.int32), [13, 3, 16]), (B, 1))
X = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
pytestmark = pytest.mark.usefixtures("compile_cache")


@pytest.fixture(autouse=True)
def skips_from_the_first_pair(monkeypatch):
    monkeypatch.setattr(mixture_of_schemes, "_SKIPS_FROM", 0)


NESTED = pytest.mark.parametrize("nested", [False, True], ids=["own", "nested"])


def mixer(kind, nested, **more):
    return MixtureOfSchemes(HEADS, SchemesConfig(kind=kind, nested=nested, hidden=8, **more))


def make_params(nested, kind="soft"):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(mixer(kind, nested).init, jax.random.key(0), X, FULL)["params"]
    router = shapes.pop("router", {})
    params = {k: rng.normal(size=s.shape) / s.shape[0] ** 0.5 for k, s in shapes.items()}
    if router:  # scores that differ from token to token
        params["router"] = {k: 0.3 * rng.normal(size=s.shape) for k, s in router.items()}
    return jax.tree.map(np.float32, params)


@functools.cache
def runner(kind, nested, mode):
    return jax.jit(
        lambda params, x, positions, segment_ids=None, cache=None, rng=None: mixer(
            kind, nested
        ).apply({"params": params}, x, positions, segment_ids, cache, rng, mode, mutable="routing")
    )


def run(kind, nested, mode, params, *args):
    (y, cache, report), sown = runner(kind, nested, mode)(params, *args)
    return y, cache, report, sown["routing"]["probs"][0]


def alone(params, nested, e, positions):
    """Scheme e for all tokens, by the attention layer that knows nothing of schemes."""
    K = COUNTS[e]
    if nested:

        def pool(w):
            heads = np.einsum("JK,DJH->DKH", head_basis(COUNTS), w)
            return heads.reshape(D, K, N // K, H).mean(2)

        own = {"query": params["query"], "out": params["out"]}
        own |= {"key": pool(params["key"]), "value": pool(params["value"])}
    else:
        q, kv = slice(e * N, (e + 1) * N), slice(sum(COUNTS[:e]), sum(COUNTS[: e + 1]))
        own = {"query": params["query"][:, q], "out": params["out"][q]}
        own |= {"key": params["key"][:, kv], "value": params["value"][:, kv]}
    layer = FullAttention(HeadsConfig(N, K, H))
    return jax.jit(layer.apply)({"params": own}, X, positions)[0]


@NESTED
def test_the_mixture_is_that_of_three_attention_layers(nested):
    params = make_params(nested)
    y, _, _, probs = run("soft", nested, "eval", params, X, FULL)
    assert 0.1 < float(probs.max() - probs.min()) < 1
    schemes = np.stack([alone(params, nested, e, FULL) for e in range(3)], -1)
    want = np.einsum("BTDE,BTE->BTD", schemes, probs)
    np.testing.assert_allclose(y, want, rtol=1e-3, atol=1e-4)
    hard, _, _, probs = run("hard", nested, "masked", params, X, FULL)
    want = np.take_along_axis(schemes, np.argmax(probs, -1)[:, :, None, None], -1)[..., 0]
    np.testing.assert_allclose(hard, want, rtol=1e-3, atol=1e-4)
    average = {name: leaf for name, leaf in params.items() if name != "router"}
    static = run("average", nested, "eval", average, X, FULL)[0]
    np.testing.assert_allclose(static, schemes.mean(-1), rtol=1e-3, atol=1e-4)


def test_small_batches_compute_all_schemes_and_others_skip(monkeypatch):
    params, positions, x = jax.tree.map(jnp.asarray, (make_params(nested=True), FULL, X))
    made = []
    for least in (B * T**2, B * T**2 + 1):
        monkeypatch.setattr(mixture_of_schemes, "_SKIPS_FROM", least)

        def evaluated(x):  # a new function, so that it is traced again
            return mixer("hard", nested=True).apply({"params": params}, x, positions)[0]

        made.append((" cond[" in str(jax.make_jaxpr(evaluated)(x)), jax.jit(evaluated)(x)))
    assert [skips for skips, _ in made] == [True, False]
    np.testing.assert_allclose(made[0][1], made[1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("nested", "segment_ids"), [(False, None), (True, SEGMENTS)], ids=["own", "nested, segments"]
)
def test_computing_one_scheme_a_token_equals_masking(nested, segment_ids):
    base = make_params(nested)
    seen = set()
    for lean in (None, 0, 1, 2):  # towards one scheme, so that counts reach every capacity
        params = base
        if lean is not None:
            out = base["router"]["out"].copy()
            hidden = np.abs(base["router"]["hidden"])
            out[:, lean] += 1.0
            params = base | {"router": {"hidden": hidden, "out": out}}
        for positions in (FULL, RAGGED):
            masked, _, want, probs = run(
                "hard", nested, "masked", params, X, positions, segment_ids
            )
            skipped, _, got, _ = run("hard", nested, "eval", params, X, positions, segment_ids)
            valid = positions >= 0
            np.testing.assert_allclose(skipped[valid], masked[valid], rtol=1e-3, atol=1e-4)
            assert not np.any(skipped[~valid])
            for a, b in zip(got, want):
                np.testing.assert_array_equal(a, b)
            taken = np.argmax(probs, -1)
            seen |= {int((taken[b][valid[b]] == e).sum()) for b in range(B) for e in range(3)}
    assert {0, 1} & seen
    assert max(seen) > T // 2


def empty_cache(nested):
    stored = scheme_heads(HEADS, SchemesConfig(nested=nested)).projected.num_kv_heads
    assert stored == (6 if nested else 9)
    kv = jnp.zeros((B, T, stored, H))
    return LayerCache(kv, kv)


@pytest.mark.parametrize(("kind", "nested"), [("soft", False), ("hard", False), ("hard", True)])
def test_prefill_and_decode_equal_masking(kind, nested):
    params = make_params(nested, kind)
    start = 10
    want, _, _, probs = run(kind, nested, "masked", params, X, RAGGED)
    prompt = RAGGED[:, :start]
    y, cache, _, _ = run(kind, nested, "prefill", params, X[:, :start], prompt, None,
                         empty_cache(nested))  # fmt: skip
    live = prompt >= 0
    np.testing.assert_allclose(y[live], want[:, :start][live], rtol=1e-3, atol=1e-4)
    mixtures = set()
    for t in range(start, start + 8):
        positions = RAGGED[:, t : t + 1]
        y, cache, _, _ = run(
            kind, nested, "decode", params, X[:, t : t + 1], positions, None, cache
        )
        live = positions[:, 0] >= 0
        np.testing.assert_allclose(y[live, 0], want[live, t], rtol=1e-3, atol=1e-4)
        mixtures.add(len(set(np.argmax(probs[live, t], -1).tolist())))
    assert 2 in mixtures  # two schemes in one step


def test_a_token_reads_no_more_of_the_cache_than_its_scheme_needs():
    params = make_params(nested=True)
    noise = np.random.default_rng(2).normal(size=(B, T, N, H)).astype(np.float32)
    where = FULL[:, 8:9]
    x = np.ones((B, 1, D), np.float32)
    for e, count in enumerate(COUNTS):
        hidden, out = np.ones((D, 8), np.float32), np.zeros((8, 3), np.float32)
        out[:, e] = 1
        leaning = params | {"router": {"hidden": hidden, "out": out}}
        known = LayerCache(jnp.array(noise), jnp.array(noise))
        poisoned = LayerCache(*(kv.at[:, :, count:].set(jnp.nan) for kv in known[:2]))
        plain, _, report, _ = run("hard", True, "decode", leaning, x, where, None, known)
        cut = run("hard", True, "decode", leaning, x, where, None, poisoned)[0]
        assert float(report.kv_cost) == pytest.approx(count / N)
        np.testing.assert_array_equal(cut, plain)


@NESTED
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_decoding_through_pages_equals_decoding_by_xla(kind, nested, monkeypatch):
    rng = np.random.default_rng(3)
    heads = scheme_heads(HEADS, SchemesConfig(nested=nested))
    q, *kv = (
        rng.normal(size=(B, length, count, H)).astype(np.float32)
        for length, count in (
            (1, heads.projected.num_heads),
            *[(T, heads.projected.num_kv_heads)] * 2,
        )
    )
    positions = np.array([[T - 1], [-1], [5]], np.int32)
    gates = rng.dirichlet(np.ones(3), (B, 1)).astype(np.float32)
    if kind == "hard":
        gates = np.eye(3, dtype=np.float32)[[0, 1, 2], None]
    found = []
    for implementation in ("xla", "paged"):
        monkeypatch.setattr(contiguous, "_default", lambda *_, name=implementation: name)
        decode = jax.jit(lambda q, kv, *args: decode_schemes(q, LayerCache(*kv), *args, heads))
        found.append(np.asarray(decode(q, kv, positions, gates)))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)
    assert not found[1][1].any()
    assert found[1][0].any()


@NESTED
def test_spread_heads_are_those_of_each_scheme_one_for_each_query_head(nested):
    heads = scheme_heads(HEADS, SchemesConfig(nested=nested))
    K = heads.projected.num_kv_heads
    x = np.random.default_rng(2).normal(size=(B, T, K, H)).astype(np.float32)
    parts = [np.repeat(heads.keys(x, e), N // count, axis=2) for e, count in enumerate(COUNTS)]
    got = heads.spread(x)
    np.testing.assert_allclose(got, np.concatenate(parts, axis=2), rtol=1e-5, atol=1e-5)


@NESTED
def test_no_gradient_reaches_back_from_later_tokens(nested):
    params = make_params(nested)

    def outputs(x):
        args = (params, x, FULL[:1, :8], None, None, jax.random.key(0))
        return runner("hard", nested, "train")(*args)[0][0][0].sum(-1)

    size = np.abs(np.asarray(jax.jit(jax.jacobian(outputs))(X[:1, :8]))).sum((1, 3))
    np.testing.assert_array_equal(size > 0, np.tri(8, dtype=bool))


@NESTED
def test_training_gives_every_scheme_and_the_router_a_gradient(nested):
    def loss(params):
        args = (params, X, FULL, None, None, jax.random.key(0))
        return jnp.sum(runner("hard", nested, "train")(*args)[0][0] ** 2)

    for path, leaf in jax.tree.leaves_with_path(jax.grad(loss)(make_params(nested))):
        assert np.any(np.asarray(leaf) != 0), path


@NESTED
@pytest.mark.parametrize("kind", ["soft", "hard", "average"])
def test_cost_counts_the_work_and_the_bytes(kind, nested):
    logits = jax.random.normal(jax.random.key(2), (B, T, 3))
    schemes = SchemesConfig(kind=kind, nested=nested, hidden=8)

    def report(logits):
        routing = Routing(jnp.argmax(logits, -1), jax.nn.softmax(logits), logits)
        return scheme_cost(routing, RAGGED, SEGMENTS, N, H, schemes, D)

    best = np.argmax(logits, -1)
    work = dense = read = dense_read = tokens = dearest = 0
    slope = np.zeros((B, T, 3))
    for b, t in np.ndindex(B, T):
        if RAGGED[b, t] < 0:
            continue
        tokens += 1
        pairs = sum(SEGMENTS[b, s] == SEGMENTS[b, t] for s in range(t + 1))
        dense += pairs * 2 * N * H
        dense_read += pairs * N
        taken = [int(best[b, t])] if kind == "hard" else [0, 1, 2]
        work += sum(pairs * 2 * N * H for _ in taken)
        read += sum(pairs * COUNTS[e] for e in taken)
        slope[b, t] = [pairs * K for K in COUNTS]
        work += 0 if kind == "average" else D * 8 + 8 * 3
        work += 2 * (6 * 6 + 2 * 2) * H if nested else 0  # keys, values of MHA and of GQA
        dearest += int(0 in taken)
    got = report(logits)
    assert float(got.cost) == pytest.approx(work / dense, rel=1e-5)
    assert float(got.kv_cost) == pytest.approx(read / dense_read, rel=1e-5)
    if kind == "hard":
        assert float(got.usage) == pytest.approx(dearest / tokens, rel=1e-5)
    probs, pull = jax.vjp(jax.nn.softmax, logits)
    want = pull(jnp.asarray(slope / dense_read, jnp.float32))[0] if kind == "hard" else 0 * probs
    np.testing.assert_allclose(
        jax.grad(lambda z: report(z).kv_cost)(logits), want, rtol=1e-3, atol=1e-8
    )


@pytest.mark.parametrize(("kind", "want"), [("average", 10_139_136), ("soft", 10_287_744)])
def test_the_published_models_have_as_many_parameters_as_published(kind, want):
    config = DecoderConfig(
        vocab_size=283, width=384, layers="schemes*4", num_heads=6, num_kv_heads=6, head_dim=64,
        mlp="gelu", mlp_width=1536, rope_theta=0.0, norm="layer", tie_embeddings=True,
        schemes=SchemesConfig(kind=kind),
    )  # fmt: skip
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert count_params(shapes) == want
    assert f"{want / 1e6:.2f}" in ("10.14", "10.29")
