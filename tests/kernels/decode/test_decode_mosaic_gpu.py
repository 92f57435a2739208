import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.kernels import PageList, block_sparse_decode, contiguous_pages, dense_pages
from routing_jax.kernels.decode.implementation import DecodeInputs
from routing_jax.kernels.decode.merge import merge_splits
from routing_jax.kernels.decode.mosaic_gpu.splits import run_on_hopper
from routing_jax.kernels.decode.mosaic_gpu.tiling import decode_tiling, shape_refusal
from routing_jax.kernels.decode.reference import reference_decode

from ..cuda_lowering import lower_for_cuda
from .decode_suite import Case, DecodeSuite, clean, error, make_inputs

SHARED_MEMORY = 227 * 1024  # what a program may have on Hopper


def shapes_of(case: Case, dtype: str) -> DecodeInputs:
    rows = (case.B, 1 if case.one_list else case.K)
    pool = (9, case.page_size, case.K, case.H)

    def array(shape, kind="int32"):
        return jax.ShapeDtypeStruct(shape, kind)

    return DecodeInputs(
        array((case.B, case.T, case.K * case.G, case.H), dtype),
        array(pool, dtype),
        array(pool, dtype),
        PageList(array(rows), array((*rows, case.capacity)), array((*rows, case.capacity))),
        array((case.B,)),
        array((case.B, case.K, case.capacity), "float32") if case.bias else None,
    )


LOWERED = {
    "one query": (Case(H=128, page_size=128, G=4, capacity=64, bias=False), "bfloat16"),
    "head dim 64, groups of 3": (Case(G=3, T=3), "float16"),
    "head dim 96": (Case(H=96, one_list=True), "bfloat16"),
    "head dim 256": (Case(H=256, page_size=128, T=8), "float16"),
    "groups of 16, eight queries": (Case(H=128, G=16, T=8, one_list=True), "bfloat16"),
    "the same, head dim 256": (Case(H=256, G=16, T=8), "bfloat16"),
    "large pages, one slot": (Case(page_size=256, capacity=1, K=1, G=1), "bfloat16"),
}


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_hopper_without_one(name):
    case, dtype = LOWERED[name]
    inputs = shapes_of(case, dtype)
    assert shape_refusal(inputs) is None
    run = functools.partial(run_on_hopper, 0.1)
    assert lower_for_cuda(run, inputs).count("custom_call @mosaic_gpu") == 1
    out, lse = jax.eval_shape(run, inputs)
    assert (out.shape, out.dtype) == (inputs.q.shape, inputs.q.dtype)
    assert (lse.shape, lse.dtype) == (inputs.q.shape[:3], jnp.float32)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("queries", [1, 64, 128])
