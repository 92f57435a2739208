"""Block-sparse attention for Hopper GPUs, in Pallas Mosaic GPU.

`call` cuts a call to size; `forward`, `query_gradients` and `key_gradients` are the kernels, with
`items` dealing out their work and `masks` hiding logits; `backward` joins the last two.
"""

from routing_jax.kernels.block_sparse.implementation import late_implementation
from routing_jax.kernels.block_sparse.mosaic_gpu.call import refusal

__all__ = ["MOSAIC_GPU"]


def _load():
    from routing_jax.kernels.block_sparse.mosaic_gpu.backward import backward
    from routing_jax.kernels.block_sparse.mosaic_gpu.forward import forward

    return forward, backward


MOSAIC_GPU = late_implementation("mosaic_gpu", refusal, _load)
