"""The forward pass on TPUs.

A program is a table row: a query tile of one kv head, with the G heads of its group below each
other. Its list of blocks is copied to scalar memory row by row, ahead of the program, so that a
table of any size fits; the program then loops over exactly the blocks that the row names, or over
all that the tile sees if the row is dense, and copies them through a ring of buffers.

Logits stand transposed, keys below each other and queries along the lanes, so that what belongs
to a query (maximum, sum, position, lse) is one row of lanes and nothing is reduced across lanes:
Sᵀ = K·Qᵀ, Oᵀ = Vᵀ·Pᵀ. The sums are float32, and so is the online softmax.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from routing_jax.kernels.block_sparse.implementation import (
    AttentionInputs,
    AttentionOptions,
    AttentionOutputs,
)
from routing_jax.kernels.block_sparse.mosaic_tpu.call import (
    LOG2_E,
    Geometry,
    from_query_tiles,
    prepare,
)
from routing_jax.kernels.block_sparse.mosaic_tpu.rows import (
    compiler_params,
    cost_estimate,
    for_each_block,
    row_operands,
)
from routing_jax.kernels.tpu_arrays import multiply


def forward(options: AttentionOptions, inputs: AttentionInputs) -> AttentionOutputs:
    """Block-sparse attention; see `Implementation.forward`."""
    geometry, arrays = prepare(options, inputs)
    R, H = geometry.R, geometry.H
    specs, operands, ring = row_operands(geometry, arrays)
    tile = pl.BlockSpec((None, None, R, H), lambda x, m: (x, m, 0, 0))
    line = pl.BlockSpec((None, None, 1, R), lambda x, m: (x, m, 0, 0))
    out, lse = pl.pallas_call(
        functools.partial(_program, geometry),
        grid=(geometry.X, geometry.M),
        in_specs=[specs, tile],
        out_specs=(tile, line),
        out_shape=(
            jax.ShapeDtypeStruct(arrays.q.shape, arrays.q.dtype),
            jax.ShapeDtypeStruct((geometry.X, geometry.M, 1, R), jnp.float32),
        ),
        scratch_shapes=[pltpu.VMEM((H, R), jnp.float32), ring],
        compiler_params=compiler_params(geometry, inputs),
        cost_estimate=cost_estimate(geometry, arrays, 2, 2 * geometry.block_kv, 2 * arrays.q.size),
        name="block_sparse_forward",
    )(operands, arrays.q)
    out = from_query_tiles(geometry, out)[..., : inputs.q.shape[-1]].astype(inputs.q.dtype)
    return AttentionOutputs(out, from_query_tiles(geometry, lse[:, :, 0]))


def _program(geometry: Geometry, inputs, q_ref, out_ref, lse_ref, sums, ring):
    """One program: see the module."""
    sums[...] = jnp.zeros(sums.shape, jnp.float32)

    def add_blocks(step, count, listed, logits, k, v, state):
        del step, count, listed, k
        largest, total = state
        new = jnp.maximum(largest, logits.max(axis=0, keepdims=True))
        shift = jnp.where(new == -jnp.inf, 0.0, new)
        weights = jnp.exp2(logits - jnp.broadcast_to(shift, logits.shape))
        shrink = jnp.exp2(largest - shift)
        piece = multiply(v, weights.astype(v.dtype), (0, 0))
        sums[...] = sums[...] * jnp.broadcast_to(shrink, sums.shape) + piece
        return new, total * shrink + weights.sum(axis=0, keepdims=True)

    line = (1, geometry.R)
    piece = max(1, geometry.tiles.piece // geometry.block_kv)
    start = jnp.full(line, -jnp.inf, jnp.float32), jnp.zeros(line, jnp.float32)
    largest, total = for_each_block(geometry, inputs, ring, q_ref[...], add_blocks, start, piece)
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    share = jnp.where(some, 1.0 / safe, 0.0)
    out = sums[...] * jnp.broadcast_to(share, sums.shape)
    out_ref[...] = out.astype(out_ref.dtype).T
    lse_ref[...] = jnp.where(some, largest / LOG2_E + jnp.log(safe), -jnp.inf)
