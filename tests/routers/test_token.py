"""The token router: what it chooses, what it remembers, what it costs and what it refuses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from routing_jax.routers import TokenRouter, TokenRouterConfig, seen_before

B, T, D = 2, 11, 6


def make_router(seed=0, bias=0.0, **fields):
    """A router with weights large enough that tokens differ, and its inputs."""
    config = TokenRouterConfig(hidden=4, bias=bias, **fields)
    x = jax.random.normal(jax.random.key(seed), (B, T, D))
    places = jnp.arange(T)[None]
    positions = jnp.where(places < jnp.array([[T], [T - 4]]), places, -1)
    params = TokenRouter(config).init(jax.random.key(1), x, positions)
    scaled = {k: 30 * p if k in ("hidden", "out") else p for k, p in params["params"].items()}
    return TokenRouter(config), {"params": scaled}, x, positions


@pytest.mark.parametrize("summary", [0, 3])
def test_without_noise_the_choice_is_the_threshold_of_the_probabilities(summary):
    router, params, x, positions = make_router(summary=summary)
    routing, gate, _ = router.apply(params, x, positions)
    valid = np.asarray(positions) >= 0
    np.testing.assert_array_equal(routing.choice, (np.asarray(routing.probs) > 0.5) & valid)
    np.testing.assert_array_equal(gate, np.asarray(routing.choice, np.float32))
    assert 0 < np.sum(routing.choice) < np.sum(valid)


@pytest.mark.parametrize("kind", ["learned", "random"])
def test_padding_is_never_chosen(kind):
    router, params, x, positions = make_router(kind=kind, bias=50.0, usage=0.9)
    routing, gate, _ = router.apply(params, x, positions, jax.random.key(0))
    valid = np.asarray(positions) >= 0
    assert not np.any(routing.choice & ~valid)
    assert np.all(np.asarray(gate)[~valid] == 0)
    assert np.any(routing.choice)


def test_the_bias_alone_opens_or_closes_every_gate():
    for bias in (-100.0, 100.0):
        router, params, x, positions = make_router(bias=bias)
        choice = np.asarray(router.apply(params, x, positions)[0].choice)
        np.testing.assert_array_equal(choice, (np.asarray(positions) >= 0) & (bias > 0))


def test_half_precision_input_is_scored_in_float32():
    router, params, x, positions = make_router()
    x = x.astype(jnp.bfloat16)
    half, full = (router.apply(params, x.astype(t), positions)[0] for t in (x.dtype, jnp.float32))
    assert half.logits.dtype == jnp.float32
    np.testing.assert_array_equal(half.logits, full.logits)


def seen_by_loop(assignment, valid, state, segment_ids=None):
    assignment = np.asarray(assignment, np.float64)
    seen, now = np.zeros(assignment.shape[:3]), np.array(state, np.float64)
    for b, t in np.ndindex(valid.shape):
        if segment_ids is not None and (t == 0 or segment_ids[b, t] != segment_ids[b, t - 1]):
            now[b] = 0
        if valid[b, t]:
            seen[b, t] = np.sum(assignment[b, t] * now[b], axis=-1)
            now[b] += assignment[b, t]
    return seen, now


def test_seen_before_counts_what_earlier_valid_tokens_showed():
    rng = np.random.default_rng(0)
    assignment = rng.dirichlet(np.ones(4), (B, T, 2)).astype(np.float32)
    valid = rng.uniform(size=(B, T)) < 0.7
    for state in (None, rng.uniform(size=(B, 2, 4)).astype(np.float32)):
        want = seen_by_loop(assignment, valid, np.zeros((B, 2, 4)) if state is None else state)
        got = seen_before(jnp.array(assignment), jnp.array(valid), state)
        np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got[1], want[1], rtol=1e-5)


def test_seen_before_starts_anew_in_each_segment():
    rng = np.random.default_rng(0)
    assignment = rng.dirichlet(np.ones(4), (B, T, 2)).astype(np.float32)
    segment_ids = np.array([[0] * 4 + [1] * 7, [3] * 1 + [0] * 5 + [9] * 5], np.int32)
    valid = np.ones((B, T), bool)
    got, _ = seen_before(jnp.array(assignment), jnp.array(valid), None, jnp.array(segment_ids))
    want, _ = seen_by_loop(assignment, valid, np.zeros((B, 2, 4)), segment_ids)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_token_never_seen_counts_nothing_and_another_how_often():
    tokens = np.array([[0, 1, 0, 2, 0, 1, 3, 0]])
    one_hot = jax.nn.one_hot(tokens, 4)[:, :, None]
    counts, _ = seen_before(one_hot, jnp.ones(tokens.shape, bool), None)
    np.testing.assert_array_equal(counts[0, :, 0], [0, 0, 1, 0, 2, 1, 0, 3])


def test_summary_carried_from_part_to_part_equals_the_whole():
    router, params, x, _ = make_router(summary=3)
    positions = jnp.tile(jnp.arange(T), (B, 1))
    apply = jax.jit(router.apply)
    whole = apply(params, x, positions)
    summary, logits = None, []
    for lo, hi in ((0, 1), (1, 6), (6, 7), (7, T)):
        routing, _, summary = apply(params, x[:, lo:hi], positions[:, lo:hi], None, summary)
        logits.append(routing.logits)
    parts = np.concatenate(logits, axis=1)
    np.testing.assert_allclose(parts, whole.routing.logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(summary, whole.summary, rtol=1e-5)


@pytest.mark.parametrize("summary", [0, 3])
def test_a_decision_looks_back_only_through_the_summary(summary):
    router, params, x, _ = make_router(summary=summary)
    positions = jnp.tile(jnp.arange(T), (B, 1))
    jacobian = jax.jit(jax.jacobian(lambda x: router.apply(params, x, positions)[0].logits.sum(0)))(
        x
    )
    size = np.abs(np.asarray(jacobian)).sum((1, 3))  # [T, S]
    assert np.all(size[np.triu_indices(T, 1)] == 0)
    assert np.all(np.diag(size) > 0)
    assert np.all((size[np.tril_indices(T, -1)] > 0) == bool(summary))


def multiply_adds(jaxpr):
    """Of the matrix products in a jaxpr."""
    total = 0
    for eqn in jaxpr.eqns:
        for sub in jaxprs_in_params(eqn.params):
            total += multiply_adds(sub)
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            total += math.prod(eqn.outvars[0].aval.shape) * depth
    return total


@pytest.mark.parametrize(
    "fields",
    [{}, {"summary": 3}, {"summary": 128}, {"kind": "random"}],
    ids=["learned", "summary", "two hashes", "random"],
)
def test_work_is_what_the_router_multiplies(fields):
    router, params, x, positions = make_router(**fields)
    jaxpr = jax.make_jaxpr(router.apply)(params, x, positions)
    seen = fields.get("summary", 0)  # one product a bin, outside the matrix products
    assert router.config.work(D) * B * T == multiply_adds(jaxpr.jaxpr) + seen * B * T


@pytest.mark.parametrize("usage", [0.003, 0.2])
@pytest.mark.parametrize("kinds", [7, 4096], ids=["few kinds of tokens", "many"])
def test_the_random_router_lets_its_share_attend_and_learns_nothing(kinds, usage):
    config = TokenRouterConfig(kind="random", usage=usage)
    router, table = TokenRouter(config), jax.random.normal(jax.random.key(0), (kinds, 64))
    x = table[jax.random.randint(jax.random.key(3), (8, 4096), 0, kinds)]
    positions = jnp.broadcast_to(jnp.arange(4096), x.shape[:2])
    near = 0.35 if usage < 0.1 else 0.1  # few places, few of them hit
    for seed in range(3):
        params = router.init(jax.random.key(seed), x[:, :1], positions[:, :1])
        routing, gate, _ = router.apply(params, x, positions, jax.random.key(2))
        assert float(routing.choice.mean()) == pytest.approx(usage, rel=near)
    np.testing.assert_array_equal(routing.choice, router.apply(params, x, positions)[0].choice)
    np.testing.assert_array_equal(gate, np.asarray(routing.choice, np.float32))
    # It is not the same places everywhere, nor the same tokens.
    assert len({bytes(row) for row in np.asarray(routing.choice)}) == 8

    def everything(params, x):
        routing, gate, _ = router.apply(params, x, positions[:, :16])
        return jnp.sum(gate) + jnp.sum(routing.probs) + jnp.sum(routing.logits)

    for leaf in jax.tree.leaves(jax.grad(everything, argnums=(0, 1))(params, x[:, :16])):
        assert np.all(np.asarray(leaf) == 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "clever"),
        ("hidden", 0),
        ("temperature", 0.0),
        ("usage", 0.0),
        ("usage", 1.0),
        ("summary", -1),
        ("summary", 65),
    ],
)
def test_a_bad_field_is_named(field, value):
    with pytest.raises(ValueError, match=rf"^router\.{field} is {value!r}; .*\.$"):
        TokenRouterConfig(**{field: value})
