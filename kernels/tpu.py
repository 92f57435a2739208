"""Whether the default device is a TPU, and what is the same on all of them."""

import jax

LANES = 128


def device_kind() -> str:
    """The device that is compiled for: the abstract mesh's, or else the default one.

    >>> device_kind() == jax.devices()[0].device_kind
    True
    """
    target = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if target is None else target.device_kind


def tpu_refusal() -> str | None:
    """Why kernels for TPUs cannot run on the default device; None if they can.

    >>> tpu_refusal() is None or "TPU" in tpu_refusal()
    True
    """
    device = jax.devices()[0]
    if device.platform == "tpu":
        return None
    return f"it needs a TPU and the default device is {device.device_kind}"