def test_tiling_fits_the_chip_and_fills_it(head_dim, queries):
    alone = queries <= 64 and head_dim <= 128
    for rows, capacity in ((1, 1), (8, 64), (64, 64), (64, 1024), (1000, 1024)):
        tiling = decode_tiling(rows, queries, head_dim, 128, capacity)
        tiles = 2 * 64 * head_dim * -(-queries // 64), tiling.stages * 4 * 64 * head_dim
        assert tiling.stages >= 2
        # With two programs on a multiprocessor, each also takes 1 KiB of its 228.
        assert sum(tiles) + 512 <= (113 * 1024 if alone else SHARED_MEMORY)
        programs = rows * tiling.splits
        assert tiling.splits == 1 or programs <= 132 * (2 if alone else 1)
        assert tiling.splits <= capacity
    busy = decode_tiling(64, 4, 128, 128, 64), decode_tiling(8, 4, 128, 128, 64)
    assert [64 * busy[0].splits, 8 * busy[1].splits] == [256, 256]


REFUSED = {
    "float32": (Case(), "float32", "float16 and bfloat16, and q has dtype float32"),
    "head dim": (Case(H=32), "bfloat16", r"head dims are \(64, 96, 128, 256\), and q has 32"),
    "page size": (Case(page_size=32), "bfloat16", "multiples of 64, and the pool's is 32"),
    "rows": (Case(G=17, T=8), "bfloat16", "at most 128 rows a kv head, and they are 17 times 8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_says_what_it_does_not_support_and_what_can(name):
    case, dtype, sentence = REFUSED[name]
    arguments = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes_of(case, dtype))
    with pytest.raises(NotImplementedError, match=sentence + "; xla can") as refusal:
        block_sparse_decode(*arguments[:5], implementation="mosaic_gpu")
    assert "\n" not in str(refusal.value)


def test_needs_hopper_only_when_it_is_named():
    arguments = clean(make_inputs(Case(), "bfloat16"))
    if jax.default_backend() == "cpu":
        with pytest.raises(NotImplementedError, match=r"needs an NVIDIA Hopper GPU.*; xla can"):
            block_sparse_decode(**arguments, implementation="mosaic_gpu")
    assert block_sparse_decode(**arguments).shape == arguments["q"].shape


def test_merged_splits_equal_the_softmax_over_all_keys():
    rng = np.random.default_rng(0)
    B, K, S, R, H, keys = 2, 2, 4, 3, 8, 5
    logits = rng.normal(size=(B, K, S, R, keys)) * 4
    logits[0, :, 1] = -np.inf  # a split without keys
    logits[1, 1, :, 2] = -np.inf  # and a row without any
    values = rng.normal(size=(B, K, S, keys, H))
    weights = np.exp(logits)
    sums = weights.sum(-1)
    outs = np.einsum("bksrp,bksph->bksrh", weights, values) / np.where(sums, sums, 1)[..., None]
    with np.errstate(divide="ignore"):
        lses, expected_lse = np.log(sums), np.log(sums.sum(2))
    expected = np.einsum("bksrp,bksph->bkrh", weights, values)
    expected /= np.where(sums.sum(2), sums.sum(2), 1)[..., None]
    out, lse = merge_splits(jnp.asarray(outs, jnp.float32), jnp.asarray(lses, jnp.float32))
    assert error(out, expected) < 1e-6
    assert error(lse, expected_lse) < 1e-6
    assert (np.asarray(out[1, 1, 2]) == 0).all()


@pytest.mark.gpu
class TestMosaicGpu(DecodeSuite):
    implementation = "mosaic_gpu"
    dtypes = ("float16", "bfloat16")

    @pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
    def test_two_warpgroups_share_what_is_fetched(self, head_dim):
        case = Case(K=1, G=16, T=8, H=head_dim, B=3, capacity=20, blocks=24, page_size=128)
        self.check_against_oracle(case, "bfloat16")

    def test_takes_many_splits_of_many_steps(self):
        case = Case(B=2, K=1, G=4, H=128, capacity=700, blocks=800, bias=False)
        self.check_against_oracle(case, "bfloat16")
        self.check_against_oracle(
            dataclasses.replace(case, B=40, capacity=60, blocks=64), "bfloat16"
        )

    def test_hides_pages_outside_the_pool_and_pages_without_weight(self):
        arguments = make_inputs(Case(bias=False, B=2, H=128, seed=4), "bfloat16")
        lengths = jnp.array([300, 384])
        pages = dense_pages(contiguous_pages(2, 6), lengths, 64)
        bad = pages.pages.at[0, 0, 1].set(99).at[1, 0, 0].set(-1)
        weightless = jnp.zeros((2, 2, 6)).at[0, 0, 2].set(-jnp.inf).at[1, 1].set(-jnp.inf)
        listed = clean(arguments) | {"lengths": lengths, "pages": pages._replace(pages=bad)}
        listed["block_bias"] = weightless
        out, lse = self.decode(**listed)
        decode = jax.jit(
            lambda listed: block_sparse_decode(**listed, implementation="xla", return_lse=True)
        )
        expected_out, expected_lse = decode(listed)
        assert error(out, expected_out) < self.limit("bfloat16")
        assert error(lse, expected_lse) < 3e-6
        assert (np.asarray(out[1, :, 2:], float) == 0).all()

    def test_repeats_bitwise(self):
        arguments = make_inputs(Case(B=8, H=128, capacity=40, blocks=48), "bfloat16")
        first, second = self.decode(**arguments), self.decode(**arguments)
        for a, b in zip(first, second):
            np.testing.assert_array_equal(np.asarray(a, float), np.asarray(b, float))

    @pytest.mark.parametrize("head_dim", [64, 128, 256])
    def test_errs_at_most_twice_as_much_as_dense_attention(self, head_dim):
        rng = np.random.default_rng(1)
        B, S, K, G = 2, 2048, 2, 4
        q, k, v = (
            jnp.asarray(rng.normal(size=(B, length, heads, head_dim)), jnp.bfloat16)
            for length, heads in ((1, K * G), (S, K), (S, K))
        )
        lengths = jnp.array([1000, S])
        dense = jax.nn.dot_product_attention(
            q, k, v, key_value_seq_lengths=lengths, implementation="xla"
        )
        arguments = {
            "q": q,
            "k_pool": k.reshape(-1, 64, K, head_dim),
            "v_pool": v.reshape(-1, 64, K, head_dim),
            "pages": dense_pages(contiguous_pages(B, S // 64), lengths, 64),
            "lengths": lengths,
        }
        out, _ = self.decode(**arguments)
        expected, _ = reference_decode(**arguments)
        assert error(out, expected) <= 2 * error(dense, expected)
