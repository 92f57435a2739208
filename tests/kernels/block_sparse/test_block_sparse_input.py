import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import checkify

from routing_jax.kernels import block_sparse_attention, window_table

TABLE = window_table(40, 40, 1, block_q=16, block_kv=16)


def call(**changes):
    arguments = {
        "q": jnp.ones((2, 40, 4, 8)),
        "k": jnp.ones((2, 40, 2, 8)),
        "v": jnp.ones((2, 40, 2, 8)),
        "table": TABLE,
    }
    return block_sparse_attention(**(arguments | changes))


BAD_INPUTS = {
    "rank": ({"q": jnp.ones((2, 40, 8))}, r"q \[B,T,N,H\] must have shape \(B, T, N, H\); it has"),
    "nothing": ({"q": jnp.ones((2, 0, 4, 8))}, r"q \[B,T,N,H\] .* shape \(2, 0, 4, 8\)"),
    "head dim": (
        {"k": jnp.ones((2, 40, 2, 16))},
        r"k \[B,S,K,H\] must have shape \(2, S, K, 8\); it has shape \(2, 40, 2, 16\)",
    ),
    "v": ({"v": jnp.ones((2, 41, 2, 8))}, r"v \[B,S,K,H\] must have shape \(2, 40, 2, 8\)"),
    "groups": (
        {"q": jnp.ones((2, 40, 3, 8))},
        r"multiple of k's heads K; q has shape \(2, 40, 3, 8\), k has shape \(2, 40, 2, 8\)",
    ),
    "integer q": ({"q": jnp.ones((2, 40, 4, 8), jnp.int32)}, "q must have dtype bfloat16 or"),
    "mixed dtypes": ({"v": jnp.ones((2, 40, 2, 8), jnp.bfloat16)}, "v must have dtype float32"),
    "table": ({"table": TABLE.indices}, "table must be a BlockTable; it is a "),
    "table's tiles": (
        {"table": dataclasses.replace(TABLE, block_q=8)},
        r"table must have 5 query tiles \(T=40, block_q=8\)",
    ),
    "table's blocks": (
        {"table": dataclasses.replace(TABLE, block_kv=32)},
        r"table.indices must lie in \[0, 2\); row \(0, 0, 2\) lists \[1, 2\]",
    ),
    "bias": (
        {"block_bias": jnp.ones((2, 4, 3, 2))},
        r"block_bias \[B,K,M,C\] must have shape \(2, 2, 3, 2\), or 1 for B or K; .*\(2, 4, 3, 2\)",
    ),
    "bias dtype": ({"block_bias": jnp.ones((2, 2, 3, 2), int)}, "block_bias must have dtype"),
    "positions": (
        {"q_positions": jnp.arange(40)},
        r"q_positions \[B,T\] must have shape \(2, 40\); it has shape \(40,\)",
    ),
    "positions' dtype": ({"q_positions": jnp.ones((2, 40))}, "q_positions must have dtype int32"),
    "positions' order": (
        {"q_positions": jnp.stack([jnp.arange(40), jnp.arange(40)[::-1]])},
        r"ascend strictly, with unused slots \(-1\) last; row \(1,\) is \[39 38 37",
    ),
    "unused first": (
        {"q_positions": jnp.broadcast_to(jnp.arange(-1, 39)[None], (2, 40))},
        r"ascend strictly, with unused slots \(-1\) last; row \(0,\)",
    ),
    "segments": (
        {"segment_ids": jnp.ones((2, 41), int)},
        r"segment_ids \[B,S\] must have shape \(2, 40\)",
    ),
    "segments' dtype": ({"segment_ids": jnp.ones((2, 40))}, "segment_ids must have dtype int32 or"),
    "scale": ({"scale": jnp.ones(())}, "scale must be a finite Python number; it is Array"),
    "no scale": ({"scale": float("nan")}, "scale must be a finite Python number; it is nan"),
    "implementation": (
        {"implementation": "cuda"},
        r"implementation must be None or one of \[.*'xla'\]; it is 'cuda'",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_refused_in_one_sentence(name):
    changes, sentence = BAD_INPUTS[name]
    with pytest.raises(ValueError, match=sentence) as refusal:
        call(**changes)
    assert "\n" not in str(refusal.value)


def test_shapes_are_refused_under_jit_too():
    with pytest.raises(ValueError, match=r"k \[B,S,K,H\] must have shape"):
        jax.jit(lambda k: call(k=k))(jnp.ones((2, 40, 2, 16)))


def test_the_bias_is_broadcast_over_sequences_and_heads():
    bias = jnp.arange(6.0).reshape(1, 1, 3, 2)
    full = jnp.broadcast_to(bias, (2, 2, 3, 2))
    x = jnp.asarray(jax.random.normal(jax.random.key(0), (2, 40, 2, 8)))

    def loss(bias):
        return (call(q=jnp.tile(x, (1, 1, 2, 1)), k=x, v=x, block_bias=bias) ** 2).sum()

    (value, gradient), (full_value, full_gradient) = (
        jax.jit(jax.value_and_grad(loss))(b) for b in (bias, full)
    )
    assert value == full_value
    assert jnp.allclose(gradient, full_gradient.sum((0, 1), keepdims=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["table's blocks", "positions' order"])
def test_traced_values_are_checked_under_checkify(name):
    changes, _ = BAD_INPUTS[name]
    checked = jax.jit(
        checkify.checkify(lambda changes: call(**changes), errors=checkify.user_checks)
    )
    message = checked(changes)[0].get()
    assert message is not None
    assert "some row breaks this" in message
    assert checked({"table": TABLE})[0].get() is None
