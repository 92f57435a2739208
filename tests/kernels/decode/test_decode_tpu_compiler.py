"""The TPU's own compiler takes the kernel: within VMEM, SMEM and HBM, or it would refuse."""

import itertools

import pytest

from routing_jax.evals.benchmarks.tpu_compiler import compile_cases, compiler_refusal
from routing_jax.evals.benchmarks.tpu_programs import CHIPS, TpuCase

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(compiler_refusal() is not None, reason=str(compiler_refusal())),
]

SPARSE = TpuCase(
    CHIPS["v5e"], "decode", 32768, 128, num_heads=32, num_kv_heads=8, batch=2, capacity=64
)
BRIEF = [
    SPARSE._replace(extras=True),
    SPARSE._replace(length=1 << 20, batch=1, capacity=0),
    SPARSE._replace(topology=CHIPS["v5p"], length=131072, head_dim=256, batch=1, capacity=512),
    SPARSE._replace(topology=CHIPS["v6e"], head_dim=64, capacity=0, extras=True),
    SPARSE._replace(topology=CHIPS["tpu7x"], num_heads=9, num_kv_heads=3, extras=True),
]


def refused(cases):
    """What the compiler refused, or made of it that it should not have."""
    found = []
    for case, report in zip(cases, compile_cases(cases), strict=True):
        if "error" in report:
            found.append((case, report["error"]))
            continue
        if report["kernels"] != 1 or report["gathers"]:
            found.append((case, f"{report['kernels']} kernels, {report['gathers']} all-gathers"))
        if report["temporary_bytes"] > report["argument_bytes"] / 16:  # the pool is not copied
            found.append((case, f"{report['temporary_bytes']} of {report['argument_bytes']} bytes"))
    return found


def test_the_tpu_compiler_takes_some_of_each_and_copies_no_pool():
    assert refused(BRIEF) == []


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_the_tpu_compiler_takes_the_whole_grid(chip):
    lengths, head_dims = (4096, 32768, 131072, 1 << 20), (64, 128, 256)
    one = SPARSE._replace(topology=CHIPS[chip], batch=1)
    grid = [
        one._replace(length=length, head_dim=head_dim, capacity=capacity)
        for length, head_dim, capacity in itertools.product(lengths, head_dims, (0, 64))
    ]
    assert refused(grid) == []


@pytest.mark.slow
def test_the_tpu_compiler_takes_every_kind_of_call():
    calls = [
        SPARSE._replace(dtype="float32", extras=True),
        SPARSE._replace(dtype="float32", num_kv_heads=1),
        SPARSE._replace(num_kv_heads=1, num_heads=16, head_dim=256, extras=True),
        SPARSE._replace(num_kv_heads=2, capacity=0, extras=True),
        SPARSE._replace(block=512, head_dim=96),
        SPARSE._replace(block=16, capacity=8192, batch=1, length=131072, extras=True),
        SPARSE._replace(length=1 << 20, capacity=8192, batch=1, extras=True),
        SPARSE._replace(topology="v5e:4x4", mesh=(2, 8), num_kv_heads=16),
    ]
    assert refused(calls) == []


@pytest.mark.slow
def test_small_pages_of_odd_head_dims_are_copied():
    """What `pool_view` says: these have no order in which tiles fit, in any kernel."""
    ((_, bytes_needed),) = refused([SPARSE._replace(block=64, head_dim=64)])
    assert "bytes" in bytes_needed
