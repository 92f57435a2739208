"""The log-sum-exp of blocks, against the same written in float64."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.kernels import block_logsumexp
from routing_jax.kernels.block_lse import xla
from routing_jax.kernels.block_lse.implementation import LseInputs
from routing_jax.kernels.block_lse.mosaic_gpu import shape_refusal

from ..cuda_lowering import lower_for_cuda


class Case(NamedTuple):
    B: int = 2
    M: int = 5
    G: int = 3
    K: int = 2
    P: int = 40
    S: int = 64
    R: int = 16
    J: int = 13
    first: int = 1


def make_inputs(case, dtype, seed=0):
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.normal(size=(case.B, case.M, case.G * case.K, case.R)), dtype)
    keys = jnp.asarray(rng.normal(size=(case.P, case.K, case.S, case.R)), dtype)
    pages = jnp.asarray(rng.integers(0, case.P, (case.B, case.J)), jnp.int32)
    ends = jnp.asarray(rng.integers(0, case.J + 1, (case.B, case.M)), jnp.int32)
    return q, keys, pages, ends.at[0, 0].set(case.J).at[0, -1].set(0)


def oracle(case, q, keys, pages, ends, scale):
    q, keys = np.asarray(q, np.float64), np.asarray(keys, np.float64)
    out = np.full((case.B, case.M, case.G * case.K, case.J), -np.inf)
    for b, m in np.ndindex(case.B, case.M):
        for j in range(case.first, int(ends[b, m])):
            own = keys[pages[b, j]].repeat(case.G, axis=0)  # N S R
            logits = np.einsum("nr,nsr->ns", q[b, m], own) * scale
            out[b, m, :, j] = np.logaddexp.reduce(logits, axis=-1)
    return out


def check(case, dtype, implementation, seed=0, scale=0.5, limit=2e-5):
    arrays = make_inputs(case, dtype, seed)
    call = functools.partial(
        block_logsumexp, scale=scale, first=case.first, implementation=implementation
    )
    got, want = jax.jit(call)(*arrays), oracle(case, *arrays, scale)
    assert got.dtype == jnp.float32
    # Products of 16-bit numbers are exact in float32.
    np.testing.assert_allclose(got, want, rtol=limit, atol=limit)


CASES = {
    "several tiles": Case(),
    "one query, as in decoding": Case(M=1, G=4, K=3, R=32, J=30),
    "more queries than a tile holds": Case(M=50, G=4, S=128, J=9),
    "no sink": Case(first=0, B=1),
    "sink past the end": Case(first=13),
    "one block": Case(J=1, first=0),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_xla_agrees_with_float64(name, dtype):
    check(CASES[name], dtype, "xla")


def test_xla_in_parts_is_xla_at_once(monkeypatch):
    arrays = make_inputs(Case(), "float32")
    whole = block_logsumexp(*arrays, scale=0.5)
    monkeypatch.setattr(xla, "_LOGITS", 3 * 2 * 5 * 6 * 64)  # three blocks
    np.testing.assert_allclose(block_logsumexp(*arrays, scale=0.5), whole, rtol=1e-6)


def test_what_is_not_asked_for_may_be_anything():
    """Keys of others, pages of nobody: they reach nothing."""
    q, keys, pages, ends = make_inputs(Case(), "float32")
    want = block_logsumexp(q, keys, pages, ends, scale=0.5, first=1)
    asked = jnp.arange(13)[None] < ends.max(axis=1, keepdims=True)
    elsewhere = jnp.where(asked & (jnp.arange(13)[None] >= 1), pages, -7)
    listed = jnp.isin(jnp.arange(40), elsewhere)
    broken = jnp.where(listed[:, None, None, None], keys, jnp.nan)
    got = block_logsumexp(q, broken, elsewhere, ends, scale=0.5, first=1)
    np.testing.assert_array_equal(got, want)


def test_softmax_of_it_is_what_a_softmax_over_keys_gives_each_block():
    q, keys, pages, _ = make_inputs(Case(B=1, M=1, G=1, K=1), "float32")
    ends = jnp.full((1, 1), 13)
    shares = jax.nn.softmax(block_logsumexp(q, keys, pages, ends, scale=0.5))[0, 0, 0]
    logits = keys[pages[0], 0] @ q[0, 0, 0] / 2
    want = jax.nn.softmax(logits.ravel()).reshape(13, -1).sum(axis=1)
    np.testing.assert_allclose(shares, want, rtol=1e-4)


LOWERED = {
    "decoding": (Case(B=1, M=1, G=4, K=8, S=128, R=32, J=1024), "bfloat16"),
    "a prompt": (Case(M=64, K=3, S=128, J=64), "bfloat16"),
    "small pages": (Case(R=64), "float16"),
    "large pages of whole heads": (Case(S=256, R=128), "bfloat16"),
}


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_hopper_without_one(name):
    from routing_jax.kernels.block_lse.mosaic_gpu.kernel import run_on_hopper

    case, dtype = LOWERED[name]
    arrays = jax.eval_shape(lambda: make_inputs(case, dtype))
    assert shape_refusal(LseInputs(*arrays[:3], case.first, arrays[3])) is None

    def run(q, keys, pages, ends):
        return run_on_hopper(0.1, LseInputs(q, keys, pages, case.first, ends))

    assert lower_for_cuda(run, *arrays).count("custom_call @mosaic_gpu") == 1
    found = jax.eval_shape(run, *arrays)
    assert found.shape == (case.B, case.M, case.G * case.K, case.J)
    assert found.dtype == jnp.float32


REFUSED = {
    "float32": (Case(), "float32", "float16 and bfloat16, and q has dtype float32"),
    "page size": (Case(S=32), "bfloat16", r"page sizes are \(64, 128, 256\), and the pool's is 32"),
    "channels": (Case(R=8), "bfloat16", r"channels are \(16, 32, 64, 128\), and q has 8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_says_what_it_does_not_support_and_what_can(name):
    case, dtype, sentence = REFUSED[name]
    with pytest.raises(NotImplementedError, match=sentence + "; xla can"):
        block_logsumexp(*make_inputs(case, dtype), scale=1.0, implementation="mosaic_gpu")


BAD = {
    "channels": (
        {"keys": jnp.ones((4, 2, 8, 5))},
        r"keys \[P,K,S,R\] must have shape \(P, K, S, 4",
    ),
    "heads": ({"keys": jnp.ones((4, 4, 8, 4))}, "N must be a multiple of keys's heads K"),
    "dtype": ({"q": jnp.ones((1, 3, 6, 4), jnp.bfloat16)}, "keys must have dtype bfloat16"),
    "pages": ({"pages": jnp.zeros((2, 3), jnp.int32)}, r"pages \[B,J\] must have shape \(1, J\)"),
    "ends": ({"ends": jnp.zeros((1, 2), jnp.int32)}, r"ends \[B,M\] must have shape \(1, 3\)"),
    "integers": ({"ends": jnp.zeros((1, 3))}, "ends must have dtype int32; it has float32"),
    "first": ({"first": -1}, "first is -1; it must be at least 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_sentence(name):
    changes, sentence = BAD[name]
    good = {"q": jnp.ones((1, 3, 6, 4)), "keys": jnp.ones((4, 2, 8, 4))}
    good |= {"pages": jnp.zeros((1, 5), jnp.int32), "ends": jnp.zeros((1, 3), jnp.int32)}
    with pytest.raises(ValueError, match=sentence) as refusal:
        block_logsumexp(**(good | changes), scale=1.0)
    assert "\n" not in str(refusal.value)


@pytest.mark.gpu
class TestMosaicGpu:
    @pytest.mark.parametrize("name", CASES)
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_agrees_with_float64(self, name, dtype):
        check(CASES[name], dtype, "mosaic_gpu")

    @pytest.mark.parametrize("channels", [16, 32, 64, 128])
    @pytest.mark.parametrize("page_size", [64, 128, 256])
    def test_takes_all_sizes_that_it_names(self, channels, page_size):
        check(Case(R=channels, S=page_size), "bfloat16", "mosaic_gpu", seed=1)

    def test_refills_its_buffers_many_times(self):
        check(Case(B=40, M=33, G=4, J=150, P=200), "bfloat16", "mosaic_gpu", seed=2)
        check(Case(B=1, M=1, K=1, J=2000, P=2000), "bfloat16", "mosaic_gpu", seed=3)

    def test_logits_beyond_what_powers_hold(self):
        check(Case(), "bfloat16", "mosaic_gpu", scale=100.0)

    def test_repeats_bitwise(self):
        arrays = make_inputs(Case(M=50, J=40), "bfloat16")
        runs = [block_logsumexp(*arrays, scale=1.0, implementation="mosaic_gpu") for _ in range(2)]
        np.testing.assert_array_equal(*runs)
