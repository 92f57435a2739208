"""The backward pass on Hopper, first half: dq, and what the gradient of the bias is made of.

Programs and items are the forward pass's (see `forward`): two compute warpgroups with 64 query
rows each, and a memory warpgroup that streams the row's keys and values. Q, dO and the sum stay in
place. A step recomputes P = exp2(S − lse) from S = Q·Kᵀ, forms dS = P·(dO·Vᵀ − δ) and adds dS·K
to dq. Nothing is summed across programs, so the result does not depend on their order.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from routing_jax.kernels.block_sparse.mosaic_gpu.call import Arrays, Geometry, Output
from routing_jax.kernels.block_sparse.mosaic_gpu.items import Stream, for_each_item, stream_pieces
from routing_jax.kernels.block_sparse.mosaic_gpu.masks import hide
from routing_jax.kernels.hopper import LOG2_E, WARPGROUP_ROWS, num_multiprocessors
from routing_jax.kernels.mosaic_arrays import accumulator, tiled_smem

_COMPUTE = 2  # warpgroups
_ROWS = WARPGROUP_ROWS


def _pieces(geometry: Geometry) -> tuple[int, int]:
    """Keys a step, and stages of the ring."""
    keys = min(geometry.block_kv, 64 if geometry.H > 128 else 128)
    return keys, 1 if geometry.H > 128 else 2


def query_gradients(
    geometry: Geometry, arrays: Arrays, output: Output
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """The gradient dq, like the padded q; with a bias, also what its gradient is made of.

    Returns:
      (dq, ds, p): the sums of dS and of P over the keys of each slot, [B,N,C,T] float32 each,
      or None without a bias. Slots that a row does not visit hold anything.
    """
    B, T, N, H = arrays.q.shape
    keys, stages = _pieces(geometry)
    parts = geometry.block_kv // keys
    dtype = arrays.q.dtype
    ring = [plgpu.Barrier(num_barriers=stages)] * 2
    read = [plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=stages)] * 2
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
            tiled_smem((stages, keys, H), dtype),
            tiled_smem((stages, keys, H), dtype),
            ring,
            read,
            plgpu.Barrier(num_arrivals=2, num_barriers=_COMPUTE),
            plgpu.Barrier(num_arrivals=1, num_barriers=_COMPUTE),
            collective_axes="warpgroup",
        )

    kernel = plgpu.kernel(
        entry,
        out_type=tuple(out_type),
        grid=(min(num_multiprocessors(), geometry.items),),
        grid_names=("program",),
        num_threads=_COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    dq, *sums = kernel(*operands)
    if not sums:
        return dq, None, None
    ds, p = (x.reshape(B, N, geometry.C, parts, T).sum(axis=3) for x in sums)
    return dq, ds, p


def _program(
    geometry: Geometry, inputs, output, results, q_smem, do_smem, k_smem, v_smem,
    full, empty, q_full, q_empty,
):  # fmt: skip
    """One program: see the module."""
    keys, stages = _pieces(geometry)
    slots = geometry.C * geometry.block_kv // keys
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

            def add_piece(step, dq, masked):
                stage = lax.rem(past + step, stages)
                shift = lse if inputs.bias is None else lse - item.bias(step)
                start = item.first_key(step) if masked else None
                plgpu.barrier_wait(full[0].at[stage])
                plgpu.barrier_wait(full[1].at[stage])

                def products(scores, d_weights):
                    plgpu.wgmma(scores, own_q, k_smem.at[stage].transpose((1, 0)))
                    plgpu.wgmma(d_weights, own_do, v_smem.at[stage].transpose((1, 0)))
                    return scores[...], d_weights[...]

                tile = plgpu.ACC((_ROWS, keys), jnp.float32)
                logits, dp = pl.run_scoped(products, tile, tile)
                plgpu.barrier_arrive(empty[1].at[stage])
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

                ds16 = ds.astype(q_smem.dtype)

                def add_keys(acc):
                    plgpu.wgmma(acc, ds16, k_smem.at[stage])

                dq = pl.run_state(add_keys)(plgpu.ACC.init(dq))
                plgpu.barrier_arrive(empty[0].at[stage])
                return dq

            dq = accumulator(_ROWS, geometry.H)
            masked, steps = item.masked, item.steps
            dq = lax.fori_loop(0, masked, functools.partial(add_piece, masked=True), dq)
            dq = lax.fori_loop(masked, steps, functools.partial(add_piece, masked=False), dq)
            own_q[...] = (dq * (geometry.scale / LOG2_E)).astype(q_smem.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own_q, results[0].at[item.batch, q_rows, head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(q_empty.at[warpgroup])
            return past + steps

        for_each_item(geometry, inputs, keys, compute_item)

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

            streams = (  # V is released first
                Stream(inputs.v, v_smem, full[1], empty[1]),
                Stream(inputs.k, k_smem, full[0], empty[0]),
            )
            return stream_pieces(item, keys, past, streams)

        for_each_item(geometry, inputs, keys, copy_item)
