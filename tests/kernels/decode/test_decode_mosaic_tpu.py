import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from routing_jax.evals.benchmarks.tpu_programs import TpuCase, program
from routing_jax.kernels import block_sparse_decode, contiguous_pages, dense_pages
from routing_jax.kernels.decode.mosaic_tpu import tiling
from routing_jax.kernels.decode.mosaic_tpu.pool_view import PoolView, pool_view

from ..jaxprs import kernel_costs, scalar_memory
from .decode_suite import Case, DecodeSuite, clean, error, make_inputs

PAIRS = Case(B=2, K=4, G=2, T=2, H=128, page_size=128, capacity=3, blocks=4)


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels run on the CPU; what they read out of bounds or unwritten is an error or nan."""
    monkeypatch.setattr(tiling, "tpu_refusal", lambda: None)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        yield


@pytest.fixture
def words_of_pairs(monkeypatch):
    """The interpreter cannot read memory as words: XLA turns pairs of heads into words before."""
    arrange = PoolView.arrange

    def with_words(self, pool):
        pool = arrange(self, pool)
        if self.heads == 1:
            return pool
        pairs = pool.reshape(*pool.shape[:2], -1, 2, pool.shape[3]).swapaxes(3, 4)
        return jax.lax.bitcast_convert_type(pairs, jnp.uint32)

    monkeypatch.setattr(PoolView, "arrange", with_words)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted", "words_of_pairs")
class TestMosaicTpu(DecodeSuite):
    implementation = "mosaic_tpu"
    dtypes = ("float32", "bfloat16")

    @pytest.mark.parametrize("one_list", [False, True])
    @pytest.mark.parametrize(
        "sizes", [{}, {"K": 3, "page_size": 32}, {"H": 64}, {"page_size": 512}]
    )
    def test_reads_pools_in_every_order(self, sizes, one_list):
        case = dataclasses.replace(PAIRS, **sizes, one_list=one_list)
        self.check_against_oracle(case, "bfloat16")

    def test_reads_long_lists_in_parts(self, monkeypatch):
        monkeypatch.setattr(tiling, "_SCALARS", 8 * 128 * 24)
        case = Case(B=2, K=1, H=128, page_size=16, capacity=150, blocks=200, T=2, bias=False)
        self.check_against_oracle(case, "float32")
        self.check_against_oracle(dataclasses.replace(case, bias=True, seed=2), "float32")

    def test_hides_pages_outside_the_pool_and_pages_without_weight(self):
        arguments = clean(make_inputs(Case(bias=False, B=2, seed=4), "float32"))
        lengths = jnp.array([300, 384])
        pages = dense_pages(contiguous_pages(2, 6), lengths, 64)
        bad = pages.pages.at[0, 0, 1].set(99).at[1, 0, 0].set(-1)
        weightless = jnp.zeros((2, 2, 6)).at[0, 0, 2].set(-jnp.inf).at[1, 1].set(-jnp.inf)
        arguments |= {"lengths": lengths, "block_bias": weightless}

        @jax.jit  # what is traced is not checked
        def results(pages):
            return [
                block_sparse_decode(**arguments | more, implementation=name, return_lse=True)
                for name, more in (("mosaic_tpu", {"pages": pages}), ("xla", {"pages": pages}))
            ]

        (out, lse), (expected_out, expected_lse) = results(pages._replace(pages=bad))
        assert error(out, expected_out) < 3e-6
        assert error(lse, expected_lse) < 3e-6
        assert (np.asarray(out[1, :, 2:]) == 0).all()

    def test_has_no_races_on_two_cores(self, capfd):
        arguments = clean(make_inputs(dataclasses.replace(PAIRS, B=3), "float32"))
        parameters = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
        with pltpu.force_tpu_interpret_mode(parameters):
            jax.block_until_ready(self.decode(**arguments))
        assert "RACE" not in capfd.readouterr().out


@pytest.mark.usefixtures("interpreted", "words_of_pairs")
def test_equals_attention_to_the_pages_in_brief():
    """Groups of pairs of heads, a sequence of length 0, one that has just begun, and a bias."""
    TestMosaicTpu().check_against_oracle(PAIRS, "bfloat16")


@pytest.mark.parametrize(
    ("shape", "dtype", "order", "heads"),
    [
        ((9, 128, 8, 128), "bfloat16", "heads", 2),
        ((9, 64, 8, 256), "float32", "heads", 1),
        ((9, 128, 3, 128), "bfloat16", "rows", 1),
        ((9, 128, 1, 128), "bfloat16", "rows", 1),
        ((9, 128, 12, 128), "bfloat16", "rows", 1),
        ((9, 128, 8, 64), "bfloat16", "columns", 1),
        ((9, 64, 8, 64), "bfloat16", "rows", 1),
    ],
)
def test_takes_a_pool_as_it_lies(shape, dtype, order, heads):
    view = pool_view(jnp.zeros(shape, dtype))
    assert (view.order, view.heads) == (order, heads)


@pytest.mark.parametrize(
    ("changes", "dtype", "sentence"),
    [
        ({}, "bfloat16", "it needs a TPU"),
        ({}, "float16", "in bfloat16 and float32, and q has dtype float16"),
        ({"H": 320}, "bfloat16", "head dims up to 256, and q has 320"),
        ({"page_size": 48}, "bfloat16", r"\(16, 32, 64, 128, 256, 512\), and the pool's is 48"),
        ({"K": 129, "G": 1}, "bfloat16", "up to 128 kv heads, and the pool has 129"),
        ({"K": 128, "G": 16, "T": 8, "H": 128}, "bfloat16", "in 40 MiB, and this call needs"),
    ],
)
def test_refuses_what_it_cannot_run(changes, dtype, sentence):
    case = dataclasses.replace(Case(B=2, capacity=1, blocks=1), **changes)
    with pytest.raises(NotImplementedError, match=sentence + ".*; xla can") as refusal:
        block_sparse_decode(**make_inputs(case, dtype), implementation="mosaic_tpu")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("capacity", "pages"), [(0, 32), (4, 4)])
def test_the_compiler_is_told_what_full_lists_read(capacity, pages):
    case = TpuCase("v5e:2x2", "decode", 4096, 128, 32, 2, batch=3, capacity=capacity)
    function, arguments, _, _ = program(case)
    (cost,) = kernel_costs(jax.make_jaxpr(function)(*arguments))
    keys = 3 * 2 * pages * 128
    assert cost.bytes_accessed == 2 * 2 * keys * 128  # keys and values in bfloat16
    assert cost.flops == 2 * 2 * 16 * keys * 128  # scores and values of 16 heads a group
    assert cost.transcendentals == 16 * keys


@pytest.mark.parametrize(
    "case",
    [
        TpuCase("v5e:2x2", "decode", 1 << 20, 128, 32, 8, capacity=8192, extras=True),
        TpuCase("v5e:2x2", "decode", 1 << 20, 64, 64, 64, block=16, capacity=65536, extras=True),
        TpuCase("v5e:2x2", "decode", 1 << 20, 128, 32, 8, block=16, extras=True),
    ],
    ids=["128 a page", "16 a page, 64 heads", "one list of all"],
)
def test_lists_of_a_million_keys_take_half_of_scalar_memory(case):
    function, arguments, _, _ = program(case)
    (held,) = scalar_memory(jax.make_jaxpr(function)(*arguments))
    assert 0 < held <= 2**19
