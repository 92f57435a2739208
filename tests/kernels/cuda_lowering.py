"""Lowering for an H100 on a machine without one: what Mosaic GPU refuses, it refuses here."""

from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

_H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


def lower_for_cuda(function: Any, *arguments: Any) -> str:
    """The program's text, with its kernels as custom calls; `function` may be jitted already."""
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=_H100)
    with jax.sharding.use_abstract_mesh(mesh):
        jitted = function if hasattr(function, "trace") else jax.jit(function)
        return jitted.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
