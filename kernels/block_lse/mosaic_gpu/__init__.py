"""The log-sum-exp of blocks on NVIDIA Hopper, through Mosaic GPU; `kernel` says how."""

import jax
import jax.numpy as jnp

from routing_jax.kernels.block_lse.implementation import LseImplementation, LseInputs
from routing_jax.kernels.hopper import hopper_refusal, mesh_refusal

__all__ = ["MOSAIC_GPU", "shape_refusal"]

_PAGE_SIZES = (64, 128, 256)
_CHANNELS = (16, 32, 64, 128)


def shape_refusal(inputs: LseInputs) -> str | None:
    """None, or why not even a Hopper GPU runs this call here.

    Args:
      inputs: the call.

    >>> q, keys, one = jnp.ones((1, 1, 1, 16)), jnp.ones((1, 1, 64, 16)), jnp.ones((1, 1), int)
    >>> shape_refusal(LseInputs(q, keys, one, 0, one))
    'it computes in float16 and bfloat16, and q has dtype float32'
    """
    S, R = inputs.keys.shape[2:]
    if inputs.q.dtype == jnp.float32:
        return "it computes in float16 and bfloat16, and q has dtype float32"
    if S not in _PAGE_SIZES:
        return f"its page sizes are {_PAGE_SIZES}, and the pool's is {S}"
    if R not in _CHANNELS:
        return f"its numbers of channels are {_CHANNELS}, and q has {R}"
    return None


def _run(scale: float, inputs: LseInputs) -> jax.Array:
    # Here, because importing Mosaic takes seconds and few processes run it.
    from routing_jax.kernels.block_lse.mosaic_gpu.kernel import run_on_hopper

    return run_on_hopper(scale, inputs)


def _refusal(inputs: LseInputs) -> str | None:
    return shape_refusal(inputs) or mesh_refusal() or hopper_refusal()


MOSAIC_GPU = LseImplementation("mosaic_gpu", _refusal, _run)
