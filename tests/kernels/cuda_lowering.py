"""Lowering for an H100 on a machine without one: what Mosaic GPU refuses, it refuses here."""

from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh

_H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


def lower_for_cuda(function: Any, *arguments: Any) -> str:
    """The program's text, with its kernels as custom calls."""
    mesh = AbstractMesh((1,), ("x",), abstract_device=_H100)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(function).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()
