"""Whether kernels for Hopper GPUs can run here, and what is the same on all of these."""

import jax

LOG2_E = 1.4426950408889634
WARPGROUP_ROWS = 64  # rows of a wgmma accumulator that one warpgroup holds


def hopper_refusal() -> str | None:
    """Why kernels for Hopper cannot run on the default device; None if they can.

    >>> hopper_refusal() is None or "Hopper" in hopper_refusal()
    True
    """
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform == "gpu" and capability.startswith("9."):
        return None
    return f"it needs an NVIDIA Hopper GPU and the default device is {device.device_kind}"


def mesh_refusal() -> str | None:
    """Why a kernel cannot run under the mesh that is set, if it is; None if it can.

    A partitioner does not split kernels. Inside `shard_map` each device has its part already.

    >>> mesh_refusal() is None
    True
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types))
    manual = jax.sharding.AxisType.Manual
    split = {name: size for name, size in mesh.shape.items() if size > 1 and kinds[name] != manual}
    return f"outside shard_map no kernel is split over a mesh of {split}" if split else None


def num_multiprocessors() -> int:
    """Multiprocessors of the default device; those of an H100 where it is no GPU.

    >>> num_multiprocessors() > 0
    True
    """
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else 132
