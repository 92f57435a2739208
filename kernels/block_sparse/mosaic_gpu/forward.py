"""The forward pass on Hopper.

One program a multiprocessor works through a list of items. An item is 128 query rows that share
a table row: two chunks of 64 rows, which are parts of one head's tile or of two heads of the
group. Three warpgroups work on it:

* Two compute warpgroups hold a chunk each. For every piece of keys they multiply S = Q·Kᵀ into
  registers (wgmma), fold S into the running maximum and sum (online softmax, in base 2), and add
  P·V to the output in registers. A barrier between the two makes them take turns: while one has
  the tensor cores, the other computes exponentials. (Shah et al. 2024, FlashAttention-3,
  arXiv:2407.08608, section 3.1.)
* The memory warpgroup reads the row's block numbers from the table in global memory and copies
  those keys and values by TMA into a ring of shared-memory stages, as far ahead as stages are
  free: past the end of an item, too, so that the next one finds its queries and first keys there.
  `full` barriers tell the compute warpgroups that a stage has arrived, `empty` barriers tell the
  memory warpgroup that both have read it.

Rows ascend, so the blocks that every query of the tile sees whole come first: they run without
masks, and only the last few blocks of a row compare positions. Queries are read once and outputs
written once, through the shared memory of the queries; K and V are read once an item, from the
L2 cache for all but the first of the items that share a row, which run at the same time next to
each other. Items are dealt out by length, longest first (late tiles), forwards and backwards in
turn, so that programs end together.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from routing_jax.kernels.block_sparse.implementation import (
    AttentionInputs,
    AttentionOptions,
    AttentionOutputs,
)
from routing_jax.kernels.block_sparse.mosaic_gpu.call import Arrays, Geometry, prepare
from routing_jax.kernels.block_sparse.mosaic_gpu.items import Stream, for_each_item, stream_pieces
from routing_jax.kernels.block_sparse.mosaic_gpu.masks import hide, positions_of
from routing_jax.kernels.hopper import LOG2_E, WARPGROUP_ROWS, num_multiprocessors
from routing_jax.kernels.mosaic_arrays import accumulator, row_vector, tiled_smem

_COMPUTE = 2  # warpgroups
_ROWS = WARPGROUP_ROWS


def _pieces(geometry: Geometry) -> tuple[int, int]:
    """Keys a step, and stages of the ring: what fits registers and 227 KB of shared memory."""
    keys = min(geometry.block_kv, 64 if geometry.H > 128 else 128)
    return keys, 4 if geometry.H * keys <= 64 * 128 else 2


def _query_buffers(geometry: Geometry) -> int:
    """Two where they fit, so that an item's queries arrive while the last is computed."""
    return 1 if geometry.H > 128 else 2


def forward(options: AttentionOptions, inputs: AttentionInputs) -> AttentionOutputs:
    """Block-sparse attention; see `Implementation.forward`."""
    geometry, arrays = prepare(options, inputs)
    out, lse = attend(geometry, arrays)
    T, head_dim = geometry.T, inputs.q.shape[-1]
    return AttentionOutputs(out[:, :T, :, :head_dim], lse.swapaxes(1, 2)[:, :T])


