"""Routed convolution/attention: skipping equals masking, nothing runs for nothing, cost counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.attention import HeadsConfig, LayerCache, RoutedConv, routed_conv_cost
from routing_jax.routers import Routing, TokenRouter, TokenRouterConfig

B, T, D, W = 3, 64, 8, 3  # capacities 0, 8, 12, 16, 64
HEADS = HeadsConfig(num_heads=4, num_kv_heads=2, head_dim=4)
ROUTER = TokenRouterConfig(hidden=4, summary=3)
MIXER = RoutedConv(HEADS, ROUTER, W)
LENGTHS = np.array([[T], [5], [40]])
FULL = np.tile(np.arange(T, dtype=np.int32), (B, 1))
RAGGED = np.where(LENGTHS > FULL, FULL, -1)
SEGMENTS = np.tile(np.repeat(np.arange(4, dtype=np.int32), [20, 3, 25, 16]), (B, 1))

apply = jax.jit(
    lambda params, x, positions, segment_ids, mode, rng=None: MIXER.apply(
        {"params": params}, x, positions, segment_ids, None, rng, mode
    ),
    static_argnums=4,
)
decode = jax.jit(
    lambda params, x, positions, cache: MIXER.apply(
        {"params": params}, x, positions, None, cache, None, "decode"
    )
)


def make_params(mixer, x, positions):
    """From numpy, as compiling an initialiser takes longer than the rest of a test."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(mixer.init, jax.random.key(0), x, positions)["params"]
    router = shapes.pop("router", {})
    params = {k: rng.normal(size=s.shape) / s.shape[0] ** 0.5 for k, s in shapes.items()}
    if router:  # scores that differ from token to token
        params["router"] = {k: rng.normal(size=s.shape) * (s.ndim > 0) for k, s in router.items()}
    return jax.tree.map(np.float32, params)


@pytest.fixture(scope="module")
def inputs():
    x = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
    return make_params(MIXER, x, FULL), x


def with_bias(params, bias):
    return {**params, "router": {**params["router"], "bias": jnp.float32(bias)}}


def routing_most(params, x, positions, segment_ids, fullest):
    """Parameters with which the row that has most routed tokens has `fullest` of them."""
    if fullest in (0, T):
        return with_bias(params, 1e4 if fullest else -1e4)
    router = with_bias(params, 0.0)["router"]
    valid = positions >= 0
    scored = TokenRouter(ROUTER).apply({"params": router}, x, positions, segment_ids=segment_ids)
    ranked = -np.sort(-np.where(valid, scored.routing.logits, -1e3), axis=1)
    return with_bias(params, -ranked[:, fullest - 1 : fullest + 1].max(0).mean())


@pytest.mark.parametrize("positions", [FULL, RAGGED], ids=["whole", "ragged"])
@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["one segment", "segments"])
def test_skipping_equals_masking_at_every_capacity(inputs, segment_ids, positions):
    params, x = inputs
    for fullest in (0, 1, 8, 9, 13, 17, T):
        routed = routing_most(params, x, positions, segment_ids, fullest)
        masked, _, want = apply(routed, x, positions, segment_ids, "masked")
        skipped, _, got = apply(routed, x, positions, segment_ids, "eval")
        assert got.choice.sum(axis=1).max() == fullest
        valid = positions >= 0
        np.testing.assert_allclose(skipped[valid], masked[valid], rtol=1e-4, atol=1e-5)
        for a, b in zip(got, want):
            np.testing.assert_array_equal(a, b)


def test_the_gate_picks_attention_or_convolution(inputs):
    params, x = inputs
    mixed, _, report = apply(with_bias(params, 0.0), x, FULL, None, "masked")
    attention = apply(with_bias(params, 1e4), x, FULL, None, "masked")[0]
    convolution = apply(with_bias(params, -1e4), x, FULL, None, "masked")[0]
    assert 0 < report.choice.sum() < B * T
    want = np.where(report.choice[:, :, None], attention, convolution)
    np.testing.assert_allclose(mixed, want, rtol=1e-5, atol=1e-6)


def poisoned(params, names=("query", "key", "value", "out")):
    return {k: v * jnp.nan if k in names else v for k, v in params.items()}


def test_a_layer_without_a_routed_token_does_no_attention(inputs):
    params, x = inputs
    closed = with_bias(params, -1e4)
    skipped = apply(poisoned(closed), x, FULL, None, "eval")[0]
    np.testing.assert_array_equal(skipped, apply(closed, x, FULL, None, "eval")[0])
    # The poison would have been seen.
    assert np.all(np.isnan(apply(poisoned(closed), x, FULL, None, "masked")[0]))


def test_attention_runs_for_the_routed_tokens_only(inputs):
    params, x = inputs
    routed = routing_most(params, x, FULL, None, 9)
    y, _, report = apply(poisoned(routed, ("query",)), x, FULL, None, "eval")
    np.testing.assert_array_equal(np.isnan(y).all(-1), report.choice)
    np.testing.assert_array_equal(np.isnan(y).any(-1), report.choice)


def empty_cache():
    kv = jnp.zeros((B, T, HEADS.num_kv_heads, HEADS.head_dim))
    return LayerCache(kv, kv, jnp.zeros((B, W - 1, D)), jnp.zeros((B, ROUTER.summary)))


def test_decode_step_by_step_equals_masking(inputs):
    params, x = inputs
    routed = routing_most(params, x, RAGGED, None, 30)
    want, _, report = apply(routed, x, RAGGED, None, "masked")
    cache, kinds = empty_cache(), set()
    for t in range(T):
        positions = RAGGED[:, t : t + 1]
        y, cache, _ = decode(routed, x[:, t : t + 1], positions, cache)
        live = positions[:, 0] >= 0
        np.testing.assert_allclose(y[live, 0], want[live, t], rtol=1e-4, atol=1e-5)
        kinds.add(int(report.choice[:, t].sum()))
    assert kinds >= {0, 1, 2}  # steps without, with some and with other routed samples


