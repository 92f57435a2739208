import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.kernels import dense_attention, dropout


def test_the_rate_is_that_asked_for_and_the_mean_stays():
    x = jnp.ones(200_000)
    dropped = np.asarray(dropout(x, 0.1, jax.random.key(0)))
    assert abs((dropped == 0).mean() - 0.1) < 0.003  # four standard deviations
    np.testing.assert_allclose(dropped[dropped > 0], 1 / 0.9, rtol=1e-6)


def test_without_a_key_or_a_rate_nothing_changes():
    x = jnp.arange(5.0)
    np.testing.assert_array_equal(dropout(x, 0.5, None), x)
    np.testing.assert_array_equal(dropout(x, 0.0, jax.random.key(0)), x)


def attend(rate, segment_ids=None):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, 12, 4, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, 12, 2, 8)), jnp.float32) for _ in range(2))
    return dense_attention(
        q, k, v, segment_ids=segment_ids, dropout_rate=rate, dropout_rng=jax.random.key(1)
    )


def test_attention_with_next_to_no_dropout_is_attention():
    segments = np.repeat(np.arange(3, dtype=np.int32), 4)[None].repeat(2, 0)
    for segment_ids in (None, segments):
        got, want = attend(1e-9, segment_ids), attend(0.0, segment_ids)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_attention_drops_weights_at_random():
    # With half of its weights dropped, a first token sees all of itself twice, or nothing.
    first = np.asarray(attend(0.5) / attend(0.0))[:, 0]
    for head in first.reshape(-1, 8):
        assert np.allclose(head, 0) or np.allclose(head, 2, rtol=1e-4)
    assert len({round(float(head[0])) for head in first.reshape(-1, 8)}) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_with_dropout_has_the_gradients_of_its_formula(dtype):
    B, T, N, K, H = 2, 8, 4, 2, 8
    rng = np.random.default_rng(0)
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)]
    q, k, v, weight = (jnp.asarray(rng.normal(size=s), dtype) for s in shapes)

    def attend(q, k, v):
        return dense_attention(q, k, v, dropout_rate=0.3, dropout_rng=jax.random.key(1))

    one = jnp.broadcast_to(jnp.eye(T, dtype=dtype)[:, None], (B, T, K, H))
    kept = np.asarray(attend(q, k, one)) > 0  # [B,T,N,S]: values that name their key

    def formula(q, k, v):
        k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
        logits = jnp.einsum("BTNH,BSNH->BTNS", q, k) * H**-0.5
        logits = jnp.where(jnp.tri(T, dtype=bool)[None, :, None], logits, -jnp.inf)
        weights = jnp.where(kept, jax.nn.softmax(logits, axis=-1) / 0.7, 0)
        return jnp.einsum("BTNS,BSNH->BTNH", weights, v)

    def gradients(attend, *inputs):
        def loss(*inputs):
            return jnp.sum(attend(*inputs).astype(jnp.float32) * weight.astype(jnp.float32))

        return jax.grad(loss, argnums=(0, 1, 2))(*inputs)

    wanted = gradients(formula, *(x.astype(jnp.float32) for x in (q, k, v)))
    for got, want in zip(gradients(attend, q, k, v), wanted):
        assert got.dtype == dtype
        error = np.linalg.norm(np.float32(got) - want) / np.linalg.norm(want)
        assert error < (1e-5 if dtype == "float32" else 2e-2)
