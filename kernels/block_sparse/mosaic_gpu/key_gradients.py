"""The backward pass on Hopper, second half: dk and dv.

A program takes one key block of one kv head and walks the query tiles that list it, by the
table's transpose, and for each the G heads of the group: so the gradients of a kv head are summed
by one program, in a fixed order, without atomics. Each compute warpgroup holds 64 of the block's
keys (so there are two for blocks of 128), with dk and dv in registers. A step takes 64 queries:
it recomputes Pᵀ = exp2(K·Qᵀ − lse), adds Pᵀ·dO to dv, forms dSᵀ = Pᵀ·(V·dOᵀ − δ) and adds dSᵀ·Q
to dk. The memory warpgroup streams Q, dO, lse and δ by TMA through a ring of stages.

At head dim 256 two sums do not fit the registers: dv and dk are then computed one after the other.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from routing_jax.kernels.block_sparse.mosaic_gpu.call import Arrays, Columns, Geometry, Output
from routing_jax.kernels.block_sparse.mosaic_gpu.columns import Column
from routing_jax.kernels.block_sparse.mosaic_gpu.masks import hide_later
from routing_jax.kernels.hopper import LOG2_E, WARPGROUP_ROWS
from routing_jax.kernels.mosaic_arrays import accumulator, tiled_smem

_ROWS = WARPGROUP_ROWS


def key_gradients(
    geometry: Geometry, arrays: Arrays, output: Output, columns: Columns
) -> tuple[jax.Array, jax.Array]:
    """The gradients dk and dv, like the padded k and v."""
    if geometry.H <= 128:
        dk, dv = _gradients(geometry, arrays, output, columns, ("k", "v"))
        return dk, dv
    (dv,) = _gradients(geometry, arrays, output, columns, ("v",))
    (dk,) = _gradients(geometry, arrays, output, columns, ("k",))
    return dk, dv


def _stages(geometry: Geometry, wanted: tuple[str, ...]) -> int:
    """Stages of the ring that fit beside K and V in 227 KB of shared memory."""
    resident = (2 if "k" in wanted else 1) * geometry.block_kv * geometry.H * 2
    stage = 2 * _ROWS * geometry.H * 2 + 1024
    return min(4, (220 * 1024 - resident) // stage)


def _gradients(geometry, arrays: Arrays, output: Output, columns: Columns, wanted):
    B, S, K, H = arrays.k.shape
    stages, dtype = _stages(geometry, wanted), arrays.k.dtype
    warpgroups = geometry.block_kv // _ROWS
    operands, tree = jax.tree.flatten((arrays, output, columns))

    def entry(*refs):
        inputs, out, by_column = jax.tree.unflatten(tree, refs[: len(operands)])
        pl.run_scoped(
            functools.partial(
                _program, geometry, wanted, stages, inputs, out, by_column, refs[len(operands) :]
            ),
            tiled_smem((warpgroups, _ROWS, H), dtype),
            tiled_smem((warpgroups, _ROWS, H), dtype) if "k" in wanted else None,
            tiled_smem((stages, _ROWS, H), dtype),
            tiled_smem((stages, _ROWS, H), dtype),
            plgpu.SMEM((stages, _ROWS), jnp.float32),
            plgpu.SMEM((stages, _ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=4, num_barriers=stages),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2 if "k" in wanted else 1, num_barriers=warpgroups),
            collective_axes="warpgroup",
        )  # fmt: skip

    kernel = plgpu.kernel(
        entry,
        out_type=tuple(jax.ShapeDtypeStruct((B, S, K, H), dtype) for _ in wanted),
        grid=(K, geometry.J, B),
        grid_names=("kv_head", "block", "batch"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return kernel(*operands)


def _program(
    geometry: Geometry, wanted, stages, inputs, output, columns, results, k_smem, v_smem,
    q_smem, do_smem, lse_smem, delta_smem, full, empty, kv_full,
):  # fmt: skip
    """One program: see the module."""
    warpgroups = geometry.block_kv // _ROWS
    warpgroup = lax.axis_index("warpgroup")
    column = Column(geometry, inputs, columns, geometry.G)
    batch, kv_head, steps = column.batch, column.kv_head, column.steps

    @pl.when(warpgroup < warpgroups)
    def _():
        plgpu.set_max_registers(232, action="increase")
        first_key = column.block * geometry.block_kv + warpgroup * _ROWS
        own = (batch, pl.ds(first_key, _ROWS), kv_head)
        own_k = k_smem.at[warpgroup]
        own_v = None if v_smem is None else v_smem.at[warpgroup]
        plgpu.copy_gmem_to_smem(inputs.k.at[own], own_k, kv_full.at[warpgroup])
        if own_v is not None:
            plgpu.copy_gmem_to_smem(inputs.v.at[own], own_v, kv_full.at[warpgroup])
        plgpu.barrier_wait(kv_full.at[warpgroup])

        def add_chunk(step, sums):
            stage = lax.rem(step, stages)
            tile, slot = column.entry(step)
            _, q_rows = column.chunk(step, tile)
            bias = None if inputs.bias is None else column.bias(tile, slot)
            plgpu.barrier_wait(full.at[stage])
            across = plgpu.Layout.WGMMA.reduce(0)

            def products(scores, d_weights=None):
                plgpu.wgmma(scores, own_k, q_smem.at[stage].transpose((1, 0)))
                if d_weights is None:
                    return scores[...], None
                plgpu.wgmma(d_weights, own_v, do_smem.at[stage].transpose((1, 0)))
                return scores[...], d_weights[...]

            piece = plgpu.ACC((_ROWS, _ROWS), jnp.float32)
            logits, dp = pl.run_scoped(products, *[piece] * (2 if "k" in wanted else 1))
            logits = hide_later(geometry, inputs, logits, batch, q_rows, first_key)
            shift = plgpu.load(lse_smem.at[stage], layout=across)
            if bias is not None:
                shift = shift - bias
            p = jnp.exp2(logits * geometry.scale - lax.broadcast_in_dim(shift, logits.shape, [1]))
            factors = {"v": (p.astype(q_smem.dtype), do_smem)}
            if dp is not None:
                delta = plgpu.load(delta_smem.at[stage], layout=across)
                ds = p * (dp - lax.broadcast_in_dim(delta, logits.shape, [1]))
                factors["k"] = ds.astype(q_smem.dtype), q_smem

            def add(accumulators):
                for acc, name in zip(accumulators, wanted):
                    weights, ring = factors[name]
                    plgpu.wgmma(acc, weights, ring.at[stage])

            sums = pl.run_state(add)(tuple(plgpu.ACC.init(x) for x in sums))
            plgpu.barrier_arrive(empty.at[stage])
            return sums

        sums = tuple(accumulator(_ROWS, geometry.H) for _ in wanted)
        sums = lax.fori_loop(0, steps, add_chunk, sums)
        for name, total, result in zip(wanted, sums, results):
            if name == "k":
                total *= geometry.scale / LOG2_E
            own_k[...] = total.astype(k_smem.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own_k, result.at[own])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(warpgroup == warpgroups)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        def copy(step, wait):
            stage = lax.rem(step, stages)
            chunk = column.chunk(step, column.entry(step)[0])  # looked up before the wait
            if wait:
                plgpu.barrier_wait(empty.at[stage])
            column.fetch(chunk, output, (q_smem, do_smem, lse_smem, delta_smem), stage, full)

        for i in range(stages):
            pl.when(i < steps)(functools.partial(copy, jnp.int32(i), wait=False))

        @pl.loop(stages, steps)
        def _(step):
            copy(step, wait=True)
