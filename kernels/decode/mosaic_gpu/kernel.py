"""The Hopper kernel of decoding: partial attention of each split of a page list.

The grid is (split, kv head, sequence). A program owns one share of one row's page list and all
the queries that read it: the G·T queries of the sequence and kv head are rows t·G + g of a tile
of 64, one warpgroup a tile; 65 to 128 rows take two warpgroups, which share what is fetched.

**Where the bytes go.** A step is 64 keys of one page. Its keys and its values are two TMA copies
[64,H] straight from the pool into one of `stages` pairs of buffers in shared memory. The first
`stages` steps are fetched at once, each later one as soon as its buffer is free, keys and values
apart, so that all but what is being multiplied is in flight; the page id of a fetch is read a
step ahead. No warpgroup is set aside for memory: a copy takes a few instructions to issue and
nothing after that, and a program of one warpgroup leaves registers and shared memory for a second
program on the same multiprocessor, whose copies and softmax fill this one's gaps.

**Barriers.** `k_full`, `v_full` (one a stage): TMA has filled the buffer. `k_used`, `v_used` (one
a stage, an arrival from every warpgroup): all have multiplied it, and warpgroup 0 may refill it.
`q_full` (one a warpgroup): its queries are there.

**A step** is S = Q·Kᵀ by wgmma, the online softmax in base 2 with float32 sums, and O += P·V with
P rounded to the values' dtype and O in registers. Only a step that holds a key past what the first
query sees compares positions. A pool may hold anything past a sequence's end, and 0·nan is nan:
a step that reaches past it also zeroes those values in shared memory before it multiplies them.
A listed page that is no page of the pool is read as some other page, all of it past the end.

**Out** go O/Σ as float32, through the queries' shared memory in two halves and by TMA, only the
rows in use rounded up to 8; and the log-sum-exp. A split without keys writes 0 and −inf.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from routing_jax.kernels.block_table import ceil_div
from routing_jax.kernels.decode.implementation import DecodeInputs
from routing_jax.kernels.decode.mosaic_gpu.tiling import TILE, DecodeTiling
from routing_jax.kernels.hopper import LOG2_E, WARPGROUP_ROWS
from routing_jax.kernels.mosaic_arrays import accumulator, row_vector, tiled_smem

_NO_KEY = 1 << 30  # past every sequence, and with a tile added still an int32


class _Shape(NamedTuple):
    """What is fixed when the kernel is traced.

    Attributes:
      T: queries a sequence.
      G: query heads a kv head.
      C: slots of a page list.
      page_size: keys a page.
      heads_share: whether one list stands for all heads.
      scale: what logits are multiplied by.
      tiling: tile sizes and splits.
    """

    T: int
    G: int
    C: int
    page_size: int
    heads_share: bool
    scale: float
    tiling: DecodeTiling


def _decode_kernel(shape: _Shape, q, k_pool, v_pool, counts, pages, blocks, lengths, *rest):
    *bias, out, lse, (q_smem, out_smem), k_smem, v_smem, q_full, full, used = rest
    T, G, C, page_size, heads_share, scale, tiling = shape
    (k_full, v_full), (k_used, v_used) = full, used
    P, H = k_pool.shape[0], k_pool.shape[3]
    stages, rows_out = tiling.stages, out.shape[3] // q_smem.shape[0]
    split, head, batch = (lax.axis_index(name) for name in ("split", "head", "batch"))
    warpgroup = lax.axis_index("warpgroup")
    row = batch, 0 if heads_share else head
    own_rows = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

    plgpu.copy_gmem_to_smem(q.at[batch, head, own_rows], q_smem.at[warpgroup], q_full.at[warpgroup])
    length = lengths[batch]
    count = jnp.where(length > 0, jnp.clip(counts[row], 0, C), 0)
    share = jnp.maximum(tiling.least_share, _div(count + tiling.splits - 1, tiling.splits))
    first_slot = split * share
    steps = jnp.clip(count - first_slot, 0, share) * (page_size // TILE)

    def place(step):
        """The slot that a step reads, and the first of its keys within the page."""
        slot, part = _div(step, page_size // TILE), lax.rem(step, jnp.int32(page_size // TILE))
        return jnp.minimum(first_slot + slot, C - 1), part * TILE

    def page_of(step):
        return pages[(*row, place(step)[0])]

    def fetch(pool, buffers, full, step, page):
        stage = lax.rem(step, jnp.int32(stages))
        keys = pl.ds(place(step)[1], TILE)
        source = pool.at[jnp.clip(page, 0, P - 1), keys, head]
        plgpu.copy_gmem_to_smem(source, buffers.at[stage], full.at[stage])

    @pl.when(warpgroup == 0)
    def _fetch_first_steps():
        first_pages = [page_of(jnp.int32(step)) for step in range(stages)]
        for step, page in enumerate(first_pages):

            @pl.when(step < steps)
            def _fetch(step=step, page=page):
                fetch(k_pool, k_smem, k_full, jnp.int32(step), page)
                fetch(v_pool, v_smem, v_full, jnp.int32(step), page)

    plgpu.barrier_wait(q_full.at[warpgroup])

    def add_step(step, state):
        values, maximum, total = state
        stage = lax.rem(step, jnp.int32(stages))
        slot, offset = place(step)
        page = pages[(*row, slot)]
        is_page = (page >= 0) & (page < P)
        first_key = jnp.where(is_page, blocks[(*row, slot)] * page_size + offset, _NO_KEY)
        next_step = step + stages
        next_page = page_of(next_step)

        def refill(pool, buffers, full, used):
            plgpu.barrier_arrive(used.at[stage])

            @pl.when((warpgroup == 0) & (next_step < steps))
            def _fetch_next():
                plgpu.barrier_wait(used.at[stage])
                fetch(pool, buffers, full, next_step, next_page)

        def multiply_keys(accumulator):
            plgpu.wgmma(accumulator, q_smem.at[warpgroup], k_smem.at[stage].transpose((1, 0)))
            return accumulator[...]

        plgpu.barrier_wait(k_full.at[stage])
        logits = pl.run_scoped(multiply_keys, plgpu.ACC((WARPGROUP_ROWS, TILE), jnp.float32))
        refill(k_pool, k_smem, k_full, k_used)

        logits = logits * (scale * LOG2_E)
        if bias:
            logits = logits + bias[0][batch, head, slot] * LOG2_E

        def hide_later_keys(logits):
            query = _iota(logits.shape, 0) + warpgroup * WARPGROUP_ROWS
            end = length - (T - 1) + _div(query, G)
            return jnp.where(_iota(logits.shape, 1) + first_key < end, logits, -jnp.inf)

        has_later_keys = first_key + TILE > length - (T - 1)
        logits = lax.cond(has_later_keys, hide_later_keys, lambda logits: logits, logits)
        new_maximum = jnp.maximum(maximum, logits.max(axis=1))
        shift = jnp.where(new_maximum == -jnp.inf, 0.0, new_maximum)  # −inf − −inf would be nan
        weights = jnp.exp2(logits - lax.broadcast_in_dim(shift, logits.shape, [0]))
        fade = jnp.exp2(maximum - shift)
        total = total * fade + weights.sum(axis=1)
        values = values * lax.broadcast_in_dim(fade, values.shape, [0])
        weights = weights.astype(v_smem.dtype)

        plgpu.barrier_wait(v_full.at[stage])

        @pl.when(first_key + TILE > length)
        def _zero_values_past_the_end():
            layout = plgpu.Layout.SMEM_GMEM_COPY(
                (TILE, H), v_smem.dtype, plgpu.find_swizzle(H * 16)
            )
            page_values = plgpu.load(v_smem.at[stage], layout=layout)
            key = plgpu.broadcasted_iota(jnp.int32, (TILE, H), 0, layout=layout) + first_key
            v_smem[stage] = jnp.where(key < length, page_values, jnp.zeros_like(page_values))
            plgpu.commit_smem()

        def multiply_values(accumulator):
            plgpu.wgmma(accumulator, weights, v_smem.at[stage])

        values = pl.run_state(multiply_values)(plgpu.ACC.init(values))
        refill(v_pool, v_smem, v_full, v_used)
        return values, new_maximum, total

    start = (
        accumulator(WARPGROUP_ROWS, H),
        row_vector(WARPGROUP_ROWS, -jnp.inf),
        row_vector(WARPGROUP_ROWS, 0.0),
    )
    values, maximum, total = lax.fori_loop(0, steps, add_step, start)

    is_empty = total == 0
    total = jnp.where(is_empty, 1.0, total)
    values = values * lax.broadcast_in_dim(1.0 / total, values.shape, [0])
    log_sum = maximum * (1 / LOG2_E) + jnp.log(total)
    lse[batch, head, split, own_rows] = jnp.where(is_empty, -jnp.inf, log_sum)
    half = H // 2
    for first_column in (0, half):
        out_smem[warpgroup] = values[:, first_column : first_column + half]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            out_smem.at[warpgroup, pl.ds(0, rows_out)],
            out.at[
                batch,
                head,
                split,
                pl.ds(warpgroup * WARPGROUP_ROWS, rows_out),
                pl.ds(first_column, half),
            ],
        )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _div(x: jax.Array, divisor: int) -> jax.Array:
    return lax.div(x, jnp.int32(divisor))


def _iota(shape, axis):
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def attend_to_splits(
    rows: jax.Array, scale: float, inputs: DecodeInputs, tiling: DecodeTiling
) -> tuple[jax.Array, jax.Array]:
    """Attention of every row of queries to each split of its page list.

    Args:
      rows: [B,K,R,H], R a multiple of `WARPGROUP_ROWS`; row t·G + g holds a query, the rest 0.
      scale: what q·k is multiplied by.
      inputs: what `block_sparse_decode` was called with.
      tiling: tile sizes and splits.

    Returns:
      [B,K,splits,R',H] and [B,K,splits,R], float32: means and log-sum-exp over the split's keys.
      R' is G·T rounded up to 8, or R where that is more than `WARPGROUP_ROWS`.

    >>> from routing_jax.kernels.decode.pages import PageList
    >>> pool = jnp.ones((1, 64, 1, 64), jnp.bfloat16)
    >>> one = PageList(jnp.array([[1]]), jnp.array([[[0]]]), jnp.array([[[0]]]))
    >>> inputs = DecodeInputs(pool[:, :1], pool, pool, one, jnp.array([9]), None)
    >>> rows, tiling = jnp.ones((1, 1, 64, 64), jnp.bfloat16), DecodeTiling(2, 1, 1)
    >>> jax.eval_shape(lambda: attend_to_splits(rows, 1.0, inputs, tiling))[0].shape
    (1, 1, 1, 8, 64)
    """
    q, k_pool, v_pool, pages, lengths, block_bias = inputs
    B, K, R, H = rows.shape
    T, G, C = q.shape[1], q.shape[2] // K, pages.pages.shape[2]
    warpgroups = R // WARPGROUP_ROWS
    rows_out = R if warpgroups > 1 else 8 * ceil_div(G * T, 8)
    shape = _Shape(T, G, C, k_pool.shape[1], pages.pages.shape[1] == 1, scale, tiling)
    buffers = tiled_smem((tiling.stages, TILE, H), q.dtype)
    full = plgpu.Barrier(num_barriers=tiling.stages)
    used = plgpu.Barrier(num_barriers=tiling.stages, num_arrivals=warpgroups)

    def block_sparse_decode_kernel(*refs):
        _decode_kernel(shape, *refs)

    return plgpu.kernel(
        block_sparse_decode_kernel,
        out_type=(
            jax.ShapeDtypeStruct((B, K, tiling.splits, rows_out, H), jnp.float32),
            jax.ShapeDtypeStruct((B, K, tiling.splits, R), jnp.float32),
        ),
        scratch_types=(
            plgpu.RefUnion(  # a warpgroup's rows of both are the same bytes
                tiled_smem((warpgroups, WARPGROUP_ROWS, H), q.dtype),
                tiled_smem((warpgroups, WARPGROUP_ROWS, H // 2), jnp.float32),
            ),
            buffers,
            buffers,
            plgpu.Barrier(num_barriers=warpgroups),
            (full, full),
            (used, used),
        ),
        grid=(tiling.splits, K, B),
        grid_names=("split", "head", "batch"),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(rows, k_pool, v_pool, *pages, lengths, *([] if block_bias is None else [block_bias]))
