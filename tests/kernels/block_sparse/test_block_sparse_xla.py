import jax
import jax.numpy as jnp

from routing_jax.kernels import block_sparse_attention, window_table

from ..jaxprs import array_sizes
from .attention_suite import AttentionSuite


class TestXla(AttentionSuite):
    implementation = "xla"
    dtypes = ("float32", "bfloat16", "float16")


def test_nothing_is_as_large_as_queries_times_keys():
    T, H = 8192, 64
    table = window_table(T, T, 3, block_q=64, block_kv=64)

    def loss(q, k, v, bias):
        return block_sparse_attention(q, k, v, table, block_bias=bias).sum()

    x = jax.ShapeDtypeStruct((1, T, 1, H), jnp.float32)
    bias = jax.ShapeDtypeStruct((1, 1, T // 64, 4), jnp.float32)
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2, 3)))(x, x, x, bias)
    assert max(array_sizes(jaxpr)) <= T * 64 + 64 * H  # q, or its tiles and the empty one
