"""Block-sparse decoding on TPUs, through Pallas Mosaic TPU.

Decoding is bound by the bytes of keys and values. `pool_view` reads the pool as it lies in memory,
a page of one head at a time; `kernel` streams the pages of a sequence, one head after the other,
through a ring of buffers; `tiling` says how deep, and `call` cuts a call to size.
"""

import jax

from routing_jax.kernels.decode.implementation import DecodeImplementation, DecodeInputs
from routing_jax.kernels.decode.mosaic_tpu.tiling import refusal

__all__ = ["MOSAIC_TPU"]


def _run(scale: float, inputs: DecodeInputs) -> tuple[jax.Array, jax.Array]:
    # Here, because importing Mosaic takes seconds and few processes run it.
    from routing_jax.kernels.decode.mosaic_tpu.call import run_on_tpu

    return run_on_tpu(scale, inputs)


MOSAIC_TPU = DecodeImplementation("mosaic_tpu", refusal, _run)
