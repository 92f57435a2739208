"""Block-sparse attention for TPUs, in Pallas Mosaic TPU.

`call` cuts a call to size; `forward`, `query_gradients` and `key_gradients` are the kernels, with
`rows` looping over a table row, `ring` copying what the loops read and `masks` hiding logits;
`backward` joins the last two.
"""

import functools

from routing_jax.kernels.batching import fold_vmap
from routing_jax.kernels.block_sparse.implementation import (
    AttentionGradients,
    AttentionInputs,
    AttentionOptions,
    AttentionOutputs,
    Implementation,
)
from routing_jax.kernels.block_sparse.mosaic_tpu.call import refusal

__all__ = ["MOSAIC_TPU"]


def _forward(options: AttentionOptions, inputs: AttentionInputs) -> AttentionOutputs:
    # Here, because importing Mosaic takes seconds and few processes run it.
    from routing_jax.kernels.block_sparse.mosaic_tpu.forward import forward

    run = functools.partial(forward, options)
    return fold_vmap(run, inputs.q.shape[0], inputs)


def _backward(
    options: AttentionOptions, inputs: AttentionInputs, *outputs_and_cotangents
) -> AttentionGradients:
    from routing_jax.kernels.block_sparse.mosaic_tpu.backward import backward

    run = functools.partial(backward, options)
    return fold_vmap(run, inputs.q.shape[0], inputs, *outputs_and_cotangents)


MOSAIC_TPU = Implementation("mosaic_tpu", refusal, _forward, _backward)
