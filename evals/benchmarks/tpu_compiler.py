"""The TPU's own compiler on a machine without a TPU, in a process that libtpu may own.

The process reads its cases from standard input and writes a report a line:

    python -m routing_jax.evals.benchmarks.tpu_compiler
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from routing_jax.evals.benchmarks.running import error_text
from routing_jax.evals.benchmarks.tpu_bundles import kernel_schedules
from routing_jax.evals.benchmarks.tpu_programs import TpuCase, program

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_DUMP = (
    "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_.*"
)

Report = dict[str, Any]


def compiler_refusal() -> str | None:
    """Why nothing can be compiled for a TPU here; None if it can.

    >>> compiler_refusal() is None or "libtpu" in compiler_refusal()
    True
    """
    if importlib.util.find_spec("libtpu"):
        return None
    return "it needs libtpu, the TPU compiler: pip install 'routing_jax[tpu-aot]'"


def compile_cases(cases: Sequence[TpuCase], *, schedules: bool = False) -> Iterator[Report]:
    """Compiles cases one after the other in another process.

    Args:
      cases: what to compile.
      schedules: whether to read the kernels' final schedules too.

    Yields:
      For each case, in order: seconds, kernels (Pallas calls in the program), gathers (all-gathers
      in it), the bytes of arguments, results and temporaries on each chip, and peak_bytes of all
      together; with `schedules` also schedule, of `kernel_schedules`. A case that did not compile,
      or took the process down, gives only error. What exceeds a chip's VMEM, SMEM or HBM does not
      compile.
    """
    left = list(cases)
    while left:
        with tempfile.TemporaryDirectory() as folder:
            for report in _in_process(left, Path(folder), schedules):
                left.pop(0)
                yield report
            if left:
                said = (Path(folder) / "stderr").read_text().strip().splitlines()
                left.pop(0)
                yield {"error": f"the compiler died: {said[-1] if said else 'in silence'}"[:300]}


def _in_process(cases: Sequence[TpuCase], folder: Path, schedules: bool) -> Iterator[Report]:
    """The reports that a fresh process gives before it ends."""
    dump = folder / "dump"
    dump.mkdir()
    environment = os.environ | _ENVIRONMENT
    if schedules:
        environment["LIBTPU_INIT_ARGS"] = _DUMP.format(dump)
    wanted = {"cases": [case._asdict() for case in cases], "dump": str(dump) if schedules else None}
    (folder / "cases").write_text(json.dumps(wanted))
    command = [sys.executable, "-m", "routing_jax.evals.benchmarks.tpu_compiler"]
    with (
        open(folder / "cases") as stdin,
        open(folder / "stderr", "w") as stderr,
        subprocess.Popen(
            command, env=environment, stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                yield json.loads(line)
        finally:
            process.kill()


def _compile(case: TpuCase) -> Report:
    start = time.monotonic()
    devices: Any = topologies.get_topology_desc(case.topology, platform="tpu").devices
    sizes, names = tuple(case.mesh or (1, 1)), ("batch", "heads")
    types = (AxisType.Auto,) * 2
    mesh = Mesh(np.array(devices[: math.prod(sizes)]).reshape(sizes), names, axis_types=types)
    kind = AbstractDevice(devices[0].device_kind, devices[0].num_cores, platform="tpu")
    function, arguments, in_specs, out_specs = program(case)

    def place(spec: P, shapes: Any) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
        )

    arguments = jax.tree.map(place, in_specs, arguments, is_leaf=lambda x: isinstance(x, P))
    abstract = AbstractMesh(sizes, names, axis_types=types, abstract_device=kind)
    with jax.sharding.use_abstract_mesh(abstract):
        if case.mesh:
            function = jax.shard_map(
                function, in_specs=in_specs, out_specs=out_specs, check_vma=False
            )
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
        compiled = lowered.compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    return {
        "seconds": round(time.monotonic() - start, 1),
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "gathers": text.count(" all-gather"),
        "argument_bytes": memory.argument_size_in_bytes,
        "result_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
    }


def _main() -> None:
    """Compiles what standard input asks for. What libraries print goes to standard error."""
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    wanted = json.load(sys.stdin)
    folder = Path(wanted["dump"]) if wanted["dump"] else None
    for fields in wanted["cases"]:
        try:
            report = _compile(
                TpuCase(**fields | {"mesh": fields["mesh"] and tuple(fields["mesh"])})
            )
            if folder:
                report["schedule"] = kernel_schedules(folder)
        except Exception as error:  # one that does not compile must not cost the others
            report = {"error": error_text(error)}
        for path in folder.iterdir() if folder else ():
            path.unlink()
        print(json.dumps(report), file=reports, flush=True)


if __name__ == "__main__":
    _main()