def test_decode_of_unrouted_tokens_keeps_keys_and_attends_to_nothing(inputs):
    params, x = inputs
    closed, cache = with_bias(params, -1e4), empty_cache()
    bad = cache._replace(keys=cache.keys * jnp.nan, values=cache.values * jnp.nan)
    y, new, _ = decode(closed, x[:, :1], FULL[:, 5:6], bad)
    assert np.all(np.isfinite(y))
    np.testing.assert_array_equal(
        np.isfinite(new.keys).all((2, 3)), np.arange(T)[None] == [[5]] * B
    )


def products(jaxpr, length, inside=False):
    """For each product of a program over so many keys, whether a condition decides on it."""
    for eqn in jaxpr.eqns:
        shapes = [operand.aval.shape for operand in eqn.invars]
        if eqn.primitive.name == "dot_general" and any(length in shape for shape in shapes):
            yield inside
        branches = eqn.params.get("branches", ())
        parts = branches or [p for p in eqn.params.values() if hasattr(p, "jaxpr")]
        for part in parts:
            yield from products(part.jaxpr, length, inside or bool(branches))


def test_decode_reads_its_cache_in_a_branch_only(inputs):
    params, x = inputs
    traced = jax.make_jaxpr(decode)(params, x[:, :1], FULL[:, :1], empty_cache())
    assert list(products(traced.jaxpr, T)) == [True, True]


def routed_cost(logits, positions, segment_ids):
    probs = jax.nn.sigmoid(logits)
    routing = Routing((probs > 0.5) & (positions >= 0), probs, logits)
    return routed_conv_cost(routing, positions, segment_ids, HEADS, ROUTER, W, D)


@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["one segment", "segments"])
def test_cost_counts_the_work_and_its_gradient_the_soft_work(segment_ids):
    logits = jax.random.normal(jax.random.key(2), (B, T))
    report = routed_cost(logits, RAGGED, segment_ids)
    soft = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    N, H, K = HEADS.num_heads, HEADS.head_dim, HEADS.num_kv_heads
    attend = dense = other = tokens = routed = 0
    pairs = np.zeros((B, T))
    for b, t in np.ndindex(B, T):
        if RAGGED[b, t] < 0:
            continue
        tokens += 1
        for s in range(t + 1):
            if segment_ids is None or segment_ids[b, s] == segment_ids[b, t]:
                pairs[b, t] += 1
                dense += N * H + N * H  # a score and a weighted value
                attend += (N * H + N * H) * (soft[b, t] > 0.5)
        routed += soft[b, t] > 0.5
        other += W * D  # taps
        R, hidden = ROUTER.summary, ROUTER.hidden
        other += D * R + R + (D + 1) * hidden + hidden  # bins, count, hidden layer, score
    assert float(report.cost) == pytest.approx((attend + other) / dense, rel=1e-5)
    assert float(report.kv_cost) == pytest.approx(attend / dense * K / N, rel=1e-5)
    assert float(report.usage) == pytest.approx(routed / tokens, rel=1e-6)

    entropy = -soft * np.log(soft) - (1 - soft) * np.log(1 - soft)
    assert float(report.aux) == pytest.approx(-entropy[RAGGED >= 0].mean(), rel=1e-5)

    slope = soft * (1 - soft)
    shares = {
        "cost": pairs * 2 * N * H / dense,
        "kv_cost": pairs * 2 * N * H / dense * K / N,
        "usage": (RAGGED >= 0) / tokens,
    }
    for name, share in shares.items():
        got = jax.grad(lambda x: getattr(routed_cost(x, RAGGED, segment_ids), name))(logits)  # noqa: B023
        np.testing.assert_allclose(got, slope * share, rtol=1e-4, atol=1e-9)


def test_cost_of_a_long_wide_layer_does_not_overflow():
    positions = jnp.arange(1 << 17, dtype=jnp.int32)[None]
    routing = Routing(positions < 0, jnp.zeros(positions.shape), jnp.zeros(positions.shape))
    heads, router, width = HeadsConfig(32, 8, 128), TokenRouterConfig(), 4096
    report = routed_conv_cost(routing, positions, None, heads, router, 4, width)
    tokens = positions.size
    dense = tokens * (tokens + 1) / 2 * 2 * 32 * 128
    want = tokens * (width * 16 + 16 + 4 * width) / dense
    assert float(report.cost) == pytest.approx(want, rel=1e-3)


def test_training_draws_its_gates_and_reports_them_without_noise(inputs):
    params, x = inputs
    routed = with_bias(params, 0.0)
    one, two = (apply(routed, x, FULL, None, "train", jax.random.key(s)) for s in (0, 1))
    quiet = apply(routed, x, FULL, None, "masked", jax.random.key(0))
    assert np.any(one[2].choice != two[2].choice)
    np.testing.assert_array_equal(quiet[2].choice, apply(routed, x, FULL, None, "eval")[2].choice)
    # What it reports is what the layer would spend without noise.
    for _, _, report in (one, two, quiet):
        assert float(report.usage) == pytest.approx(float(quiet[2].choice.mean()), rel=1e-6)
        assert float(report.cost) == float(quiet[2].cost)


def test_training_gives_both_branches_and_the_router_a_gradient(inputs):
    params, x = inputs

    def loss(params):
        return jnp.sum(apply(params, x, FULL, None, "train", jax.random.key(0))[0] ** 2)

    for path, leaf in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(with_bias(params, 0.0))):
        assert np.any(np.asarray(leaf) != 0), path
