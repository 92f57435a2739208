"""The backward pass on Hopper, first half: dq, and what the gradient of the bias is made of.

Programs and items are the forward pass's (see `forward`): two compute warpgroups with 64 query
rows each, and a memory warpgroup that streams the row's keys and values. Q, dO and the sum stay in
place. A step recomputes P = exp2(S − lse) from S = Q·Kᵀ and forms dS = P·(dO·Vᵀ − δ), while the
product dS·K of the step before is added to dq. Nothing is summed across programs, so the result
does not depend on their order.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from routing_jax.kernels.block_sparse.mosaic_gpu.call import Arrays, Geometry, Output
from routing_jax.kernels.block_sparse.mosaic_gpu.items import (
    Stream,
    end_barrier,
    for_each_item,
    for_each_step,
    launch,
    ring_barriers,
    stream_pieces,
)
from routing_jax.kernels.block_sparse.mosaic_gpu.masks import hide
from routing_jax.kernels.hopper import LOG2_E, WARPGROUP_ROWS
from routing_jax.kernels.mosaic_arrays import accumulator, tiled_smem

_COMPUTE = 2  # warpgroups
_ROWS = WARPGROUP_ROWS
_KEYS = 64  # a step: the products of one and the gradient of another fit the registers


def _stages(geometry: Geometry) -> tuple[int, int]:
    """Stages of the rings of K and V that fit 227 KB; K is read in two steps, V in one."""
    return (2, 1) if geometry.H > 128 else (4, 4)


def query_gradients(
    geometry: Geometry, arrays: Arrays, output: Output
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """The gradient dq, like the padded q; with a bias, also what its gradient is made of.

    Returns:
      (dq, ds, p): the sums of dS and of P over the keys of each slot, [B,N,C,T] float32 each,
      or None without a bias. Slots that a row does not visit hold anything.
    """
    B, T, N, H = arrays.q.shape
    k_stages, v_stages = _stages(geometry)
    parts = geometry.block_kv // _KEYS
    dtype = arrays.q.dtype
    out_type = [jax.ShapeDtypeStruct((B, T, N, H), dtype)]
    if arrays.bias is not None:
        out_type += [jax.ShapeDtypeStruct((B, N, geometry.C * parts, T), jnp.float32)] * 2
    operands, tree = jax.tree.flatten((arrays, output))

    def entry(*refs):
        inputs, out = jax.tree.unflatten(tree, refs[: len(operands)])
        pl.run_scoped(
            functools.partial(_program, geometry, inputs, out, refs[len(operands) :]),
            tiled_smem((_COMPUTE, _ROWS, H), dtype),
            tiled_smem((_COMPUTE, _ROWS, H), dtype),
            tiled_smem((k_stages, _KEYS, H), dtype),
            tiled_smem((v_stages, _KEYS, H), dtype),
            ring_barriers(k_stages, _COMPUTE),
            ring_barriers(v_stages, _COMPUTE),
            end_barrier(_COMPUTE + 1),
            plgpu.Barrier(num_arrivals=2, num_barriers=_COMPUTE),
            plgpu.Barrier(num_arrivals=1, num_barriers=_COMPUTE),
            collective_axes="warpgroup",
        )

    kernel = launch(geometry, entry, tuple(out_type), _COMPUTE + 1)
    dq, *sums = kernel(*operands)
    if not sums:
        return dq, None, None
    ds, p = (x.reshape(B, N, geometry.C, parts, T).sum(axis=3) for x in sums)
    return dq, ds, p


def _program(
    geometry: Geometry, inputs, output, results, q_smem, do_smem, k_smem, v_smem,
    k_ring, v_ring, end, q_full, q_empty,
):  # fmt: skip
    """One program: see the module."""
    k_stream, v_stream = Stream(inputs.k, k_smem, *k_ring), Stream(inputs.v, v_smem, *v_ring)
    slots = geometry.C * geometry.block_kv // _KEYS
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < _COMPUTE)
    def _():
        plgpu.set_max_registers(232, action="increase")
        own_q, own_do = q_smem.at[warpgroup], do_smem.at[warpgroup]

        def compute_item(item, number, past):
            """Computes and writes this warpgroup's chunk; `past` steps were taken before."""
            del number
            head, q_rows = item.chunk(warpgroup)
            of_rows = plgpu.Layout.WGMMA.reduce(1)
            lse, delta = (
                plgpu.load(ref.at[item.batch, head, q_rows], layout=of_rows, optimized=False)
                for ref in (output.lse, output.delta)
            )
            plgpu.barrier_wait(q_full.at[warpgroup])

            def add_piece(step, state, *, first=False, masked=False):
                """The logits' gradient of this step, dq of the one before, which `first` lacks."""
                dq, ds16 = state
                k_stage, before = (k_stream.stage(past + i) for i in (step, step - 1))
                v_stage = v_stream.stage(past + step)
                shift = lse if inputs.bias is None else lse - item.bias(step)
                start = item.first_key(step) if masked else None
                plgpu.barrier_wait(k_stream.full.at[k_stage])
                plgpu.barrier_wait(v_stream.full.at[v_stage])

                def multiply(scores, d_weights, product=None):
                    if product is not None:
                        product[...] = dq
                    plgpu.wgmma(scores, own_q, k_smem.at[k_stage].transpose((1, 0)))
                    plgpu.wgmma(d_weights, own_do, v_smem.at[v_stage].transpose((1, 0)))
                    if product is not None:
                        plgpu.wgmma(product, ds16, k_smem.at[before])
                    waiting = 0 if first else 1
                    logits = plgpu.wgmma_accumulator_load(scores, wait_n=waiting)
                    dp = plgpu.wgmma_accumulator_load(d_weights, wait_n=waiting)
                    plgpu.barrier_arrive(v_stream.empty.at[v_stage])
                    if masked:
                        logits = hide(
                            geometry, inputs, logits, item.batch, q_rows, start, transposed=False
                        )
                    p = jnp.exp2(
                        logits * geometry.scale - lax.broadcast_in_dim(shift, logits.shape, [0])
                    )
                    ds = p * (dp - lax.broadcast_in_dim(delta, logits.shape, [0]))
                    if inputs.bias is not None:
                        piece = item.piece(step)

                        @pl.when(piece < slots)
                        def _():
                            for ref, values in zip(results[1:], (ds, p)):
                                ref[item.batch, head, piece, q_rows] = values.sum(axis=1)

                    ds = lax.optimization_barrier(ds)
                    if product is None:
                        return dq, ds.astype(q_smem.dtype)
                    added = product[...]
                    plgpu.barrier_arrive(k_stream.empty.at[before])
                    return added, ds.astype(q_smem.dtype)

                tile = plgpu.ACC((_ROWS, _KEYS), jnp.float32)
                accumulators = [tile, tile]
                if not first:
                    accumulators.append(plgpu.ACC((_ROWS, geometry.H), jnp.float32))
                return pl.run_scoped(multiply, *accumulators)

            def add_last_keys(_, state):
                stage = k_stream.stage(past + item.steps - 1)

                def multiply(product):
                    plgpu.wgmma(product, state[1], k_smem.at[stage])

                dq = pl.run_state(multiply)(plgpu.ACC.init(state[0]))
                plgpu.barrier_arrive(k_stream.empty.at[stage])
                return dq, state[1]

            state = accumulator(_ROWS, geometry.H), accumulator(_ROWS, _KEYS).astype(q_smem.dtype)
            dq, _ = for_each_step(item, add_piece, add_last_keys, state)
            own_q[...] = (dq * (geometry.scale / LOG2_E)).astype(q_smem.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own_q, results[0].at[item.batch, q_rows, head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(q_empty.at[warpgroup])
            return past + item.steps

        for_each_item(geometry, inputs, _KEYS, compute_item)

    @pl.when(warpgroup == _COMPUTE)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        def copy_item(item, number, past):
            for i in range(_COMPUTE):

                @pl.when(number > 0)
                def _(i=i):
                    plgpu.barrier_wait(q_empty.at[i])

                head, q_rows = item.chunk(i)
                for source, smem in ((inputs.q, q_smem), (output.d_out, do_smem)):
                    where = source.at[item.batch, q_rows, head]
                    plgpu.copy_gmem_to_smem(where, smem.at[i], q_full.at[i])

            return stream_pieces(item, _KEYS, past, (v_stream, k_stream))  # V is released first

        for_each_item(geometry, inputs, _KEYS, copy_item)

    plgpu.barrier_arrive(end)
    plgpu.barrier_wait(end)
