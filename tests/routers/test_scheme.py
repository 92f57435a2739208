"""Scheme routing: probabilities, noise, balance, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.models import DecoderConfig
from routing_jax.routers import SchemeRouter, SchemesConfig, balance_loss, categorical_gate

D = 8
X = np.random.default_rng(0).normal(size=(2, 40, D)).astype(np.float32)
VALID = np.arange(40)[None] < np.array([[40], [33]])
RNG = np.random.default_rng(1)
PARAMS = {
    "hidden": RNG.normal(size=(D, 4)).astype(np.float32),
    "out": RNG.normal(size=(4, 3)).astype(np.float32),
}


def route(rng=None, params=PARAMS, **fields):
    config = SchemesConfig(hidden=4, **fields)
    return SchemeRouter(config).apply({"params": params}, X, VALID, rng)


@pytest.mark.parametrize("kind", ["soft", "hard", "average", "random"])
def test_probabilities_sum_to_one_and_gates_to_one_for_each_token(kind):
    routed = route(kind=kind, params={} if kind == "average" else PARAMS)
    np.testing.assert_allclose(routed.routing.probs.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(routed.gates.sum(-1), VALID, rtol=1e-6)
    np.testing.assert_array_equal(routed.routing.choice == -1, ~VALID)
    one_hot = set(np.unique(routed.gates)) == {0.0, 1.0}
    assert one_hot == (kind in ("hard", "random"))
    if kind != "average":
        assert set(np.unique(routed.routing.choice)) == {-1, 0, 1, 2}


def test_gate_dropout_drops_without_renormalising():
    routed = route(jax.random.key(0), gate_dropout=0.25)
    ratio = np.asarray(routed.gates / routed.routing.probs)[VALID]
    assert np.all(np.isclose(ratio, 0) | np.isclose(ratio, 1 / 0.75, rtol=1e-3))
    assert 0.1 < (ratio == 0).mean() < 0.4
    np.testing.assert_array_equal(
        route(jax.random.key(0)).gates, np.where(VALID[:, :, None], routed.routing.probs, 0)
    )


def test_a_hard_gate_opens_as_often_as_its_probability_says():
    logits = jnp.broadcast_to(jnp.array([0.0, 1.0, -1.0]), (20_000, 3))
    gate = categorical_gate(logits, jax.random.key(0))
    assert np.all(np.asarray(gate.choice).sum(-1) == 1)
    np.testing.assert_allclose(gate.choice.mean(0), jax.nn.softmax(logits[0]), atol=0.015)


def test_without_noise_training_takes_what_evaluation_takes():
    noisy, quiet = (route(jax.random.key(0), kind="hard", gate_noise=n) for n in (True, False))
    np.testing.assert_array_equal(quiet.routing.choice, route(kind="hard").routing.choice)
    assert np.any(np.asarray(noisy.routing.choice) != np.asarray(quiet.routing.choice))


def test_a_hard_gate_has_the_gradient_of_the_soft_one():
    logits = jnp.array([0.3, -0.2, 0.9])
    weights = jnp.array([1.0, 2.0, -3.0])
    got = jax.grad(lambda z: categorical_gate(z, None, 0.5).value @ weights)(logits)
    want = jax.grad(lambda z: jax.nn.softmax(z / 0.5) @ weights)(logits)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("detached", [True, False])
def test_a_detached_router_learns_and_leaves_what_it_reads_alone(detached):
    router = SchemeRouter(SchemesConfig(hidden=4, kind="hard", detached=detached))

    def weighed(params, x):
        gates = router.apply({"params": params}, x, VALID).gates
        return (gates @ jnp.array([1.0, 2.0, -3.0])).sum()

    own, read = jax.grad(weighed, argnums=(0, 1))(PARAMS, X)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(own))
    assert np.any(read) != detached


def test_a_random_router_gives_its_parameters_no_gradient():
    grads = jax.grad(lambda p: (route(params=p, kind="random").gates ** 2).sum())(PARAMS)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_balance_is_zero_at_uniform_and_its_gradient_pulls_there():
    probs = jax.nn.softmax(jnp.asarray(RNG.normal(size=(2, 40, 3)), jnp.float32))
    mean = np.asarray(probs)[VALID].mean(0)
    assert float(balance_loss(probs, VALID)) == pytest.approx(
        ((mean - 1 / 3) ** 2).mean(), rel=1e-4
    )
    slope = jax.grad(balance_loss)(probs, VALID)
    want = VALID[:, :, None] * (2 / 3 * (mean - 1 / 3) / VALID.sum())
    np.testing.assert_allclose(slope, want, rtol=1e-3, atol=1e-8)
    assert float(balance_loss(jnp.full((2, 40, 3), 1 / 3), VALID)) < 1e-12


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"names": "mha,mla"},
            r"schemes\.names is 'mha,mla', where 'mla' is not a scheme; accepted",
        ),
        ({"names": "gqa0"}, r"schemes\.names is 'gqa0', where 'gqa0' is not a scheme"),
        ({"names": ""}, r"schemes\.names is '', where '' is not a scheme"),
        (
            {"names": "mha,mha"},
            r"schemes\.names is 'mha,mha'; each scheme must stand there once\.$",
        ),
        ({"kind": "top2"}, r"schemes\.kind is 'top2'; accepted: 'soft'"),
        ({"hidden": 0}, r"schemes\.hidden is 0"),
        ({"gate_dropout": 1.0}, r"schemes\.gate_dropout is 1\.0"),
        ({"temperature": 0.0}, r"schemes\.temperature is 0\.0"),
    ],
)
def test_a_bad_field_is_named_with_its_value(fields, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        SchemesConfig(**fields)


def test_heads_that_do_not_divide_are_refused_by_the_model():
    schemes = SchemesConfig(names="mha,gqa4")
    said = (
        r"^schemes\.names is 'mha,gqa4'; the 4 key/value heads of 'gqa4' must divide model\.num_h"
    )
    with pytest.raises(ValueError, match=said):
        DecoderConfig(layers="schemes", num_heads=6, num_kv_heads=6, schemes=schemes)
    DecoderConfig(layers="full", num_heads=6, num_kv_heads=6, schemes=schemes)  # not used
    nested = SchemesConfig(names="gqa3,gqa2", nested=True)
    with pytest.raises(ValueError, match="each count of key/value heads must divide the next"):
        DecoderConfig(layers="schemes", num_heads=6, num_kv_heads=6, schemes=nested)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_router_of_rounded_tokens_has_the_gradient_of_an_exact_one(dtype):
    """In bfloat16 within its rounding; parameters and their gradient stay float32."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 9, 16)), dtype)
    router = SchemeRouter(SchemesConfig(hidden=8))
    shapes = jax.eval_shape(router.init, jax.random.key(0), x, jnp.ones((2, 9), bool))["params"]
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)
    wanted = rng.normal(size=(2, 9, 3)).astype(np.float32)

    def value(params, x):
        routed = router.apply({"params": params}, x, jnp.ones((2, 9), bool))
        return jnp.sum(routed.routing.logits * wanted)

    def exact(params, x):
        hidden = jax.nn.gelu(x.astype(jnp.float32) @ params["hidden"], approximate=False)
        return jnp.sum((hidden @ params["out"]) * wanted)

    got, want = (jax.grad(f, argnums=(0, 1))(params, x) for f in (value, exact))
    assert got[0]["hidden"].dtype == jnp.float32
    assert got[1].dtype == x.dtype
    tolerance = 1e-5 if dtype == "float32" else 3e-2
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)
