"""The forward pass on Hopper.

One program a multiprocessor works through a list of items. An item is 128 query rows that share
a table row: two chunks of 64 rows, which are parts of one head's tile or of two heads of the
group. Three warpgroups work on it:

* Two compute warpgroups hold a chunk each. A step takes a piece of keys: the warpgroup issues
  S = Q·Kᵀ into registers and P·V of the piece before (wgmma), and while P·V is still running folds
  S into the running maximum and sum (online softmax, in base 2). A barrier between the two makes
  them take turns: while one has the tensor cores, the other computes exponentials. (Shah et al.
  2024, FlashAttention-3, arXiv:2407.08608, sections 3.1 and 3.2.)
* The memory warpgroup reads the row's block numbers from the table in global memory and copies
  those keys and values by TMA into a ring of shared-memory stages, as far ahead as stages are
  free: past the end of an item, too, so that the next one finds its queries and first keys there.
  `full` barriers tell the compute warpgroups that a stage has arrived, `empty` barriers tell the
  memory warpgroup that all have read it.

Two programs whose items share a row form a cluster: each copies half of every piece to both, which
halves what is read from the L2 cache; so a stage is empty when all four warpgroups have read it.

Rows ascend and steps go backwards, so the blocks that a mask may touch come first, and the rest,
which every query of the tile sees whole, run without. Queries are read once and outputs written
once, through the shared memory of the queries. Items are dealt out by length, longest first (late
tiles), forwards and backwards in turn, so that programs end together. Where items are too few to
fill the chip, rows are split into shares with an item each, and a small XLA computation merges
their softmaxes exactly.
"""

import functools
from typing import NamedTuple

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
from routing_jax.kernels.block_sparse.mosaic_gpu.items import (
    Stream,
    end_barrier,
    for_each_item,
    for_each_step,
    launch,
    ring_barriers,
    stream_pieces,
)
from routing_jax.kernels.block_sparse.mosaic_gpu.masks import hide, positions_of
from routing_jax.kernels.block_table import ceil_div
from routing_jax.kernels.hopper import LOG2_E, WARPGROUP_ROWS, num_multiprocessors
from routing_jax.kernels.mosaic_arrays import accumulator, row_vector, tiled_smem
from routing_jax.kernels.online_softmax import merge_splits

_COMPUTE = 2  # warpgroups
_ROWS = WARPGROUP_ROWS
_SPLIT_BLOCKS = 8  # key blocks of a sequence for each split


class _State(NamedTuple):
    """What the loop over a row's pieces carries.

    Attributes:
      maximum: [rows] float32, of the logits so far, in units of log2.
      total: [rows] float32, the sum of the weights so far.
      values: [rows,H] float32, the weighted values of all pieces but the last.
      weights: [rows,keys], of the last piece.
      bias: of the next piece, or None.
    """

    maximum: jax.Array
    total: jax.Array
    values: jax.Array
    weights: jax.Array
    bias: jax.Array | None


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
    geometry = geometry._replace(splits=_splits(geometry))
    out, lse = attend(geometry, arrays)
    if geometry.splits > 1:
        out, lse = merge_splits(out, lse.swapaxes(2, 3), axis=1)
        out = out.astype(inputs.q.dtype)
    else:
        out, lse = out[:, 0], lse[:, 0].swapaxes(1, 2)
    T, head_dim = geometry.T, inputs.q.shape[-1]
    return AttentionOutputs(out[:, :T, :, :head_dim], lse[:, :T])


