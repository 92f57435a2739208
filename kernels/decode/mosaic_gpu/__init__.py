"""Block-sparse decoding on NVIDIA Hopper, through Mosaic GPU.

Decoding is bound by the bytes of keys and values, so the work of one sequence and kv head is cut
into splits of its page list until the chip has two programs a multiprocessor. Each split gives
its own softmax (`kernel` says how) and its log-sum-exp; a small XLA computation merges
them exactly. How many splits there are is fixed by shapes; which pages a split takes follows from
the row's own count, so that short rows spread over the chip too.
"""

import jax

from routing_jax.kernels.decode.implementation import DecodeImplementation, DecodeInputs
from routing_jax.kernels.decode.mosaic_gpu.tiling import shape_refusal
from routing_jax.kernels.hopper import hopper_refusal, mesh_refusal

__all__ = ["MOSAIC_GPU"]


def _run(scale: float, inputs: DecodeInputs) -> tuple[jax.Array, jax.Array]:
    # Here, because importing Mosaic takes seconds and few processes run it.
    from routing_jax.kernels.decode.mosaic_gpu.splits import run_on_hopper

    return run_on_hopper(scale, inputs)


def _refusal(inputs: DecodeInputs) -> str | None:
    return shape_refusal(inputs) or mesh_refusal() or hopper_refusal()


MOSAIC_GPU = DecodeImplementation("mosaic_gpu", _refusal, _run)
