"""What the assembler says of the Hopper kernels: registers and spills, without a GPU.

    pip install --no-deps --target PLUGIN jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2
    export JAX_PLATFORMS= MOSAIC_GPU_DUMP_PTXAS=1 PYTHONPATH=.:PLUGIN
    python tests/kernels/hopper_resources.py

compiles forward and backward for an H100 described in text; ptxas comes from the path or from
/usr/local/cuda. A program that compiles may still wait for itself: this shows resources alone.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")
os.environ.setdefault("MOSAIC_GPU_CUDA_ROOT", "/usr/local/cuda")

import jax
from jax._src import xla_bridge
from jax._src.lib import xla_client
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from routing_jax.kernels import BlockTable
from routing_jax.kernels.block_sparse.implementation import (
    AttentionInputs,
    AttentionOptions,
    AttentionOutputs,
)
from routing_jax.kernels.block_sparse.mosaic_gpu.backward import backward
from routing_jax.kernels.block_sparse.mosaic_gpu.forward import forward

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def _device() -> jax.Device:
    spec = importlib.util.find_spec("jax_plugins.xla_cuda13")
    if spec is None or spec.origin is None:
        raise SystemExit("jax-cuda13-pjrt is not on the path; the module says how to get it.")
    library = str(Path(spec.origin).with_name("xla_cuda_plugin.so"))
    xla_bridge.register_plugin("cuda", library_path=library, priority=-1)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # raised where it is loaded already
        xla_client.load_pjrt_plugin_dynamically("cuda", library)
    return topologies.get_topology_desc(
        platform="cuda", topology_name="1x1x1", target_config=H100, topology="1 x 1 x 1"
    ).devices[0]


def main() -> None:
    """Compiles each pass at each head dim; ptxas writes what it used to standard error."""
    sharding = SingleDeviceSharding(_device())

    def array(shape: tuple[int, ...], dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    options = AttentionOptions(causal=True, scale=0.1)
    fused = dataclasses.replace(options, deterministic=False)
    for head_dim in (64, 128, 256):
        table = BlockTable(array((1, 2, 32), "int32"), array((1, 2, 32, 16), "int32"), 128, 128)
        q, kv = array((1, 4096, 8, head_dim)), array((1, 4096, 2, head_dim))
        inputs = AttentionInputs(q, kv, kv, table, None, None, None)
        lse = array((1, 4096, 8), "float32")
        print(f"forward, head dim {head_dim}", flush=True)
        jax.jit(functools.partial(forward, options)).lower(inputs).compile()
        print(f"dq, dk and dv, head dim {head_dim}", flush=True)
        outputs = AttentionOutputs(q, lse)
        gradients = functools.partial(backward, options)
        jax.jit(gradients).lower(inputs, outputs, q, lse).compile()
        if head_dim <= 128:
            print(f"dq, dk and dv in one kernel, head dim {head_dim}", flush=True)
            gradients = functools.partial(backward, fused)
            jax.jit(gradients).lower(inputs, outputs, q, lse).compile()


if __name__ == "__main__":
    main()