def _splits(geometry: Geometry) -> int:
    """Shares that rows are cut into, for items enough to fill the chip evenly."""
    clusters = num_multiprocessors() // geometry.cluster
    if geometry.cluster_items >= 2 * clusters:
        return 1
    return max(1, min(ceil_div(4 * clusters, geometry.cluster_items), geometry.J // _SPLIT_BLOCKS))


def attend(geometry: Geometry, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """The kernel itself.

    Returns:
      out [B,splits,T,N,H] and lse [B,splits,N,T] float32 with T and H padded; out is float32 if
      there are several splits.
    """
    B, T, N, H = arrays.q.shape
    splits = geometry.splits
    keys, stages = _pieces(geometry)
    buffers = _query_buffers(geometry)
    dtype = arrays.q.dtype
    out_type = (
        jax.ShapeDtypeStruct((B, splits, T, N, H), jnp.float32 if splits > 1 else dtype),
        jax.ShapeDtypeStruct((B, splits, N, T), jnp.float32),
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
            ring_barriers(stages, _COMPUTE),
            ring_barriers(stages, _COMPUTE),
            end_barrier(_COMPUTE + 1),
            plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=buffers),
            plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=buffers),
            plgpu.Barrier(num_arrivals=_COMPUTE),
            collective_axes="warpgroup",
        )

    kernel = launch(geometry, entry, out_type, _COMPUTE + 1)
    return kernel(*operands)


def _program(
    geometry: Geometry, inputs, out_ref, lse_ref, q_smem, k_smem, v_smem, lse_smem,
    k_ring, v_ring, end, q_full, q_empty, turn,
):  # fmt: skip
    """One program: see the module."""
    keys = _pieces(geometry)[0]
    buffers = _query_buffers(geometry)
    k_stream, v_stream = Stream(inputs.k, k_smem, *k_ring), Stream(inputs.v, v_smem, *v_ring)
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

            def add_piece(step, state, *, first=False, masked=False):
                """Scores of this step, values of the one before, which the `first` lacks."""
                stage, before = (k_stream.stage(past + i) for i in (step, step - 1))
                # Read a step ahead: it comes from global memory.
                next_bias = None if inputs.bias is None else item.bias(step + 1)
                start = item.first_key(step) if masked else None
                plgpu.barrier_wait(k_stream.full.at[stage])
                if not first:
                    plgpu.barrier_wait(v_stream.full.at[before])

                def multiply(scores, products=None):
                    if products is not None:
                        products[...] = state.values
                    plgpu.wgmma(scores, own_q, k_smem.at[stage].transpose((1, 0)))
                    if products is not None:
                        plgpu.wgmma(products, state.weights, v_smem.at[before])
                    take_turns()
                    logits = plgpu.wgmma_accumulator_load(scores, wait_n=0 if first else 1)
                    plgpu.barrier_arrive(k_stream.empty.at[stage])
                    if masked:
                        logits = hide(
                            geometry, inputs, logits, item.batch, q_rows, start, transposed=False
                        )
                    # The bias is the same for all keys of a piece: it shifts the maximum alone.
                    highest = logits.max(axis=1) * geometry.scale
                    if state.bias is not None:
                        highest = highest + state.bias
                    maximum = jnp.maximum(state.maximum, highest)
                    safe = jnp.where(maximum == -jnp.inf, 0.0, maximum)  # −inf − −inf would be nan
                    shift = safe if state.bias is None else safe - state.bias
                    weights = jnp.exp2(
                        logits * geometry.scale - lax.broadcast_in_dim(shift, logits.shape, [0])
                    )
                    fade = jnp.exp2(state.maximum - safe)
                    total = state.total * fade + weights.sum(axis=1)
                    total, weights = lax.optimization_barrier((total, weights))
                    values = state.values
                    if products is not None:
                        values = products[...]
                        plgpu.barrier_arrive(v_stream.empty.at[before])
                    values *= lax.broadcast_in_dim(fade, values.shape, [0])
                    return _State(maximum, total, values, weights.astype(q_smem.dtype), next_bias)

                accumulators = [plgpu.ACC((_ROWS, keys), jnp.float32)]
                if not first:
                    accumulators.append(plgpu.ACC((_ROWS, geometry.H), jnp.float32))
                state = pl.run_scoped(multiply, *accumulators)
                take_turns()
                return state

            def add_last_values(_, state):
                stage = v_stream.stage(past + item.steps - 1)
                plgpu.barrier_wait(v_stream.full.at[stage])

                def multiply(products):
                    plgpu.wgmma(products, state.weights, v_smem.at[stage])
                    take_turns()

                values = pl.run_state(multiply)(plgpu.ACC.init(state.values))
                plgpu.barrier_arrive(v_stream.empty.at[stage])
                return state._replace(values=values)

            state = _State(
                row_vector(_ROWS, -jnp.inf),
                row_vector(_ROWS, 0.0),
                accumulator(_ROWS, geometry.H),
                accumulator(_ROWS, keys).astype(q_smem.dtype),
                None if inputs.bias is None else item.bias(jnp.int32(0)),
            )
            state = for_each_step(item, add_piece, add_last_values, state)
            maximum, total, values, _, _ = state
            if inputs.positions is not None:
                live = positions_of(inputs, item.batch, q_rows) >= 0
                total = jnp.where(live, total, 0.0)
            nothing = total == 0.0
            inverse = jnp.where(nothing, 0.0, 1.0 / jnp.where(nothing, 1.0, total))
            values *= lax.broadcast_in_dim(inverse, values.shape, [0])
            own_out = out_ref.at[item.batch, item.split, q_rows, head]
            if geometry.splits > 1:  # rounded after the merge
                own_out[...] = values
            else:
                own_q[...] = values.astype(q_smem.dtype)
            lse = (maximum + jnp.log2(jnp.where(nothing, 1.0, total))) / LOG2_E
            own_lse[...] = jnp.where(nothing, -jnp.inf, lse)
            plgpu.commit_smem()
            if geometry.splits == 1:
                plgpu.copy_smem_to_gmem(own_q, own_out)
            plgpu.copy_smem_to_gmem(own_lse, lse_ref.at[item.batch, item.split, head, q_rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(q_empty.at[buffer])
            # Also without a step: the next queries wait for both warpgroups, and the second gets
            # here no sooner than the first takes a turn.
            take_turns()
            if catch_up:
                pl.when(warpgroup == 0)(take_turns)
            return past + item.steps

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

            return stream_pieces(item, keys, past, (k_stream, v_stream))

        for_each_item(geometry, inputs, keys, copy_item)

    plgpu.barrier_arrive(end)
    plgpu.barrier_wait(end)
