"""The backward pass on Hopper that need not be deterministic: one kernel instead of two."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.kernels import block_sparse_attention, dense_table, window_table
from routing_jax.kernels.block_sparse.implementation import (
    AttentionInputs,
    AttentionOptions,
    AttentionOutputs,
)
from routing_jax.kernels.block_sparse.mosaic_gpu import fused_gradients
from routing_jax.kernels.block_sparse.mosaic_gpu.backward import backward

from ..cuda_lowering import lower_for_cuda
from ..random_tables import random_table
from .attention_suite import CASES, HALF_CASES, AttentionSuite, Case, make_inputs

FUSED = {
    name: dataclasses.replace(case, bias=False) for name, case in CASES.items() if case.H <= 128
} | {
    "groups of 4, head dim 128": Case(
        T=400, S=330, G=4, H=128, block_q=128, block_kv=128, bias=False
    ),
    "groups of 3, wide blocks": Case(T=260, G=3, block_q=128, block_kv=128, bias=False),
    "narrow blocks, head dim 128": Case(T=200, H=128, G=1, bias=False),
    "tall tiles, narrow blocks": Case(T=200, S=170, block_q=128, causal=False, bias=False),
}


class FusedSuite(AttentionSuite):
    """Not collected by itself: only its comparison is used."""

    def attend(self, **arguments):
        return block_sparse_attention(
            **arguments, deterministic=False, implementation="mosaic_gpu", return_lse=True
        )


# Cases and how many heads of the group a program takes, where the cache would not hold them all.
FEWER_HEADS = (
    ("groups of 3, head dim 64", 1),
    ("groups of 16, head dim 96", 4),
    ("groups of 4, head dim 128", 1),
    ("groups of 4, head dim 128", 2),
    ("compacted queries in segments", 1),
    ("one table and bias for all, no dense row", 1),
)


def _hold(monkeypatch, heads: int, T: int, H: int) -> None:
    """Makes the cache as small as what that many heads use."""
    jax.clear_caches()  # the backward pass may have been traced for these shapes
    monkeypatch.setattr(fused_gradients, "_CACHE_BYTES", heads * T * -(-H // 64) * 64 * 8)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FUSED)
def test_fused_gradients_equal_masked_dense_attention(name):
    FusedSuite().check_against_oracle(FUSED[name], "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "heads"), FEWER_HEADS)
def test_programs_that_take_a_part_of_the_group_add_up(name, heads, monkeypatch):
    case = FUSED[name]
    _hold(monkeypatch, heads, case.T, case.H)
    FusedSuite().check_against_oracle(case, "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype"), HALF_CASES)
def test_what_the_fused_kernel_does_not_take_is_computed_in_two_passes(name, dtype):
    assert CASES[name].bias
    FusedSuite().check_against_oracle(CASES[name], dtype)


def _table(kind: str, T: int, K: int, block_q: int, block_kv: int):
    blocks = {"block_q": block_q, "block_kv": block_kv}
    if kind == "random":
        rng, sizes = np.random.default_rng(1), {"tiles": T // block_q, "blocks": T // block_kv}
        return random_table(rng, batch=1, heads=K, capacity=8, dense=0.05, **sizes, **blocks)
    return dense_table(T, T, **blocks) if kind == "dense" else window_table(T, T, 3, **blocks)


def _gradients(deterministic: bool, implementation: str = "mosaic_gpu"):
    """A function of operands, table and d_out, traced anew."""

    @jax.jit
    def gradients(operands, table, d_out):
        def attend(q, k, v):
            return block_sparse_attention(
                q, k, v, table, deterministic=deterministic, implementation=implementation
            )

        _, pull_back = jax.vjp(attend, *operands)
        return [x.astype(jnp.float32) for x in pull_back(d_out)]

    return gradients


def _operands(T: int, K: int, G: int, H: int):
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.normal(size=(1, T, heads, H)), jnp.bfloat16) for heads in (K * G, K, K)
    ], jnp.asarray(rng.normal(size=(1, T, K * G, H)), jnp.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "H", "G", "heads"),
    [
        ("random", 128, 4, 4),
        ("random", 128, 4, 1),
        ("random", 64, 3, 3),
        ("window", 128, 3, 1),
        ("window", 64, 1, 1),
        ("dense", 128, 1, 1),
        ("dense", 64, 4, 2),
    ],
)
def test_many_programs_add_to_the_same_rows(kind, H, G, heads, monkeypatch):
    """More programs than multiprocessors, whose additions meet; twice, for dk and dv bit by bit."""
    T, K = 4096, 8
    _hold(monkeypatch, heads, T, H)
    operands, d_out = _operands(T, K, G, H)
    table = _table(kind, T, K, 128, 128)
    fused = _gradients(deterministic=False)
    first, again = (fused(operands, table, d_out) for _ in range(2))
    expected = _gradients(deterministic=True)(operands, table, d_out)
    for got, want in zip(first, expected):
        got, want = np.asarray(got), np.asarray(want)
        assert np.linalg.norm(got - want) <= 0.005 * np.linalg.norm(want)
    for got, want in zip(first[1:], again[1:]):
        np.testing.assert_array_equal(got, want)


@pytest.mark.gpu
def test_keys_that_pad_the_last_block_add_nothing_however_small_the_logits():
    """P of a zero key would overflow: every logit is −200, and queries stand past the last key."""
    (q, k, v), d_out = _operands(256, 1, 1, 64)
    k, v = k[:, :100], v[:, :100]
    q, k = q.at[..., 0].set(100.0), k.at[..., 0].set(-16.0)
    table = dense_table(256, 100, block_q=64, block_kv=64)
    got = _gradients(deterministic=False)((q, k, v), table, d_out)
    expected = _gradients(deterministic=True, implementation="xla")((q, k, v), table, d_out)
    for one, other in zip(got, expected):  # the first column is a sum that vanishes
        one, other = np.asarray(one)[..., 1:], np.asarray(other)[..., 1:]
        assert np.isfinite(one).all()
        assert np.linalg.norm(one - other) <= 0.01 * np.linalg.norm(other)


LOWERED = {
    "one kernel": (FUSED["groups of 4, head dim 128"], 1),
    "one kernel, columns in quarters of a line": (FUSED["groups of 3, wide blocks"], 1),
    "one kernel, one warpgroup": (FUSED["groups of 3, head dim 64"], 1),
    "one kernel, compacted queries in segments": (FUSED["compacted queries in segments"], 1),
    "one kernel, not causal": (FUSED["wide blocks, more keys"], 1),
    "narrow blocks": (FUSED["narrow blocks, head dim 128"], 2),
    "a bias": (CASES["groups of 3, head dim 64"], 2),
    "head dim 256": (dataclasses.replace(CASES["tall tiles, head dim 256"], bias=False), 3),
}


def _lowered(case: Case) -> str:
    arguments, _ = make_inputs(case, "bfloat16")
    options = AttentionOptions(arguments.pop("causal"), 0.125, deterministic=False)
    inputs = jax.eval_shape(lambda: AttentionInputs(**arguments))
    lse = jax.ShapeDtypeStruct(inputs.q.shape[:3], jnp.float32)
    outputs = AttentionOutputs(inputs.q, lse)
    return lower_for_cuda(functools.partial(backward, options), inputs, outputs, inputs.q, lse)


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_hopper_to_as_few_kernels_as_the_call_allows(name):
    case, kernels = LOWERED[name]
    text = _lowered(case)
    assert text.count("custom_call @mosaic_gpu") == kernels
    # dq is added to zeros that the kernel gets as an operand.
    assert text.count("stablehlo.output_operand_alias<") == (1 if kernels == 1 else 0)


def test_more_sequences_than_a_grid_holds_take_two_kernels(monkeypatch):
    case = FUSED["groups of 3, wide blocks"]
    monkeypatch.setattr(fused_gradients, "_MOST_SEQUENCES", case.B * case.K - 1)
    assert _lowered(case).count("custom_call @mosaic_gpu") == 2


@pytest.mark.parametrize(("name", "heads"), FEWER_HEADS[-4:])
def test_heads_that_the_cache_does_not_hold_are_left_to_other_programs(name, heads, monkeypatch):
    case = FUSED[name]
    _hold(monkeypatch, heads, case.T, case.H)
    S = -(-(case.S or case.T) // case.block_kv) * case.block_kv
    text = _lowered(case)
    assert text.count("custom_call @mosaic_gpu") == 1
    # dk and dv of each part, which are then added up.
    assert text.count(f"tensor<{case.B}x{S}x{case.K}x{case.G // heads}x{case.H}xbf16>") >= 2


def test_elsewhere_gradients_are_the_same():
    arguments, (d_out, _) = make_inputs(Case(B=1, K=1, G=1, T=64, dense=0.0, bias=False))
    operands = [arguments.pop(name) for name in "qkv"]
    two, one = (
        _gradients(deterministic, "xla")(operands, arguments["table"], d_out)
        for deterministic in (True, False)
    )
    jax.tree.map(np.testing.assert_array_equal, two, one)
