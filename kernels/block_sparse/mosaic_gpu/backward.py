"""The backward pass on Hopper: two kernels, for queries and for keys, and the bias between them.

Where gradients need not be repeatable, one kernel for both, if it takes the call.
"""

import jax
import jax.numpy as jnp

from routing_jax.kernels.block_sparse.implementation import (
    AttentionGradients,
    AttentionInputs,
    AttentionOptions,
    AttentionOutputs,
    softmax_cotangents,
)
from routing_jax.kernels.block_sparse.mosaic_gpu.call import (
    Columns,
    Geometry,
    Output,
    prepare,
)
from routing_jax.kernels.block_sparse.mosaic_gpu.fused_gradients import (
    fits_fused,
    fused_gradients,
)
from routing_jax.kernels.block_sparse.mosaic_gpu.key_gradients import key_gradients
from routing_jax.kernels.block_sparse.mosaic_gpu.query_gradients import query_gradients
from routing_jax.kernels.block_table import BlockTable
from routing_jax.kernels.block_transpose import dense_runs, transpose_table
from routing_jax.kernels.hopper import LOG2_E
from routing_jax.kernels.padding import pad_axis


def backward(
    options: AttentionOptions,
    inputs: AttentionInputs,
    outputs: AttentionOutputs,
    d_out: jax.Array,
    d_lse: jax.Array,
) -> AttentionGradients:
    """The gradients of block-sparse attention; see `Implementation.backward`."""
    geometry, arrays = prepare(options, inputs)
    T = arrays.q.shape[1]
    d_lse, delta = softmax_cotangents(outputs, d_out, d_lse)
    lse = jnp.where(outputs.lse == -jnp.inf, jnp.inf, outputs.lse * LOG2_E)
    output = Output(
        pad_axis(pad_axis(d_out.astype(inputs.q.dtype), 3, geometry.H), 1, T),
        pad_axis(lse.swapaxes(1, 2), 2, T, fill=jnp.inf),
        pad_axis(delta.swapaxes(1, 2), 2, T),
    )
    columns = _columns(options, geometry, inputs)
    d_bias = None
    if not options.deterministic and fits_fused(geometry, arrays):
        dq, dk, dv = fused_gradients(geometry, arrays, output, columns)
    else:
        dq, ds, p = query_gradients(geometry, arrays, output)
        dk, dv = key_gradients(geometry, arrays, output, columns)
    if inputs.block_bias is not None:
        d_lse = pad_axis(d_lse.swapaxes(1, 2), 2, T)
        d_bias = _bias_gradient(geometry, inputs.table, arrays.lengths, ds, p, d_lse)
        d_bias = d_bias.astype(inputs.block_bias.dtype)
    length, head_dim = inputs.k.shape[1], inputs.q.shape[-1]
    return AttentionGradients(
        dq[:, : inputs.q.shape[1], :, :head_dim],
        dk[:, :length, :, :head_dim],
        dv[:, :length, :, :head_dim],
        d_bias,
    )


def _columns(options: AttentionOptions, geometry: Geometry, inputs: AttentionInputs) -> Columns:
    transposed = transpose_table(inputs.table, geometry.J)
    first_dense, dense_counts = dense_runs(
        inputs.table,
        transposed,
        geometry.T,
        geometry.S,
        q_positions=inputs.q_positions,
        causal=options.causal,
    )
    return Columns(
        transposed.offsets, transposed.entries, transposed.dense_tiles, first_dense, dense_counts
    )


def _bias_gradient(geometry: Geometry, table: BlockTable, lengths, ds, p, d_lse) -> jax.Array:
    """[B,K,M,C] float32: dS summed over each slot's keys, the tile's queries and the group's heads.

    A query's dS sum to its dLSE over all its blocks. The computed ones miss that by what rounding
    did to δ, which can exceed what is left of a block's sum, so each block gives back its share.
    """
    B, _, C, _ = ds.shape
    slot = jnp.arange(C, dtype=jnp.int32)
    visited = (slot[None, None, None] < lengths[..., None]) & ~table.dense[..., None]  # B K M C
    visited = jnp.broadcast_to(visited, (B, geometry.K, geometry.M, C))

    def by_tile(x):  # B N C T -> B K G C M block_q
        return x.reshape(B, geometry.K, geometry.G, C, geometry.M, geometry.block_q)

    seen = visited.transpose(0, 1, 3, 2)[:, :, None, :, :, None]
    ds, p = (jnp.where(seen, by_tile(x), 0.0) for x in (ds, p))
    miss = ds.sum(axis=3) - d_lse.reshape(B, geometry.K, geometry.G, geometry.M, geometry.block_q)
    return (ds - p * miss[:, :, :, None]).sum(axis=(2, 5)).transpose(0, 1, 3, 2)
