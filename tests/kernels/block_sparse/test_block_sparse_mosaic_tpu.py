import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from routing_jax.evals.benchmarks.tpu_programs import TpuCase, attention_inputs, program
from routing_jax.kernels import block_sparse_attention
from routing_jax.kernels.block_sparse.mosaic_tpu import call
from routing_jax.kernels.block_sparse.mosaic_tpu.tiles import Tiles
from routing_jax.kernels.block_sparse.reference import reference_attention

from ..jaxprs import kernel_costs, scalar_memory
from .attention_suite import AttentionSuite, Case, make_inputs, outputs_and_gradients

SMALL = Case(B=1, T=100, K=1, capacity=2, dense=0.0)


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels run on the CPU; what they read out of bounds or unwritten is an error or nan."""
    monkeypatch.setattr(call, "tpu_refusal", lambda: None)
    # Four blocks in a turn, in two pieces, and two tiles: rows and columns are short here.
    tiles = Tiles(keys=256, piece=64, query_tiles=2)
    monkeypatch.setattr(call, "tiles_for", lambda device_kind: tiles)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
class TestMosaicTpu(AttentionSuite):
    implementation = "mosaic_tpu"
    dtypes = ("float32", "bfloat16", "float16")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        dataclasses.replace(SMALL, G=3, positions=True, B=2, segments=True, dense=0.5, S=130),
        dataclasses.replace(SMALL, T=500, capacity=7, dense=0.5),
    ],
    ids=["listed", "dense, compacted, in segments", "many blocks at once"],
)
def test_equals_masked_dense_attention_in_brief(case, capfd):
    """On two cores, whose races the interpreter prints."""
    arguments, cotangents = make_inputs(case)
    bias = arguments["block_bias"]
    arguments["block_bias"] = jnp.where(bias < -1, -jnp.inf, bias)

    def attend(**arguments):
        return block_sparse_attention(**arguments, implementation="mosaic_tpu", return_lse=True)

    parameters = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    with pltpu.force_tpu_interpret_mode(parameters):
        got = outputs_and_gradients(attend, arguments, cotangents)
    expected = outputs_and_gradients(reference_attention, arguments, cotangents)
    for name, value in got.items():
        np.testing.assert_allclose(value, expected[name], atol=2e-5, err_msg=name)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"T": 64}, "it needs a TPU"),
        ({"H": 320}, "head dims up to 256, and q has 320"),
        ({"block_q": 32}, "blocks of 64, 128, 256, 512, and the table has 32×64"),
        ({"G": 32, "H": 256, "block_q": 256, "T": 256}, "in 40 MiB, and this call needs"),
        ({"capacity": 16385, "B": 1}, "up to 16384 slots, and the table has 16385"),
    ],
)
def test_refuses_what_it_cannot_run(changes, sentence):
    arguments, _ = make_inputs(dataclasses.replace(SMALL, **changes))
    with pytest.raises(NotImplementedError, match=sentence):
        block_sparse_attention(**arguments, implementation="mosaic_tpu")


def test_the_compiler_is_told_what_full_rows_take():
    case = TpuCase(
        "v5e:2x2", "forward", 4096, 128, num_heads=8, num_kv_heads=2, batch=3, capacity=4
    )
    costs = []
    for name in ("forward", "backward"):
        function, arguments, _, _ = program(case._replace(program=name))
        costs += kernel_costs(jax.make_jaxpr(function)(*arguments))
    logits = 3 * 8 * 4096 * 4 * 128  # of each query and head, with four blocks of keys
    assert [cost.flops for cost in costs] == [2 * n * logits * 128 for n in (2, 3, 4)]
    assert [cost.transcendentals for cost in costs] == [logits] * 3
    q, kv, steps = 3 * 8 * 4096 * 128, 2 * 3 * 2 * 4096 * 128, 3 * 2 * 32 * 4
    block, tile = 2 * 128 * 128, 2 * 4 * 128 * 128  # k and v; q and d_out with four heads
    elements = 2 * q + steps * block, 3 * q + steps * block, 2 * kv + steps * tile
    assert [cost.bytes_accessed for cost in costs] == [2 * number for number in elements]


@pytest.mark.parametrize(("name", "kernels"), [("forward", 1), ("backward", 2)])
@pytest.mark.parametrize("length", [1 << 15, 1 << 20])
def test_the_longest_rows_take_half_of_scalar_memory_at_any_length(name, kernels, length):
    longest = TpuCase("v5e:2x2", name, length, 64, 1, block=64, capacity=16384, extras=True)
    function, arguments, _, _ = program(longest)
    held = scalar_memory(jax.make_jaxpr(function)(*arguments))
    assert len(held) == kernels
    assert all(0 < size <= 2**19 for size in held)


@pytest.mark.parametrize(("kind", "piece"), [("TPU v5 lite", 128), ("TPU v5", 128), ("TPU7x", 512)])
def test_tiles_are_those_of_the_device_that_is_compiled_for(kind, piece):
    device = AbstractDevice(kind, 1, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        sizes = call.sizes_of(*attention_inputs(TpuCase("v5e:2x2", "forward", 4096, 128)))
    assert sizes.tiles.piece == piece


def test_sizes_are_positive():
    with pytest.raises(ValueError, match="piece is 0; it must be at least 1"):
        Tiles(piece=0)
