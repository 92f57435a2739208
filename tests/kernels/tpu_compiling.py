"""Compiling for a TPU on a machine without one, in a process of its own that libtpu may own."""

import json
import os
import subprocess
import sys
from typing import Any

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def compile_attention(topology: str, **sizes: Any) -> dict[str, int]:
    """Compiles block-sparse attention and its gradients with the TPU's own compiler.

    Args:
      topology: such as 'v5e:2x2'.
      sizes: of `_program`.

    Returns:
      How many kernels the program calls, and the bytes it needs beside arguments and results.
    """
    command = [sys.executable, __file__, topology, json.dumps(sizes)]
    environment = os.environ | _ENVIRONMENT
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _program(T, H, blocks=128, dtype="bfloat16", features=True):
    """Forward and backward as one function, and the shapes of what it takes."""
    import jax

    from routing_jax.kernels.block_sparse.implementation import AttentionInputs, AttentionOptions
    from routing_jax.kernels.block_sparse.mosaic_tpu.backward import backward
    from routing_jax.kernels.block_sparse.mosaic_tpu.call import unsupported
    from routing_jax.kernels.block_sparse.mosaic_tpu.forward import forward
    from routing_jax.kernels.block_table import BlockTable

    B, N, K, C, M = 1, 8, 2, 16, T // blocks
    shape = jax.ShapeDtypeStruct
    q, k = shape((B, T, N, H), dtype), shape((B, T, K, H), dtype)
    table = BlockTable(shape((B, K, M), "int32"), shape((B, K, M, C), "int32"), blocks, blocks)
    extra = (None, None, None)
    if features:
        ids = shape((B, T), "int32")
        extra = (shape((B, K, M, C), "float32"), ids, ids)
    options, inputs = AttentionOptions(True, H**-0.5), AttentionInputs(q, k, k, table, *extra)
    assert unsupported(options, inputs) is None

    def program(inputs, d_out, d_lse):
        outputs = forward(options, inputs)
        return outputs, backward(options, inputs, outputs, d_out, d_lse)

    return program, (inputs, q, shape((B, T, N), "float32"))


def _main(topology: str, sizes: dict[str, Any]) -> None:
    import jax
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

    program, arguments = _program(**sizes)
    device = topologies.get_topology_desc(topology, platform="tpu").devices[0]
    sharding = SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    kind = AbstractDevice(device.device_kind, num_cores=device.num_cores, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=kind)):
        lowered = jax.jit(program).trace(*arguments).lower(lowering_platforms=("tpu",))
        compiled = lowered.compile()
    kernels = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    memory = compiled.memory_analysis().temp_size_in_bytes
    print(json.dumps({"kernels": kernels, "memory": memory}))


if __name__ == "__main__":
    _main(sys.argv[1], json.loads(sys.argv[2]))
