"""The layer router: what it reads, where it starts, and that it decides a sequence at a time."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.routers import (
    LayerRouter,
    LayerRouterConfig,
    cooled_temperature,
    end_tokens,
    pool_queries,
    standardised,
)

B, T, N, H, POOL = 6, 12, 2, 4, 3
LENGTHS = np.array([12, 7, 6, 4, 2, 0], np.int32)  # ends apart, adjoining, overlapping, the same
ROUTER = LayerRouter(LayerRouterConfig(pool=POOL))
route = jax.jit(ROUTER.apply)


def queries_of(seed=0):
    return np.random.default_rng(seed).normal(size=(B, T, N, H)).astype(np.float32)


def start(random_scores=False):
    params = jax.jit(ROUTER.init)(jax.random.key(0), queries_of(), LENGTHS)
    if random_scores:
        rng = np.random.default_rng(3)
        params["params"] |= {
            "scores": jnp.float32(rng.normal(size=(H, 2))),
            "bias": jnp.float32(rng.normal(size=2)),
        }
    return params


def test_pooled_queries_are_the_means_of_both_ends():
    queries = queries_of()
    got = pool_queries(queries, LENGTHS, POOL)
    for b, length in enumerate(LENGTHS):
        valid = queries[b, :length].mean(1)
        ends = np.concatenate([valid[:POOL], valid[-POOL:]])
        want = ends.mean(0) if length else np.zeros(H)
        np.testing.assert_allclose(got[b], want, rtol=1e-5, atol=1e-6)


def test_nothing_but_the_ends_is_read():
    reads = jax.grad(lambda q: jnp.sum(pool_queries(q, LENGTHS, POOL) ** 2))(queries_of())
    read = np.abs(reads).sum((2, 3)) > 0
    place = np.arange(T)
    for b, length in enumerate(LENGTHS):
        valid = place < length
        np.testing.assert_array_equal(read[b], valid & ((place < POOL) | (place >= length - POOL)))


def test_pooling_more_tokens_than_there_are_takes_them_all():
    queries, lengths = queries_of(), np.full(B, T)
    np.testing.assert_allclose(
        pool_queries(queries, lengths, 100), queries.mean((1, 2)), rtol=1e-4, atol=1e-6
    )


def test_the_ends_alone_are_pooled_to_the_same():
    queries = queries_of()
    ends, counts = end_tokens(queries.reshape(B, T, N * H), LENGTHS, POOL)
    assert ends.shape[1] == 2 * POOL
    np.testing.assert_allclose(
        pool_queries(ends.reshape(B, -1, N, H), counts, POOL),
        pool_queries(queries, LENGTHS, POOL),
        rtol=1e-6,
    )


def test_it_starts_with_full_attention_whatever_it_reads():
    routing = route(start(), queries_of(), LENGTHS).routing
    np.testing.assert_allclose(routing.probs, 0.99, rtol=1e-5)
    assert routing.choice.all()


def test_it_has_the_released_number_of_parameters():
    shapes = jax.eval_shape(
        LayerRouter(LayerRouterConfig()).init,
        jax.random.key(0),
        jnp.zeros((1, 8, 2, 128)),
        jnp.array([8]),
    )
    sizes = [128, 1024, 256, 512, 128, 2]
    want = sum(a * b + b for a, b in itertools.pairwise(sizes))
    assert want == 592_002
    inputs = 2 * 128  # that standardise its inputs, which the released one does not have
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == want + inputs


def test_scores_are_those_of_the_released_layers():
    params, queries = start(random_scores=True), queries_of()

    def silu(x):
        return x / (1 + np.exp(-x))

    layers = {name: jax.tree.map(np.float64, p) for name, p in params["params"].items()}
    dense = [(layers[f"hidden_{i}"]["kernel"], layers[f"hidden_{i}"]["bias"]) for i in range(4)]
    assert [kernel.shape[1] // H for kernel, _ in dense] == [8, 2, 4, 1]
    (a, b, c, d), x = dense, np.float64(pool_queries(queries, LENGTHS, POOL))
    encoded = silu(x @ a[0] + a[1]) @ b[0] + b[1]
    hidden = silu(silu(encoded @ c[0] + c[1]) @ d[0] + d[1])
    sparse, full = (hidden @ layers["scores"] + layers["bias"]).T
    routing = route(params, queries, LENGTHS).routing
    np.testing.assert_allclose(routing.logits, full - sparse, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        routing.probs, np.exp(full) / (np.exp(full) + np.exp(sparse)), rtol=1e-4
    )
    np.testing.assert_array_equal(routing.choice, full > sparse)


def test_each_sequence_is_decided_alone():
    params, queries = start(random_scores=True), queries_of()
    order = np.array([3, 0, 5, 1, 4, 2])
    logits = route(params, queries, LENGTHS).routing.logits
    moved = route(params, queries[order], LENGTHS[order]).routing.logits
    np.testing.assert_allclose(moved, logits[order], rtol=1e-5)
    assert len(np.unique(np.round(logits, 4))) == B


def test_noise_opens_gates_by_their_probability_and_temperature_moves_only_the_gradient():
    rows = 4000
    params = start(random_scores=True)
    queries = np.tile(queries_of()[:1], (rows, 1, 1, 1))

    def gates(params, temperature):
        routed = ROUTER.apply(params, queries, np.full(rows, T), jax.random.key(1), temperature)
        return jnp.mean(routed.gate), routed

    both = jax.jit(jax.value_and_grad(gates, has_aux=True))
    (warm_mean, warm), warm_slope = both(params, 1.5)
    (cold_mean, cold), cold_slope = both(params, 1.0)
    np.testing.assert_array_equal(warm.gate, np.float32(warm.routing.choice))
    np.testing.assert_array_equal(warm.gate, cold.gate)
    odds = float(warm.routing.probs[0])
    assert abs(float(warm_mean) - odds) < 4 * (odds * (1 - odds) / rows) ** 0.5
    assert float(warm_mean) == float(cold_mean)
    for leaf in jax.tree.leaves(cold_slope):
        assert np.abs(leaf).max() > 0
    first, second = (slope["params"]["bias"][1] for slope in (warm_slope, cold_slope))
    assert abs(float(first - second)) > 1e-3


def test_temperature_falls_as_a_half_cosine_and_stays():
    taus = np.array([cooled_temperature(step, 300) for step in range(301)])
    assert (np.diff(taus[:181]) < 0).all()
    assert (taus[180:] == 1).all()
    np.testing.assert_allclose(taus[:181] + taus[180::-1], 2.5, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "named"), [({"pool": 0}, "pool is 0"), ({"full": 1.0}, "full is 1.0")]
)
def test_a_bad_field_is_named_with_its_value(fields, named):
    with pytest.raises(ValueError, match=rf"^layer_router\.{named}; .*\.$"):
        LayerRouterConfig(**fields)


def test_standardised_inputs_have_mean_0_and_deviation_1():
    pooled = np.random.default_rng(0).normal(3, [0.1, 2, 5], (2, 50, 3)).astype(np.float32)
    scale, shift = standardised(jnp.asarray(pooled))
    made = pooled * scale[:, None] + shift[:, None]
    np.testing.assert_allclose(made.mean(1), 0, atol=1e-4)
    np.testing.assert_allclose(made.std(1), 1, rtol=1e-4)
