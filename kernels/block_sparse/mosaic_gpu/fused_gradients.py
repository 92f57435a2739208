"""The backward pass on Hopper in one kernel: dk and dv, and dq by additions in global memory.

A program takes one key block, as in `key_gradients`, and a part of the group's heads. It walks the
query tiles that see the block. Two passes compute S and dP twice, seven products a pair of tiles;
here it is five, since each program also adds what its keys give to dq. Other programs add to the
same rows, in the order in which they come, and float32 sums depend on their order: gradients of q
differ in their last bits from run to run. Those of k and v do not: what the parts of the group give
to them is added afterwards, rounded once more.

K and V of the block stay in shared memory. A step takes 64 queries of one head. There is a compute
warpgroup for every 64 keys (two for blocks of 128) and one for memory. In step i a compute
warpgroup

1. waits until the stage of the ring is `full` and issues Sᵀ = K·Qᵀ and dPᵀ = V·dOᵀ for its keys,
   then waits until all have read the dSᵀ of two steps before (`ds_empty`);
2. computes Pᵀ = exp2(Sᵀ − lse) while dPᵀ is running, then dSᵀ = Pᵀ·(dPᵀ − δ), rounds both to 16
   bits, writes dSᵀ to the buffer in shared memory that was freed, one of two, and says so
   (`ds_full`);
3. waits for the others' dSᵀ of step i − 1 and issues dS·K of that step, for all keys of the block
   and its own share of the head dim; then dv += Pᵀ·dO and dk += dSᵀ·Q of step i, which stay in
   registers;
4. while dv and dk are running, writes its share of dS·K to a float32 tile in shared memory and has
   TMA add it to dq in global memory (cp.reduce.async.bulk.tensor); the tile is written again only
   after TMA has read it, which by then it did a step ago;
5. waits for dv and dk and says that the stage is `empty`.

That dS·K comes a step late lets one warpgroup be up to a step ahead, so that the tensor cores work
for one while the other computes exponentials. The memory warpgroup streams Q, dO, lse and δ.

At head dim 128 and blocks of 128, of 227 KB: K and V 64, dSᵀ 32, dq tiles 32, three stages of the
ring 98. A step moves 33 KB in and 32 KB out between shared memory and the L2 cache; were they to
miss it, main memory would take longer than the products. Programs stand at different tiles, so what
they use at a time is nearly all of dq, Q and dO of the heads they take: 34 MB a head of 128 and 32k
queries. So all programs that run at a time take the same heads, as few as the cache asks for
(`_heads`); where that is less than the group, dk and dv of each part of it are written and read
again. dq costs besides, in zeros before and rounding after, 10 bytes a value of q.
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
_STAGES = 3
_CACHE_BYTES = 25_000_000  # half of the L2 cache: what one of its two partitions holds
_MOST_SEQUENCES = 65_535  # times kv heads: CUDA's limit on a grid's third axis


def fits_fused(geometry: Geometry, arrays: Arrays) -> bool:
    """Whether `fused_gradients` takes a call: without a bias, head dims up to the keys of a block.

    One warpgroup has no registers for dq of more than 64 columns beside dk and dv. The gradient of
    the bias wants each query's sum of dS over all its blocks, which no program has.
    """
    few = arrays.k.shape[0] * geometry.K <= _MOST_SEQUENCES
    return few and geometry.block_kv >= geometry.H and arrays.bias is None


def fused_gradients(
    geometry: Geometry, arrays: Arrays, output: Output, columns: Columns
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients dq, dk and dv, like the padded q, k and v; dq is not bitwise repeatable."""
    warpgroups, heads = geometry.block_kv // _ROWS, _heads(geometry)
    dtype, H = arrays.q.dtype, geometry.H
    B, S, K, parts = *arrays.k.shape[:3], geometry.G // heads
    share = H // warpgroups  # columns of dq that a warpgroup computes, and reads of K
    operands, tree = jax.tree.flatten((arrays, output, columns))

    def entry(*refs):
        inputs, out, by_column = jax.tree.unflatten(tree, refs[: len(operands)])
        pl.run_scoped(
            functools.partial(
                _program, geometry, heads, inputs, out, by_column, refs[len(operands) :]
            ),
            tiled_smem((geometry.block_kv, H), dtype, share),
            tiled_smem((geometry.block_kv, H), dtype),
            tiled_smem((_STAGES, _ROWS, H), dtype, share),
            tiled_smem((_STAGES, _ROWS, H), dtype),
            plgpu.SMEM((_STAGES, _ROWS), jnp.float32),
            plgpu.SMEM((_STAGES, _ROWS), jnp.float32),
            tiled_smem((2, geometry.block_kv, _ROWS), dtype, share),
            tiled_smem((warpgroups, _ROWS, share), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=4, num_barriers=_STAGES),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=_STAGES),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=2),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=2),
            collective_axes="warpgroup",
        )

    kernel = plgpu.kernel(
        entry,
        out_type=(jax.ShapeDtypeStruct((B, S, K * parts, H), dtype),) * 2,
        grid=(B, K, parts, geometry.J),  # the last axis varies fastest
        grid_names=("batch", "kv_head", "part", "block"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    dq_sum = jax.new_ref(jnp.zeros(arrays.q.shape, jnp.float32))
    dk, dv = (
        x.reshape(B, S, K, parts, H).sum(axis=3, dtype=jnp.float32).astype(dtype)
        for x in kernel(*operands, dq_sum)
    )
    dq = jax.freeze(dq_sum) * (geometry.scale / LOG2_E)
    return dq.astype(dtype), dk, dv


def _heads(geometry: Geometry) -> int:
    """How many heads of the group a program takes: as many as the cache holds, at least one."""
    head_bytes = geometry.T * geometry.H * 8  # dq in float32, Q and dO in 16 bits
    most = max(_CACHE_BYTES // head_bytes, 1)
    return max(n for n in range(1, geometry.G + 1) if geometry.G % n == 0 and n <= most)


def _program(
    geometry: Geometry, heads: int, inputs, output, columns, results, k_smem, v_smem, q_smem,
    do_smem, lse_smem, delta_smem, ds_smem, dq_smem, kv_full, full, empty, ds_full, ds_empty,
):  # fmt: skip
    """One program: see the module."""
    dq_sum, dk_out, dv_out = results
    warpgroups = geometry.block_kv // _ROWS
    share = geometry.H // warpgroups
    warpgroup = lax.axis_index("warpgroup")
    part = lax.axis_index("part")
    column = Column(geometry, inputs, columns, heads, part)
    batch, kv_head, steps = column.batch, column.kv_head, column.steps
    block_start = column.block * geometry.block_kv

    def chunk_of(step):
        """The query head and rows of a step, from the last tile to the first."""
        step = steps - 1 - step
        return column.chunk(step, column.entry(step)[0])

    @pl.when(warpgroup < warpgroups)
    def _():
        plgpu.set_max_registers(240, action="increase")
        first_key = block_start + warpgroup * _ROWS
        own_keys = pl.ds(warpgroup * _ROWS, _ROWS)
        own_k, own_v = k_smem.at[own_keys], v_smem.at[own_keys]
        own_columns = pl.ds(warpgroup * share, share)
        own_dq = dq_smem.at[warpgroup]
        across = plgpu.Layout.WGMMA.reduce(0)
        plgpu.barrier_wait(kv_full)

        def issue_dq(product, step):
            """Starts dS·K of a step, for all keys and this warpgroup's columns."""
            buffer = lax.rem(step, 2)
            plgpu.barrier_wait(ds_full.at[buffer])
            ds = ds_smem.at[buffer].transpose((1, 0))
            plgpu.wgmma(product, ds, k_smem.at[:, own_columns])

        def add_dq(values, step, head, start):
            """Adds dS·K of a step, which is complete, to dq."""
            q_rows = pl.ds(pl.multiple_of(start, _ROWS), _ROWS)
            plgpu.barrier_arrive(ds_empty.at[lax.rem(step, 2)])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            own_dq[...] = values
            plgpu.commit_smem()
            where = dq_sum.at[batch, q_rows, head, own_columns]
            plgpu.copy_smem_to_gmem(own_dq, where, reduction_op="add")

        def add_chunk(step, state, *, first=False):
            """Adds dk and dv of this step, dq of the one before, which `first` lacks."""
            sums, head_before, start_before = state
            stage, buffer = lax.rem(step, _STAGES), lax.rem(step, 2)
            head, q_rows = chunk_of(step)
            plgpu.barrier_wait(full.at[stage])

            def products(scores, d_weights):
                plgpu.wgmma(scores, own_k, q_smem.at[stage].transpose((1, 0)))
                plgpu.wgmma(d_weights, own_v, do_smem.at[stage].transpose((1, 0)))
                if not first:  # here, so that nothing keeps the exponentials behind dP
                    pl.when(step >= 2)(lambda: plgpu.barrier_wait(ds_empty.at[buffer]))
                logits = plgpu.wgmma_accumulator_load(scores, wait_n=1)
                logits = hide_later(
                    geometry, inputs, logits, batch, q_rows, first_key, padding=True
                )
                shift = lax.broadcast_in_dim(
                    plgpu.load(lse_smem.at[stage], layout=across), logits.shape, [1]
                )
                p = jnp.exp2(logits * geometry.scale - shift)
                delta = lax.broadcast_in_dim(
                    plgpu.load(delta_smem.at[stage], layout=across), logits.shape, [1]
                )
                ds = p * (d_weights[...] - delta)
                return p.astype(q_smem.dtype), ds.astype(q_smem.dtype)

            piece = plgpu.ACC((_ROWS, _ROWS), jnp.float32)
            p, ds = pl.run_scoped(products, piece, piece)
            ds_smem.at[buffer, own_keys][...] = ds
            plgpu.commit_smem()
            plgpu.barrier_arrive(ds_full.at[buffer])

            def add(accumulators):
                dk, dv = accumulators

                def add_keys():
                    plgpu.wgmma(dv, p, do_smem.at[stage])
                    plgpu.wgmma(dk, ds, q_smem.at[stage])

                def add_both(product):
                    issue_dq(product, step - 1)
                    add_keys()
                    values = plgpu.wgmma_accumulator_load(product, wait_n=2)
                    add_dq(values, step - 1, head_before, start_before)

                if first:
                    add_keys()
                else:
                    pl.run_scoped(add_both, plgpu.ACC((_ROWS, share), jnp.float32))

            sums = pl.run_state(add)(tuple(plgpu.ACC.init(x) for x in sums))
            plgpu.barrier_arrive(empty.at[stage])
            return sums, head, q_rows.start

        def add_last_dq(_, state):
            sums, head, start = state

            def multiply(product):
                issue_dq(product, steps - 1)
                return product[...]

            values = pl.run_scoped(multiply, plgpu.ACC((_ROWS, share), jnp.float32))
            add_dq(values, steps - 1, head, start)
            return sums, head, start

        some = jnp.minimum(steps, 1)
        sums = tuple(accumulator(_ROWS, geometry.H) for _ in range(2))
        state = sums, jnp.int32(0), jnp.int32(0)
        state = lax.fori_loop(0, some, functools.partial(add_chunk, first=True), state)
        state = lax.fori_loop(some, steps, add_chunk, state)
        (dk, dv), _, _ = lax.fori_loop(0, some, add_last_dq, state)
        sum_head = kv_head * (geometry.G // heads) + part
        # V's rows are this warpgroup's alone; K's may still be read by the other.
        for total, result in ((dv, dv_out), (dk * (geometry.scale / LOG2_E), dk_out)):
            own_v[...] = total.astype(v_smem.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own_v, result.at[batch, pl.ds(first_key, _ROWS), sum_head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(warpgroup == warpgroups)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        own = (batch, pl.ds(block_start, geometry.block_kv), kv_head)
        plgpu.copy_gmem_to_smem(inputs.k.at[own], k_smem, kv_full)
        plgpu.copy_gmem_to_smem(inputs.v.at[own], v_smem, kv_full)

        @pl.loop(0, steps)
        def _(step):
            stage = lax.rem(step, _STAGES)
            chunk = chunk_of(step)  # looked up before the wait
            pl.when(step >= _STAGES)(lambda: plgpu.barrier_wait(empty.at[stage]))
            column.fetch(chunk, output, (q_smem, do_smem, lse_smem, delta_smem), stage, full)
