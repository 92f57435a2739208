"""The implementations in plain XLA: the one that gathers, and the one that computes every pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.kernels import block_sparse_attention, window_table

from ..jaxprs import array_sizes
from .attention_suite import AttentionSuite


class TestXla(AttentionSuite):
    implementation = "xla"
    dtypes = ("float32", "bfloat16", "float16")


class TestMasked(AttentionSuite):
    implementation = "masked"
    dtypes = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("size", [1, 4])
def test_masked_queries_pass_in_parts(size, monkeypatch):
    """Whatever logits may be held at once, the outputs and gradients are those of one part."""
    B, T, N, K, H = 2, 26, 4, 2, 8
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (B, T, n, H)) for key, n in zip(keys, (N, K, K)))
    table = window_table(T, T, 3, block_q=size, block_kv=4)
    bias = jax.random.normal(keys[3], table.indices.shape)
    positions = jnp.where(jnp.arange(T) < 21, jnp.arange(T) + 2, -1)[None].repeat(B, 0)

    def results():
        def loss(q, k, v, bias):
            out, lse = block_sparse_attention(
                q,
                k,
                v,
                table,
                block_bias=bias,
                q_positions=positions,
                implementation="masked",
                return_lse=True,
            )
            seen = jnp.where(lse > -jnp.inf, lse, 0.0)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(seen)), (out, lse)

        return jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(q, k, v, bias)

    whole = results()
    monkeypatch.setattr("routing_jax.kernels.block_sparse.masked._LOGITS", 3 * B * N * T * size)
    jax.clear_caches()
    for got, want in zip(jax.tree.leaves(results()), jax.tree.leaves(whole)):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_nothing_is_as_large_as_queries_times_keys():
    T, H = 8192, 64
    table = window_table(T, T, 3, block_q=64, block_kv=64)

    def loss(q, k, v, bias):
        return block_sparse_attention(q, k, v, table, block_bias=bias).sum()

    x = jax.ShapeDtypeStruct((1, T, 1, H), jnp.float32)
    bias = jax.ShapeDtypeStruct((1, 1, T // 64, 4), jnp.float32)
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2, 3)))(x, x, x, bias)
    assert max(array_sizes(jaxpr)) <= T * 64 + 64 * H  # q, or its tiles and the empty one
