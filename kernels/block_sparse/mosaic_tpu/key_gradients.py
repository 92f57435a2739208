"""The backward pass on TPUs, second half: dk and dv.

A program is a key block of one kv head: it keeps K and V and loops over the tiles that attend to
the block, each with all heads of its group, so that the sums over queries and heads stay in one
place, in float32 and in a fixed order. Which tiles those are stands in one list for each kv head
(the listed entries of the transposed table, then the dense tiles), of which a program reads two
runs, through a page of scalar memory.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from routing_jax.kernels.block_sparse.implementation import AttentionInputs, AttentionOptions
from routing_jax.kernels.block_sparse.mosaic_tpu.call import (
    LOG2_E,
    Arrays,
    Geometry,
    per_head,
    tiles_together,
)
from routing_jax.kernels.block_sparse.mosaic_tpu.masks import hide
from routing_jax.kernels.block_sparse.mosaic_tpu.ring import Span, for_each_step, ring_shapes
from routing_jax.kernels.block_sparse.mosaic_tpu.rows import compiler_params, cost_estimate
from routing_jax.kernels.block_sparse.mosaic_tpu.tiles import ring_stages
from routing_jax.kernels.block_table import ceil_div
from routing_jax.kernels.block_transpose import dense_runs, transpose_table
from routing_jax.kernels.padding import pad_axis
from routing_jax.kernels.tpu_arrays import in_main_memory, multiply

_PAGE = 1024


class Columns(NamedTuple):
    """The table by columns.

    Attributes:
      runs: [X,J,1,4] int32: where the block's entries start in the list, how many they are, where
        its dense tiles start, and how many they are.
      tiles: [X·pages,1,1024] int32, the list, X times as many pages as one takes.
      bias: like tiles, float32: the bias of each entry; None without one.
    """

    runs: jax.Array
    tiles: jax.Array
    bias: jax.Array | None


def columns(
    options: AttentionOptions, geometry: Geometry, inputs: AttentionInputs, arrays: Arrays
) -> Columns:
    """The table's transpose as the kernel reads it."""
    transposed = transpose_table(inputs.table, geometry.J)
    C, M, J = geometry.C, geometry.M, geometry.J
    first_dense, dense = dense_runs(
        inputs.table,
        transposed,
        geometry.T,
        geometry.S,
        q_positions=inputs.q_positions,
        causal=options.causal,
    )
    starts = transposed.offsets[..., :-1]
    parts = starts, jnp.diff(transposed.offsets), M * C + first_dense, dense
    runs = jnp.stack([per_head(geometry, x) for x in parts], axis=-1)

    def pages(entries, dense):
        x = jnp.concatenate([entries, dense], axis=-1)
        return pad_axis(x, 1, ceil_div(x.shape[1], _PAGE) * _PAGE).reshape(-1, 1, _PAGE)

    entries, dense_tiles = (
        per_head(geometry, x) for x in (transposed.entries, transposed.dense_tiles)
    )
    bias = None
    if arrays.bias is not None:
        flat = arrays.bias.reshape(geometry.X, M * C)
        bias = jnp.take_along_axis(flat, entries, axis=1)
        bias = pages(bias, jnp.zeros(dense_tiles.shape, jnp.float32))
    return Columns(runs.reshape(geometry.X, J, 1, -1), pages(entries // C, dense_tiles), bias)


def key_gradients(
    geometry: Geometry,
    inputs: AttentionInputs,
    arrays: Arrays,
    d_out: jax.Array,
    stats: jax.Array,
    listed: Columns,
) -> tuple[jax.Array, jax.Array]:
    """The gradients dk and dv, [X·J,block_kv,H] each; arguments as of `query_gradients`."""
    X, M, J, R, H = geometry.X, geometry.M, geometry.J, geometry.R, geometry.H
    block = pl.BlockSpec((None, geometry.block_kv, H), lambda x, j: (x * J + j, 0, 0))
    operands = {"kv": arrays.kv, "runs": listed.runs}
    specs = {
        "kv": pl.BlockSpec((None, 2, geometry.block_kv, H), lambda x, j: (x * J + j, 0, 0, 0)),
        "runs": pl.BlockSpec(
            (None, None, 1, 4), lambda x, j: (x, j, 0, 0), memory_space=pltpu.SMEM
        ),
    }
    if arrays.k_segments is not None:
        operands["k_segments"] = arrays.k_segments
        specs["k_segments"] = pl.BlockSpec(
            (None, *arrays.k_segments.shape[1:]),
            lambda x, j: (lax.div(x, geometry.K) * J + j, 0, 0),
        )
    paged = {"tiles": listed.tiles} | ({} if listed.bias is None else {"bias": listed.bias})
    streamed = {
        "q": arrays.q.reshape(X * M, R, H),
        "d_out": d_out.reshape(X * M, R, H),
        "stats": stats.reshape(X * M, -1, R),
        "queries": arrays.queries.reshape(-1, *arrays.queries.shape[2:]),
    }
    copied = {name: in_main_memory(x) for name, x in (paged | streamed).items()}
    operands |= copied
    specs |= dict.fromkeys(copied, pl.BlockSpec(memory_space=pltpu.HBM))
    stages = ring_stages(tiles_together(geometry)[0])
    return pl.pallas_call(
        functools.partial(_program, geometry),
        grid=(X, J),
        in_specs=[specs],
        out_specs=(block, block),
        out_shape=(jax.ShapeDtypeStruct((X * J, geometry.block_kv, H), arrays.kv.dtype),) * 2,
        scratch_shapes=[
            pltpu.VMEM((geometry.block_kv, H), jnp.float32),
            pltpu.VMEM((geometry.block_kv, H), jnp.float32),
            ring_shapes(stages, *((x.shape[1:], x.dtype) for x in streamed.values())),
            [pltpu.SMEM((1, _PAGE), x.dtype) for x in paged.values()],
            pltpu.SMEM((1,), jnp.int32),
        ],
        compiler_params=compiler_params(geometry, inputs),
        cost_estimate=cost_estimate(geometry, arrays, 4, 2 * R, 2 * arrays.kv.size),
        name="block_sparse_key_gradients",
    )(operands)


def _program(geometry: Geometry, inputs, dk_ref, dv_ref, dk, dv, ring, pages, loaded):
    """One program: see the module."""
    x, block = pl.program_id(0), pl.program_id(1)
    run = inputs["runs"]
    start, count, dense_start, dense_count = (run[0, i] for i in range(4))
    num_pages = inputs["tiles"].shape[0] // geometry.X
    one_batch = inputs["queries"].shape[0] == geometry.M
    dk[...] = jnp.zeros(dk.shape, jnp.float32)
    dv[...] = jnp.zeros(dv.shape, jnp.float32)
    loaded[0] = -1

    def entry(step, page_of):
        """The list's entry for a step, from the page that holds it."""
        place = jnp.where(step < count, start + step, dense_start + step - count)
        page = x * num_pages + jnp.clip(lax.div(place, _PAGE), 0, num_pages - 1)

        @pl.when(loaded[0] != page)
        def _():
            for name, memory in zip(("tiles", "bias"), pages):
                pltpu.sync_copy(inputs[name].at[page], memory)
            loaded[0] = page

        return page_of[0, lax.rem(place, _PAGE)]

    def sources(step):
        tile = jnp.clip(entry(step, pages[0]), 0, geometry.M - 1)
        row = x * geometry.M + tile
        queries = tile if one_batch else lax.div(x, geometry.K) * geometry.M + tile
        rows = {"q": row, "d_out": row, "stats": row, "queries": queries}
        return [inputs[name].at[where] for name, where in rows.items()]

    def add_tiles(count, step, buffers, state):
        q, d_out = (buffer[...].reshape(-1, geometry.H) for buffer in buffers[:2])
        logits = multiply(inputs["kv"][0], q, (1, 1)) * (geometry.scale * LOG2_E)
        k_segments = inputs["k_segments"][...] if "k_segments" in inputs else None

        def finish(i, logits):
            if len(pages) > 1:
                logits += entry(step + i, pages[1])
            return hide(geometry, logits, buffers[3][i], block, k_segments)

        def stat(i):
            lines = [buffers[2][tile, i : i + 1] for tile in range(count)]
            return jnp.broadcast_to(jnp.concatenate(lines, axis=1), logits.shape)

        pieces = enumerate(jnp.split(logits, count, axis=1))
        logits = jnp.concatenate([finish(i, x) for i, x in pieces], axis=1)
        weights = jnp.exp2(logits - stat(0))
        ds = weights * (multiply(inputs["kv"][1], d_out, (1, 1)) - stat(1))
        dk[...] += multiply(ds.astype(q.dtype), q, (1, 0))
        dv[...] += multiply(weights.astype(q.dtype), d_out, (1, 0))
        return state

    spans = [
        Span(count + dense_count, at_once, functools.partial(add_tiles, at_once))
        for at_once in tiles_together(geometry)
    ]
    for_each_step(spans, sources, ring, 0)
    dk_ref[...] = (dk[...] * geometry.scale).astype(dk_ref.dtype)
    dv_ref[...] = dv[...].astype(dv_ref.dtype)
