"""The backward pass on TPUs: two kernels, for queries (with the bias) and for keys."""

import jax
import jax.numpy as jnp

from routing_jax.kernels.block_sparse.implementation import (
    AttentionGradients,
    AttentionInputs,
    AttentionOptions,
    AttentionOutputs,
    softmax_cotangents,
)
from routing_jax.kernels.block_sparse.mosaic_tpu.call import (
    LOG2_E,
    Geometry,
    from_query_tiles,
    prepare,
    query_tiles,
    widen,
)
from routing_jax.kernels.block_sparse.mosaic_tpu.key_gradients import columns, key_gradients
from routing_jax.kernels.block_sparse.mosaic_tpu.query_gradients import query_gradients


def backward(
    options: AttentionOptions,
    inputs: AttentionInputs,
    outputs: AttentionOutputs,
    d_out: jax.Array,
    d_lse: jax.Array,
) -> AttentionGradients:
    """The gradients of block-sparse attention; see `Implementation.backward`."""
    geometry, arrays = prepare(options, inputs)
    d_lse, delta = softmax_cotangents(outputs, d_out, d_lse)
    lse = jnp.where(outputs.lse == -jnp.inf, jnp.inf, outputs.lse)
    lse = query_tiles(geometry, lse * LOG2_E, fill=jnp.inf)
    stats = jnp.stack([lse, *(query_tiles(geometry, x) for x in (delta, d_lse))], axis=2)
    d_tiles = query_tiles(geometry, widen(geometry, d_out.astype(inputs.q.dtype)))
    dq, d_bias = query_gradients(geometry, inputs, arrays, d_tiles, stats)
    listed = columns(options, geometry, inputs, arrays)
    dk, dv = key_gradients(geometry, inputs, arrays, d_tiles, stats, listed)
    if inputs.block_bias is not None and d_bias is not None:
        d_bias = d_bias.reshape(inputs.block_bias.shape).astype(inputs.block_bias.dtype)
    return AttentionGradients(
        from_query_tiles(geometry, dq)[..., : inputs.q.shape[3]].astype(inputs.q.dtype),
        _from_key_blocks(geometry, dk, inputs.k),
        _from_key_blocks(geometry, dv, inputs.v),
        d_bias,
    )


def _from_key_blocks(geometry: Geometry, blocks: jax.Array, like: jax.Array) -> jax.Array:
    x = blocks.reshape(geometry.B, geometry.K, geometry.J, geometry.block_kv, geometry.H)
    x = x.transpose(0, 2, 3, 1, 4).reshape(geometry.B, -1, geometry.K, geometry.H)
    return x[:, : geometry.S, :, : like.shape[3]].astype(like.dtype)
