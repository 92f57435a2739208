"""Dense and compacted attention against a loop in numpy, and what each may not look at."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.kernels import (
    attention,
    compacted_attention,
    default_implementation,
    dense_attention,
)

B, T, H = 2, 13, 4


def make_qkv(num_heads=2, num_kv_heads=1, queries=T, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(B, queries, num_heads, H)).astype(np.float32)
    k, v = rng.normal(size=(2, B, T, num_kv_heads, H)).astype(np.float32)
    return jnp.array(q), jnp.array(k), jnp.array(v)


SEGMENTS = np.array([[3] * 5 + [4] * 8, [0] * 1 + [1] * 11 + [7] * 1], np.int32)


def attention_by_loop(q, k, v, q_positions, segment_ids=None):
    """Each query alone, in float64, over the keys it may see."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, c, n in np.ndindex(q.shape[:3]):
        here = int(q_positions[b, c])
        if here < 0:
            continue
        seen = [
            s
            for s in range(here + 1)
            if segment_ids is None or segment_ids[b, s] == segment_ids[b, here]
        ]
        scores = k[b, seen, n // group] @ q[b, c, n] / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, c, n] = weights @ v[b, seen, n // group] / weights.sum()
    return out


# Jitted anew in each test: `pieces` changes how the same arguments are traced.
def dense(q, k, v, segment_ids=None):
    return jax.jit(lambda *args: dense_attention(*args[:3], segment_ids=args[3]))(
        q, k, v, segment_ids
    )


def compacted(q, k, v, q_positions, segment_ids=None):
    return jax.jit(lambda *args: compacted_attention(*args[:4], segment_ids=args[4]))(
        q, k, v, q_positions, segment_ids
    )


@pytest.fixture(params=["whole", "in pieces"])
def pieces(request, monkeypatch):
    """Runs a test again with a bound so small that attention is cut into groups and pieces."""
    if request.param == "in pieces":
        monkeypatch.setattr(attention, "_LOGITS_PER_PIECE", 64)
        monkeypatch.setattr(attention, "_CAUSAL_GROUPS", 3)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["one segment", "segments"])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
def test_dense_equals_a_loop_over_queries(heads, segment_ids):
    q, k, v = make_qkv(*heads)
    positions = np.tile(np.arange(T), (B, 1))
    out = dense(q, k, v, segment_ids)
    np.testing.assert_allclose(
        out, attention_by_loop(q, k, v, positions, segment_ids), rtol=2e-5, atol=2e-6
    )


CHOSEN = np.array([[0, 2, 3, 7, 9, 12, -1, -1, -1, -1], [5, 6, *[-1] * 8]], np.int32)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["one segment", "segments"])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
def test_compacted_equals_a_loop_over_its_queries(heads, segment_ids):
    q, k, v = make_qkv(*heads, queries=CHOSEN.shape[1])
    out = compacted(q, k, v, CHOSEN, segment_ids)
    np.testing.assert_allclose(
        out, attention_by_loop(q, k, v, CHOSEN, segment_ids), rtol=2e-5, atol=2e-6
    )
    assert np.all(np.asarray(out)[CHOSEN < 0] == 0)


