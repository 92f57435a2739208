"""Block-sparse attention for Hopper GPUs, in Pallas Mosaic GPU.

`call` cuts a call to size; `forward`, `query_gradients`, `key_gradients` and `fused_gradients` are
the kernels, with `items` dealing out the work of the first two, `columns` that of the others, and
`masks` hiding logits; `backward` joins the second and third, or takes the fourth in their place.
"""

from routing_jax.kernels.block_sparse.implementation import late_implementation
from routing_jax.kernels.block_sparse.mosaic_gpu.call import refusal

__all__ = ["MOSAIC_GPU"]


def _load():
    from routing_jax.kernels.block_sparse.mosaic_gpu.backward import backward
    from routing_jax.kernels.block_sparse.mosaic_gpu.forward import forward

    return forward, backward


MOSAIC_GPU = late_implementation("mosaic_gpu", refusal, _load)
