"""Whether the default device is a TPU, and what is the same on all of them."""

import jax

LANES = 128


def tpu_refusal() -> str | None:
    """Why kernels for TPUs cannot run on the default device; None if they can.

    >>> tpu_refusal() is None or "TPU" in tpu_refusal()
    True
    """
    device = jax.devices()[0]
    if device.platform == "tpu":
        return None
    return f"it needs a TPU and the default device is {device.device_kind}"
