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
    LOG2_E,
    Arrays,
    Geometry,
    blocks_together,
    vector_memory,
)
from routing_jax.kernels.block_sparse.mosaic_tpu.masks import hide
from routing_jax.kernels.block_sparse.mosaic_tpu.ring import Span, for_each_step, ring_shapes
from routing_jax.kernels.block_sparse.mosaic_tpu.tiles import ring_stages
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


def cost_estimate(
    geometry: Geometry, arrays: Arrays, products: int, copied: int, once: int
) -> pl.CostEstimate:
    """What the compiler may assume: rows that are full and not dense, which no shape tells.

    A step takes so many `products` of a tile and a block, for which `copied` rows of H elements
    come from main memory; `once` elements are read or written once.
    """
    steps = geometry.X * geometry.M * min(geometry.C, geometry.J)
    logits = geometry.R * geometry.block_kv
    return pl.CostEstimate(
        flops=2 * products * steps * logits * geometry.H,
        transcendentals=steps * logits,
        bytes_accessed=arrays.kv.dtype.itemsize * (steps * copied * geometry.H + once),
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
    streamed = {"kv": arrays.kv}
    if arrays.k_segments is not None:
        streamed["k_segments"] = arrays.k_segments
    streamed = {name: in_main_memory(x) for name, x in streamed.items()}
    specs |= {name: pl.BlockSpec(memory_space=pltpu.HBM) for name in streamed}
    stages = ring_stages(blocks_together(geometry)[0])
    ring = ring_shapes(stages, *((x.shape[1:], x.dtype) for x in streamed.values()))
    return specs, of_row | {"queries": arrays.queries} | streamed, ring


def for_each_block(geometry: Geometry, inputs, ring, q, add_blocks, state, smallest: int) -> Any:
    """Calls add_blocks(first step, count, slots are listed, logits, k, v, state) for this row.

    It takes `count` blocks at a time: the logits [count·block_kv,R] come scaled, with their bias,
    in powers of two, and −inf where hidden; k and v are [count·block_kv,H]. A turn is taken in two
    pieces if they have `smallest` blocks at least.
    """
    x = pl.program_id(0)
    row, queries = inputs["rows"], inputs["queries"]
    length, dense = row[0, 0], row[0, 1] > 0

    def block_of(step):
        slot = jnp.minimum(step, geometry.C - 1)
        return jnp.clip(jnp.where(dense, step, row[0, HEADER + slot]), 0, geometry.J - 1)

    def sources(step):
        block = block_of(step)
        blocks = [inputs["kv"].at[x * geometry.J + block]]
        if "k_segments" in inputs:
            blocks.append(inputs["k_segments"].at[lax.div(x, geometry.K) * geometry.J + block])
        return blocks

    def logits_of(first, count, step, buffers):
        def finish(i, logits):
            if "bias" in inputs:
                slot = jnp.minimum(step + i, geometry.C - 1)
                logits += jnp.where(dense, 0.0, inputs["bias"][0, slot])
            k_segments = buffers[1][first + i] if "k_segments" in inputs else None
            return hide(geometry, logits, queries[...], block_of(step + i), k_segments)

        k = buffers[0][first : first + count, 0].reshape(-1, geometry.H)
        logits = multiply(k, q, (1, 1)) * (geometry.scale * LOG2_E)
        return jnp.concatenate([finish(i, x) for i, x in enumerate(jnp.split(logits, count))])

    def take(count, step, buffers, state):
        size = max(min(count, smallest), count // 2)
        following = logits_of(0, size, step, buffers)
        for first in range(0, count, size):
            # The matrix units work on the next piece's logits while this one's become weights.
            logits = following
            if first + size < count:
                following = logits_of(first + size, size, step + first + size, buffers)
            k, v = (buffers[0][first : first + size, i].reshape(-1, geometry.H) for i in range(2))
            state = add_blocks(step + first, size, jnp.logical_not(dense), logits, k, v, state)
        return state

    counts = blocks_together(geometry)
    spans = [Span(length, count, functools.partial(take, count)) for count in counts]
    return for_each_step(spans, sources, ring, state)
