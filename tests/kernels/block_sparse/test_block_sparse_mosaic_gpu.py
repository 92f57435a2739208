import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.kernels import BlockTable, block_sparse_attention, dense_table, window_table
from routing_jax.kernels.block_sparse.implementation import (
    AttentionInputs,
    AttentionOptions,
    AttentionOutputs,
)
from routing_jax.kernels.block_sparse.mosaic_gpu.backward import backward
from routing_jax.kernels.block_sparse.mosaic_gpu.call import unsupported
from routing_jax.kernels.block_sparse.mosaic_gpu.forward import forward

from ..cuda_lowering import lower_for_cuda
from .attention_suite import CASES, AttentionSuite, Case, make_inputs


@pytest.mark.gpu
class TestMosaicGpu(AttentionSuite):
    implementation = "mosaic_gpu"
    dtypes = ("bfloat16", "float16")

    @pytest.mark.parametrize("listed", [0, 4])
    def test_ends_where_most_tiles_have_no_step(self, listed):
        """Late tiles come first, so programs begin with several items that have nothing to do."""
        B, K, T, H, block = 4, 8, 1024, 64, 64
        counts = (jnp.arange(T // block) < listed).astype(jnp.int32)
        counts = jnp.broadcast_to(counts, (B, K, T // block))
        indices = jnp.zeros((B, K, T // block, 1), jnp.int32)
        self.check_against_xla((B, T, K, K, T, H), BlockTable(counts, indices, block, block))

    @pytest.mark.parametrize("used", [0, 128, 700])
    @pytest.mark.parametrize("B", [1, 4])
    def test_ends_where_most_slots_are_unused(self, B, used):
        slots, S = 1024, 8192
        places = jnp.arange(slots, dtype=jnp.int32)
        positions = jnp.broadcast_to(jnp.where(places < used, 8 * places, -1), (B, slots))
        table = dense_table(slots, S, block_q=128, block_kv=128)
        self.check_against_xla((B, slots, 16, 4, S, 128), table, q_positions=positions)

    def test_ends_where_rows_have_fewer_blocks_than_splits(self):
        table = window_table(4096, 4096, 1, block_q=128, block_kv=128)
        self.check_against_xla((1, 4096, 4, 1, 4096, 128), table)

    def check_against_xla(self, sizes, table, **arguments):
        B, T, N, K, S, H = sizes
        rng = np.random.default_rng(0)
        q, k, v = (
            jnp.asarray(rng.normal(size=(B, length, heads, H)), jnp.bfloat16)
            for length, heads in ((T, N), (S, K), (S, K))
        )

        def both(implementation):
            def attend(q, k, v):
                return block_sparse_attention(
                    q, k, v, table, **arguments, implementation=implementation
                )

            out, pull_back = jax.vjp(attend, q, k, v)
            return out, *pull_back(q)

        compute = jax.jit(both, static_argnums=0)
        for got, expected in zip(compute("mosaic_gpu"), compute("xla")):
            got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
            assert np.linalg.norm(got - expected) <= 0.01 * np.linalg.norm(expected)


def _call(case: Case, dtype: str) -> tuple[AttentionOptions, AttentionInputs]:
    arguments, _ = make_inputs(case, dtype)
    causal = arguments.pop("causal")
    shapes = jax.eval_shape(lambda: AttentionInputs(**arguments))
    return AttentionOptions(causal, 0.125), shapes


LOWERED = {name: (case, "bfloat16") for name, case in CASES.items()} | {
    "plain": (Case(B=1, T=256, H=128, block_q=128, block_kv=128, bias=False), "float16"),
    "narrow blocks, no bias": (Case(B=1, bias=False, segments=True), "bfloat16"),
}


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_hopper(name):
    options, inputs = _call(*LOWERED[name])
    assert unsupported(options, inputs) is None
    text = lower_for_cuda(functools.partial(forward, options), inputs)
    assert text.count("custom_call @mosaic_gpu") == 1
    lse = jax.ShapeDtypeStruct(inputs.q.shape[:3], jnp.float32)
    outputs = AttentionOutputs(inputs.q, lse)
    text = lower_for_cuda(functools.partial(backward, options), inputs, outputs, inputs.q, lse)
    # dq, then dk and dv: in one, or one after the other where both do not fit the registers.
    assert text.count("custom_call @mosaic_gpu") == (3 if inputs.q.shape[-1] > 128 else 2)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "float32"),
        ({"H": 320}, "head dims up to 256, and q has 320"),
        ({"block_q": 32}, "blocks of 64 and 128, and the table has 32×64"),
    ],
)
def test_refuses_what_it_cannot_run(changes, sentence):
    dtype = "bfloat16" if changes else "float32"
    arguments, _ = make_inputs(dataclasses.replace(Case(T=64, B=1), **changes), dtype)
    with pytest.raises(NotImplementedError, match=sentence):
        block_sparse_attention(**arguments, implementation="mosaic_gpu")


def test_refuses_a_scale_that_is_not_positive():
    arguments, _ = make_inputs(Case(T=64, B=1), "bfloat16")
    with pytest.raises(NotImplementedError, match=r"scale is -1\.0"):
        block_sparse_attention(**arguments, scale=-1.0, implementation="mosaic_gpu")
