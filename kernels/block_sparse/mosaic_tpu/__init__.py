"""Block-sparse attention for TPUs, in Pallas Mosaic TPU.

`call` cuts a call to size; `forward`, `query_gradients` and `key_gradients` are the kernels, with
`rows` looping over a table row, `ring` copying what the loops read and `masks` hiding logits;
`backward` joins the last two.
"""

from routing_jax.kernels.block_sparse.implementation import late_implementation
from routing_jax.kernels.block_sparse.mosaic_tpu.call import refusal

__all__ = ["MOSAIC_TPU"]


def _load():
    from routing_jax.kernels.block_sparse.mosaic_tpu.backward import backward
    from routing_jax.kernels.block_sparse.mosaic_tpu.forward import forward

    return forward, backward


MOSAIC_TPU = late_implementation("mosaic_tpu", refusal, _load)