def attend(geometry: Geometry, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """The kernel itself: (out like the padded q, lse [B,N,T] float32 with T padded)."""
    B, T, N, H = arrays.q.shape
    keys, stages = _pieces(geometry)
    buffers = _query_buffers(geometry)
    dtype = arrays.q.dtype
    ring = [plgpu.Barrier(num_barriers=stages)] * 2
    read = [plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=stages)] * 2
    out_type = (
        jax.ShapeDtypeStruct((B, T, N, H), dtype),
        jax.ShapeDtypeStruct((B, N, T), jnp.float32),
    )

    operands, tree = jax.tree.flatten(arrays)

    def entry(*refs):
        inputs = jax.tree.unflatten(tree, refs[:-2])
        pl.run_scoped(
            functools.partial(_program, geometry, inputs, refs[-2], refs[-1]),
            tiled_smem((buffers, _COMPUTE, _ROWS, H), dtype),
            tiled_smem((stages, keys, H), dtype),
            tiled_smem((stages, keys, H), dtype),
            plgpu.SMEM((_COMPUTE, _ROWS), jnp.float32),
            ring,
            read,
            plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=buffers),
            plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=buffers),
            plgpu.Barrier(num_arrivals=_COMPUTE),
            collective_axes="warpgroup",
        )

    kernel = plgpu.kernel(
        entry,
        out_type=out_type,
        grid=(min(num_multiprocessors(), geometry.items),),
        grid_names=("program",),
        num_threads=_COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return kernel(*operands)


def _program(
    geometry: Geometry, inputs, out_ref, lse_ref, q_smem, k_smem, v_smem, lse_smem,
    full, empty, q_full, q_empty, turn,
):  # fmt: skip
    """One program: see the module."""
    keys, stages = _pieces(geometry)
    buffers = _query_buffers(geometry)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < _COMPUTE)
    def _():
        plgpu.set_max_registers(232, action="increase")

        def take_turns():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        # Taking turns, the second warpgroup is half a step behind the first. With one query buffer
        # it has to catch up at the end of each item: the next queries wait for both.
        catch_up = buffers == 1

        def attend_item(item, number, past):
            """Computes and writes this warpgroup's chunk; `past` steps were taken before."""
            if catch_up:
                pl.when(warpgroup == 1)(take_turns)
            head, q_rows = item.chunk(warpgroup)
            buffer = lax.rem(number, buffers)
            own_q, own_lse = q_smem.at[buffer, warpgroup], lse_smem.at[warpgroup]
            plgpu.barrier_wait(q_full.at[buffer])

            def add_piece(step, state, masked):
                maximum, total, values, bias = state
                stage = lax.rem(past + step, stages)
                # Read a step ahead: it comes from global memory.
                next_bias = None if bias is None else item.bias(step + 1)
                start = item.first_key(step) if masked else None
                plgpu.barrier_wait(full[0].at[stage])

                def scores(acc):
                    plgpu.wgmma(acc, own_q, k_smem.at[stage].transpose((1, 0)))
                    take_turns()
                    return acc[...]

                logits = pl.run_scoped(scores, plgpu.ACC((_ROWS, keys), jnp.float32))
                plgpu.barrier_arrive(empty[0].at[stage])
                if masked:
                    logits = hide(
                        geometry, inputs, logits, item.batch, q_rows, start, transposed=False
                    )

                # The bias is the same for all keys of a piece: it shifts the maximum alone.
                highest = logits.max(axis=1) * geometry.scale
                raised = jnp.maximum(maximum, highest if bias is None else highest + bias)
                safe = jnp.where(raised == -jnp.inf, 0.0, raised)  # −inf − −inf would be nan
                shift = safe if bias is None else safe - bias
                weights = jnp.exp2(
                    logits * geometry.scale - lax.broadcast_in_dim(shift, logits.shape, [0])
                )
                fade = jnp.exp2(maximum - safe)
                values *= lax.broadcast_in_dim(fade, values.shape, [0])
                total *= fade
                weights16 = weights.astype(q_smem.dtype)
                if geometry.H <= 128:
                    total += weights.sum(axis=1)
                    values, total, raised, weights16 = lax.optimization_barrier(
                        (values, total, raised, weights16)
                    )
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(full[1].at[stage])
                plgpu.barrier_wait(turn)
                if geometry.H > 128:
                    total += weights.sum(axis=1)

                def add_values(acc):
                    plgpu.wgmma(acc, weights16, v_smem.at[stage])

                values = pl.run_state(add_values)(plgpu.ACC.init(values))
                plgpu.barrier_arrive(empty[1].at[stage])
                return raised, total, values, next_bias

            state = (
                row_vector(_ROWS, -jnp.inf),
                row_vector(_ROWS, 0.0),
                accumulator(_ROWS, geometry.H),
                None if inputs.bias is None else item.bias(jnp.int32(0)),
            )
            whole, steps = item.unmasked, item.steps
            state = lax.fori_loop(0, whole, functools.partial(add_piece, masked=False), state)
            state = lax.fori_loop(whole, steps, functools.partial(add_piece, masked=True), state)
            if catch_up:
                pl.when(warpgroup == 0)(take_turns)
            maximum, total, values, _ = state
            if inputs.positions is not None:
                live = positions_of(inputs, item.batch, q_rows) >= 0
                total = jnp.where(live, total, 0.0)
            nothing = total == 0.0
            inverse = jnp.where(nothing, 0.0, 1.0 / jnp.where(nothing, 1.0, total))
            values *= lax.broadcast_in_dim(inverse, values.shape, [0])
            own_q[...] = values.astype(q_smem.dtype)
            lse = (maximum + jnp.log2(jnp.where(nothing, 1.0, total))) / LOG2_E
            own_lse[...] = jnp.where(nothing, -jnp.inf, lse)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own_q, out_ref.at[item.batch, q_rows, head])
            plgpu.copy_smem_to_gmem(own_lse, lse_ref.at[item.batch, head, q_rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(q_empty.at[buffer])
            return past + steps

        if not catch_up:
            pl.when(warpgroup == 1)(take_turns)
        for_each_item(geometry, inputs, keys, attend_item)
        if not catch_up:
            pl.when(warpgroup == 0)(take_turns)

    @pl.when(warpgroup == _COMPUTE)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        def copy_item(item, number, past):
            buffer = lax.rem(number, buffers)

            @pl.when(number >= buffers)
            def _():
                plgpu.barrier_wait(q_empty.at[buffer])

            for i in range(_COMPUTE):
                head, q_rows = item.chunk(i)
                source = inputs.q.at[item.batch, q_rows, head]
                plgpu.copy_gmem_to_smem(source, q_smem.at[buffer, i], q_full.at[buffer])

            streams = (
                Stream(inputs.k, k_smem, full[0], empty[0]),
                Stream(inputs.v, v_smem, full[1], empty[1]),
            )
            return stream_pieces(item, keys, past, streams)

        for_each_item(geometry, inputs, keys, copy_item)
