"""Whether the default device is a Hopper GPU, and what is the same on all of them."""

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


def num_multiprocessors() -> int:
    """Multiprocessors of the default device; those of an H100 where it is no GPU.

    >>> num_multiprocessors() > 0
    True
    """
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else 132
