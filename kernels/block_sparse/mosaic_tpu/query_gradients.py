"""The backward pass on TPUs, first half: dq and the gradient of the bias.

Programs are the forward pass's, and so is the loop over a row's blocks. A step recomputes
Pᵀ = exp(Sᵀ − lse), forms dSᵀ = Pᵀ·(V·dOᵀ − δ) and adds Kᵀ·dSᵀ to dqᵀ, in float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from routing_jax.kernels.block_sparse.implementation import AttentionInputs
from routing_jax.kernels.block_sparse.mosaic_tpu.call import Arrays, Geometry, blocks_together
from routing_jax.kernels.block_sparse.mosaic_tpu.rows import (
    compiler_params,
    cost_estimate,
    for_each_block,
    row_operands,
)
from routing_jax.kernels.block_table import ceil_div
from routing_jax.kernels.tpu_arrays import multiply

_SUBLANES = 8


def query_gradients(
    geometry: Geometry, inputs: AttentionInputs, arrays: Arrays, d_out: jax.Array, stats: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """The gradients dq [X,M,R,H] and, with a bias, d_bias [X,M,C] float32.

    Args:
      geometry: the call's sizes.
      inputs: the call, for the memory it needs.
      arrays: the call's arrays.
      d_out: [X,M,R,H].
      stats: [X,M,3,R] float32: lse times log2 e (+inf where nothing was seen, so that P = 0), δ and
        dLSE.
    """
    R, H, C = geometry.R, geometry.H, geometry.C
    specs, operands, ring = row_operands(geometry, arrays)

    def of_row(*shape):
        return pl.BlockSpec((None, None, *shape), lambda x, m: (x, m, 0, 0))

    out_specs = [of_row(R, H)]
    out_shape = [jax.ShapeDtypeStruct(arrays.q.shape, arrays.q.dtype)]
    scratch = [pltpu.VMEM((H, R), jnp.float32), ring]
    if arrays.bias is not None:
        slots = ceil_div(C, _SUBLANES) * _SUBLANES
        out_specs.append(of_row(1, slots))
        out_shape.append(jax.ShapeDtypeStruct((geometry.X, geometry.M, 1, slots), jnp.float32))
        scratch += [pltpu.VMEM((slots, R), jnp.float32)] * 2
    dq, *d_bias = pl.pallas_call(
        functools.partial(_program, geometry),
        grid=(geometry.X, geometry.M),
        in_specs=[specs, of_row(R, H), of_row(R, H), of_row(3, R)],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        compiler_params=compiler_params(geometry, inputs),
        cost_estimate=cost_estimate(geometry, arrays, 3, 2 * geometry.block_kv, 3 * arrays.q.size),
        name="block_sparse_query_gradients",
    )(operands, arrays.q, d_out, stats)
    return dq, d_bias[0][:, :, 0, :C] if d_bias else None


def _program(geometry: Geometry, inputs, q_ref, d_out_ref, stats_ref, dq_ref, *refs):
    """One program: see the module."""
    has_bias = "bias" in inputs
    d_bias_ref, sums, ring, *of_slots = refs if has_bias else (None, *refs)
    for ref in (sums, *of_slots):
        ref[...] = jnp.zeros(ref.shape, jnp.float32)
    lse, delta, d_lse = (stats_ref[i : i + 1] for i in range(3))

    def add_blocks(step, count, listed, logits, k, v, miss):
        weights = jnp.exp2(logits - jnp.broadcast_to(lse, logits.shape))
        d_weights = multiply(v, d_out_ref[...], (1, 1))
        ds = weights * (d_weights - jnp.broadcast_to(delta, logits.shape))
        sums[...] += multiply(k, ds.astype(k.dtype), (0, 0))
        if has_bias:
            pieces = [
                (x.sum(axis=0, keepdims=True) for x in jnp.split(y, count)) for y in (ds, weights)
            ]
            for i, of_block in enumerate(zip(*pieces)):

                @pl.when(listed)
                def _(i=i, of_block=of_block):
                    for ref, value in zip(of_slots, of_block):
                        ref[pl.ds(step + i, 1)] = value

                miss += of_block[0]
        return miss

    undivided = blocks_together(geometry)[0]
    miss = for_each_block(geometry, inputs, ring, q_ref[...], add_blocks, -d_lse, undivided)
    dq_ref[...] = (sums[...] * geometry.scale).T.astype(dq_ref.dtype)
    if d_bias_ref is not None:
        # A query's dS sum to its dLSE over all blocks. The computed ones miss that by what
        # rounding did to δ, which can exceed what is left of a block's sum, so each block gives
        # back its share. The product with ones sums over lanes and turns slots into lanes.
        ds, weights = (ref[...] for ref in of_slots)
        exact = ds - weights * jnp.broadcast_to(miss, ds.shape)
        ones = jnp.ones((_SUBLANES, geometry.R), jnp.float32)
        d_bias_ref[...] = multiply(ones, exact, (1, 1))[:1]