def test_gradients_in_pieces_equal_those_of_the_whole(monkeypatch):
    q, k, v = make_qkv(4, 2)
    weights = jnp.array(np.random.default_rng(1).normal(size=q.shape), jnp.float32)
    chosen = jnp.array(CHOSEN)

    def loss(q, k, v):
        dense = dense_attention(q, k, v, segment_ids=jnp.array(SEGMENTS))
        some = compacted_attention(q[:, : chosen.shape[1]], k, v, chosen)
        return jnp.sum(dense * weights) + jnp.sum(some * weights[:, : chosen.shape[1]])

    whole = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    monkeypatch.setattr(attention, "_LOGITS_PER_PIECE", 64)
    monkeypatch.setattr(attention, "_CAUSAL_GROUPS", 3)
    pieces = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    for a, b in zip(whole, pieces):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_grouped_queries_equal_repeated_key_heads():
    q, k, v = make_qkv(6, 2)
    repeated = dense(q, np.repeat(k, 3, axis=2), np.repeat(v, 3, axis=2))
    np.testing.assert_allclose(dense(q, k, v), repeated, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("pieces")
def test_no_gradient_reaches_a_later_key():
    q, k, v = make_qkv()

    def outputs(k, v):
        some = compacted_attention(q[:, : CHOSEN.shape[1]], k, v, jnp.array(CHOSEN))
        return dense_attention(q, k, v).sum((0, 2, 3)), some.sum((2, 3))

    of_all, of_some = jax.jit(jax.jacobian(outputs, argnums=(0, 1)))(k, v)
    for gradient in of_all:  # [T, B, S, K, H]
        size = np.abs(np.asarray(gradient)).sum((1, 3, 4))
        assert np.all(size[np.triu_indices(T, 1)] == 0)
        # Query 0 sees one key, with weight 1 whatever its score.
        assert np.all(size[np.tril_indices(T)][1:] > 0)
    for gradient in of_some:  # [B, C, B, S, K, H]
        size = np.abs(np.asarray(gradient)).sum((4, 5))
        for b, c, row, s in np.ndindex(size.shape):
            if row != b or s > CHOSEN[b, c]:
                assert size[b, c, row, s] == 0
            elif CHOSEN[b, c] > 0:
                assert size[b, c, row, s] > 0


def test_half_precision_keeps_its_dtype_and_half_its_digits():
    q, k, v = make_qkv(4, 2)
    want = attention_by_loop(q, k, v, np.tile(np.arange(T), (B, 1)))
    out = dense_attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)))
    assert out.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(out, np.float64) - want) / np.linalg.norm(want)
    assert error < 2**-7


def test_float32_never_asks_for_cudnn():
    assert default_implementation(jnp.dtype("float32")) == "xla"


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((B, T, 3, H), (B, T, 2, H), (B, T, 2, H)),
        ((B, T, 2, H), (B, T, 2, H), (B, T, 1, H)),
        ((B, T, 2, H), (B, T, 2, H + 1), (B, T, 2, H + 1)),
        ((B + 1, T, 2, H), (B, T, 2, H), (B, T, 2, H)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(q, k, v):
    with pytest.raises(ValueError, match=r"heads|must share|one shape"):
        dense_attention(jnp.ones(q), jnp.ones(k), jnp.ones(v))


def test_dense_refuses_keys_of_another_length():
    q, k, v = make_qkv(queries=T - 1)
    with pytest.raises(ValueError, match=r"T = S.*T=12.*S=13"):
        dense_attention(q, k, v)


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [40, 300])
@pytest.mark.parametrize("segmented", [False, True])
def test_compacted_is_the_same_through_the_block_sparse_kernel(queries, segmented):
    rng = np.random.default_rng(queries)
    S = 2500  # long enough for keys to be split among programs
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, length, heads, 64)), jnp.bfloat16)
        for length, heads in ((queries, 6), (S, 2), (S, 2))
    )
    positions = np.full((2, queries), -1, np.int32)
    positions[0] = np.sort(rng.choice(S, queries, replace=False))
    positions[1, : queries // 2] = np.sort(rng.choice(S, queries // 2, replace=False))
    segments = np.sort(rng.integers(0, 3, (2, S)), axis=1).astype(np.int32) if segmented else None
    arguments = {"q_positions": jnp.asarray(positions), "segment_ids": segments}
    got = compacted_attention(q, k, v, **arguments, implementation="mosaic_gpu")
    expected = compacted_attention(q, k, v, **arguments, implementation="xla")
    difference = np.asarray(got - expected, np.float32)
    assert np.linalg.norm(difference) < 1e-2 * np.linalg.norm(np.asarray(expected, np.float32))
    assert not np.asarray(got[1, queries // 2 :]).any()
