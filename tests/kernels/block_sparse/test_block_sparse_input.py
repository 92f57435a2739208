import dataclasses

import jax
import jax.numpy as jnp
import pytest

from routing_jax.kernels import block_sparse_attention, checked, window_table
from routing_jax.kernels.block_sparse.api import IMPLEMENTATIONS

from ..refusals import check_refused_alike

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
        r"implementation must be None or one of \[.*'xla'.*\]; it is 'cuda'",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_refused_in_one_sentence_whoever_is_named(name):
    changes, sentence = BAD_INPUTS[name]
    check_refused_alike(call, IMPLEMENTATIONS, sentence, **changes)


def test_shapes_are_refused_under_jit_too():
    with pytest.raises(ValueError, match=r"k \[B,S,K,H\] must have shape"):
        jax.jit(lambda k: call(k=k))(jnp.ones((2, 40, 2, 16)))


def test_traced_values_are_checked_where_asked():
    run = jax.jit(checked(lambda table, q_positions: call(table=table, q_positions=q_positions)))

    positions = jnp.broadcast_to(jnp.arange(40)[None], (2, 40))
    beyond = dataclasses.replace(TABLE, indices=TABLE.indices + 1)
    for table, q_positions, sentence in (
        (TABLE, positions, None),
        (beyond, positions, "table.indices must lie in [0, 3); some row breaks this"),
        (TABLE, positions[:, ::-1], "q_positions must ascend strictly"),
    ):
        message = run(table, q_positions)[0].get()
        assert message is None if sentence is None else sentence in message
