"""The TPU's own compiler takes the kernels: within VMEM, SMEM and HBM, or it would refuse."""

import itertools

import pytest

from routing_jax.evals.benchmarks.tpu_compiler import compile_cases, compiler_refusal
from routing_jax.evals.benchmarks.tpu_programs import CHIPS, TpuCase

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(compiler_refusal() is not None, reason=str(compiler_refusal())),
]

PLAIN = TpuCase(CHIPS["v5e"], "forward", 4096, 128)
SHARDED = PLAIN._replace(capacity=16, num_heads=16, num_kv_heads=4, batch=4, extras=True)
PAIRS = PLAIN._replace(num_heads=2)  # half as much to schedule, and to wait for
BRIEF = [
    PLAIN._replace(length=1 << 20, capacity=64),
    PAIRS._replace(topology=CHIPS["v5p"], length=131072, head_dim=256),
    PAIRS._replace(topology=CHIPS["v6e"], head_dim=64, length=32768, capacity=16, extras=True),
    PAIRS._replace(topology=CHIPS["tpu7x"], program="backward", head_dim=256),
    SHARDED._replace(topology="v5e:4x4", mesh=(4, 4), program="backward", num_heads=8),
]
WIDE = SHARDED._replace(
    topology="v5e:16x16", mesh=(16, 16), batch=16, num_heads=32, num_kv_heads=16
)


def refused(cases):
    """What the compiler refused, or made of it that it should not have."""
    found = []
    for case, report in zip(cases, compile_cases(cases), strict=True):
        if "error" in report:
            found.append((case, report["error"]))
            continue
        whole = report["argument_bytes"] + report["result_bytes"]
        if report["kernels"] != {"forward": 1, "backward": 2}[case.program]:
            found.append((case, f"{report['kernels']} kernels"))
        if report["gathers"]:
            found.append((case, f"{report['gathers']} all-gathers"))
        if report["temporary_bytes"] > 3 * whole:  # nothing grows with T·S
            found.append((case, f"{report['temporary_bytes']} bytes beside {whole}"))
    return found


def test_the_tpu_compiler_takes_some_of_each():
    assert refused(BRIEF) == []


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("program", ["forward", "backward"])
def test_the_tpu_compiler_takes_the_whole_grid(chip, program):
    lengths, head_dims = (4096, 32768, 131072, 1 << 20), (64, 128, 256)
    assert (
        refused(
            [
                TpuCase(CHIPS[chip], program, length, head_dim, capacity=capacity)
                for length, head_dim, capacity in itertools.product(lengths, head_dims, (0, 64))
            ]
        )
        == []
    )


@pytest.mark.slow
def test_the_tpu_compiler_takes_every_kind_of_call():
    backward = PLAIN._replace(program="backward", capacity=16)
    calls = [
        backward._replace(extras=True, num_heads=6, num_kv_heads=2),
        backward._replace(dtype="float32", block=256, extras=True),
        backward._replace(block=64, extras=True),
        backward._replace(block=512, head_dim=64),
    ]
    assert refused([*calls, *(call._replace(topology=CHIPS["v6e"]) for call in calls)]) == []


@pytest.mark.slow
@pytest.mark.parametrize("program", ["forward", "backward"])
def test_no_keys_are_gathered_across_chips(program):
    cases = [SHARDED._replace(topology="v5e:4x4", mesh=(4, 4)), WIDE]
    assert refused([case._replace(program=program) for case in cases]) == []


@pytest.mark.slow
def test_the_tpu_compiler_refuses_what_exceeds_a_chip():
    large = PLAIN._replace(length=1 << 20, head_dim=256, num_heads=64, num_kv_heads=16)
    splash = PLAIN._replace(program="splash", tiles=(4096, 4096, 4096))
    (_, hbm), (_, vmem) = refused([large, splash])
    assert "HBM" in hbm
    assert "vmem" in vmem


@pytest.mark.slow
def test_the_longest_rows_fit_scalar_memory():
    longest = PLAIN._replace(length=32768, num_heads=1, block=64, capacity=16384, extras=True)
    assert refused([longest, longest._replace(topology=CHIPS["tpu7x"])]) == []
