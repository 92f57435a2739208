"""What the kernels of table rows, forward and dq, share: their operands and their loop."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from routing_jax.kernels.block_sparse.implementation import AttentionInputs
from routing_jax.kernels.block_sparse.mosaic_tpu.call import (
    HEADER,
    STAGES,
    Arrays,
    Geometry,
    blocks_together,
    vector_memory,
)
from routing_jax.kernels.block_sparse.mosaic_tpu.masks import hide
from routing_jax.kernels.block_sparse.mosaic_tpu.ring import Span, for_each_step, ring_shapes
from routing_jax.kernels.tpu_arrays import in_main_memory, multiply


def compiler_params(geometry: Geometry, inputs: AttentionInputs) -> pltpu.CompilerParams:
    """Programs share nothing, so a chip with two cores may deal them out.

    Places in main memory are clamped or computed from shapes: checking them would take the scalar
    unit as long as a tenth of a step.
    """
    limit = max(2 * vector_memory(geometry, inputs), 16 * 2**20)
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel"),
        vmem_limit_bytes=min(limit, 56 * 2**20),
        disable_bounds_checks=True,
    )


def cost_estimate(geometry: Geometry, arrays: Arrays, products: int) -> pl.CostEstimate:
    """What the compiler may assume: rows that are full and not dense, which no shape tells.

    `products` is how many products of a tile and a block a step takes.
    """
    steps = geometry.X * geometry.M * min(geometry.C, geometry.J)
    logits = geometry.R * geometry.block_kv
    width = arrays.k.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * products * steps * logits * geometry.H,
        transcendentals=steps * logits,
        bytes_accessed=2 * width * (steps * geometry.block_kv * geometry.H + arrays.q.size),
    )


def row_operands(geometry: Geometry, arrays: Arrays) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """What a program of a table row reads besides q: specs, arrays, and the ring of its blocks."""
    of_row = {"rows": arrays.rows}
    if arrays.bias is not None:
        of_row["bias"] = arrays.bias
    one, parts = arrays.queries.shape[0] == 1, arrays.queries.shape[2]
    specs = {
        name: pl.BlockSpec(
            (None, None, 1, x.shape[3]), lambda x, m: (x, m, 0, 0), memory_space=pltpu.SMEM
        )
        for name, x in of_row.items()
    }
    specs["queries"] = pl.BlockSpec(
        (None, None, parts, geometry.R),
        lambda x, m: (0 if one else lax.div(x, geometry.K), m, 0, 0),
    )
    streamed = {"k": arrays.k, "v": arrays.v}
    if arrays.k_segments is not None:
        streamed["k_segments"] = arrays.k_segments
    streamed = {name: in_main_memory(x) for name, x in streamed.items()}
    specs |= {name: pl.BlockSpec(memory_space=pltpu.HBM) for name in streamed}
    stages = max(STAGES, 2 * blocks_together(geometry))
    ring = ring_shapes(stages, *((x.shape[1:], x.dtype) for x in streamed.values()))
    return specs, of_row | {"queries": arrays.queries} | streamed, ring


def for_each_block(geometry: Geometry, inputs, ring, q, add_blocks, state) -> Any:
    """Calls add_blocks(first step, count, slots are listed, logits, k, v, state) for this row.

    It takes `count` blocks at a time: the logits [count·block_kv,R] come scaled, with their bias,
    and −inf where hidden; k and v are [count·block_kv,H].
    """
    x = pl.program_id(0)
    row = inputs["rows"]
    length, dense, whole = row[0, 0], row[0, 1] > 0, row[0, 2]

    def block_of(step):
        slot = jnp.minimum(step, geometry.C - 1)
        return jnp.clip(jnp.where(dense, step, row[0, HEADER + slot]), 0, geometry.J - 1)

    def sources(step):
        block = block_of(step)
        blocks = [inputs[name].at[x * geometry.J + block] for name in ("k", "v")]
        if "k_segments" in inputs:
            blocks.append(inputs["k_segments"].at[lax.div(x, geometry.K) * geometry.J + block])
        return blocks

    def with_bias(step, logits):
        if "bias" not in inputs:
            return logits
        slot = jnp.minimum(step, geometry.C - 1)
        return logits + jnp.where(dense, 0.0, inputs["bias"][0, slot])

    def take(count, masked, step, buffers, state):
        k, v, *segments = (buffer[...].reshape(-1, buffer.shape[-1]) for buffer in buffers)
        logits = multiply(k, q, (1, 1)) * geometry.scale
        pieces = jnp.split(logits, count)
        logits = jnp.concatenate([with_bias(step + i, x) for i, x in enumerate(pieces)])
        if masked:
            k_segments = segments[0] if segments else None
            logits = hide(geometry, logits, inputs["queries"][...], block_of(step), k_segments)
        return add_blocks(step, count, jnp.logical_not(dense), logits, k, v, state)

    # Masks have a loop of their own: a branch would end what the compiler schedules together.
    together = blocks_together(geometry)
    spans = [
        Span(whole, count, functools.partial(take, count, False))
        for count in sorted({together, min(together, 2)}, reverse=True)
    ]
    spans.append(Span(length, 1, functools.partial(take, 1, True)))
    return for_each_step(spans, sources, ring, state, max(STAGES - 1, together))
