"""The Hopper kernel: each page's keys once through the tensor cores, and one number a query out.

The grid is (split, tile of queries, kv head, sequence). A program owns 64 rows of queries, row
m·G + g the query of tile m and head g, and a share of the blocks that any of them asks for; one
that has none ends at once, so layers that nobody searches cost a launch. A step is one page: its
keys [S,R] come by one TMA copy, as a kv head's keys lie together, into one of several buffers,
each refilled as soon as it is multiplied; S = Q·Kᵀ by one wgmma for each 16 channels; then the
row's greatest logit and the sum of powers of two beside it. Nothing is carried from step to step.

A token that is decoded fills G rows of 64. The others cost no bytes, but their exponentials: eight
kv heads of 1,024 pages of 128 keys are 67 million, or 18 µs of an H100, beside 22 µs for reading
32 channels of 16 bits.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from routing_jax.kernels.block_lse.implementation import LseInputs
from routing_jax.kernels.block_table import ceil_div
from routing_jax.kernels.hopper import LOG2_E, WARPGROUP_ROWS, num_multiprocessors
from routing_jax.kernels.mosaic_arrays import tiled_smem
from routing_jax.kernels.padding import pad_axis

_PROGRAMS = 3  # a multiprocessor
_BUFFERS = 64 * 1024  # bytes of each
_MOST_STAGES = 8


def _lse_kernel(scale: float, first: int, splits: int, *refs):
    rows, keys, pages, limits, out, q_smem, k_smem, q_full, full, used = refs
    P, J, stages = keys.shape[0], pages.shape[1], k_smem.shape[0]
    split, tile, head, batch = (lax.axis_index(n) for n in ("split", "tile", "head", "batch"))
    own_rows = pl.ds(tile * WARPGROUP_ROWS, WARPGROUP_ROWS)

    count = limits[batch, tile] - first
    share = lax.div(count + (splits - 1), jnp.int32(splits))
    start = first + split * share
    steps = jnp.clip(count - split * share, 0, share)

    def page_of(step):
        return jnp.clip(pages[batch, jnp.minimum(start + step, J - 1)], 0, P - 1)

    def fetch(step, page):
        stage = lax.rem(step, jnp.int32(stages))
        plgpu.copy_gmem_to_smem(keys.at[page, head], k_smem.at[stage], full.at[stage])

    @pl.when(steps > 0)
    def _search():
        plgpu.copy_gmem_to_smem(rows.at[batch, head, own_rows], q_smem, q_full)
        first_pages = [page_of(jnp.int32(step)) for step in range(stages)]
        for step, page in enumerate(first_pages):

            @pl.when(step < steps)
            def _fetch(step=step, page=page):
                fetch(jnp.int32(step), page)

        plgpu.barrier_wait(q_full)

        @pl.loop(0, steps)
        def _read_page(step):
            stage, next_step = lax.rem(step, jnp.int32(stages)), step + stages
            next_page = page_of(next_step)

            def multiply(accumulator):
                plgpu.wgmma(accumulator, q_smem, k_smem.at[stage].transpose((1, 0)))
                return accumulator[...]

            plgpu.barrier_wait(full.at[stage])
            shape = WARPGROUP_ROWS, k_smem.shape[1]
            logits = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
            plgpu.barrier_arrive(used.at[stage])

            @pl.when(next_step < steps)
            def _fetch_next():
                plgpu.barrier_wait(used.at[stage])
                fetch(next_step, next_page)

            logits = logits * (scale * LOG2_E)
            most = logits.max(axis=1)
            powers = jnp.exp2(logits - lax.broadcast_in_dim(most, shape, [0]))
            found = (most + jnp.log2(powers.sum(axis=1))) * (1 / LOG2_E)
            out[batch, head, start + step, own_rows] = found


def run_on_hopper(scale: float, inputs: LseInputs) -> jax.Array:
    """The call, whatever device it is traced on; it only compiles for a Hopper GPU.

    Args:
      scale: what q·k is multiplied by.
      inputs: the call, of shapes that `shape_refusal` accepts.

    Returns:
      [B,M,N,J] float32; not written where a block is not asked for.

    >>> q, keys = jnp.ones((1, 3, 2, 16), jnp.bfloat16), jnp.ones((4, 1, 64, 16), jnp.bfloat16)
    >>> inputs = LseInputs(q, keys, jnp.zeros((1, 9), jnp.int32), 1, jnp.full((1, 3), 9))
    >>> jax.eval_shape(lambda: run_on_hopper(1.0, inputs)).shape
    (1, 3, 2, 9)
    """
    q, keys, pages, first, ends = inputs
    (B, M, N, R), (K, S), J = q.shape, keys.shape[1:3], pages.shape[1]
    G = N // K
    tiles = ceil_div(M * G, WARPGROUP_ROWS)
    rows = q.reshape(B, M, K, G, R).swapaxes(1, 2).reshape(B, K, M * G, R)
    rows = pad_axis(rows, 2, tiles * WARPGROUP_ROWS)
    limits = ends
    if M > 1:  # the furthest end of a tile's rows is the tile's
        limits = pad_axis(jnp.repeat(ends, G, axis=1), 1, tiles * WARPGROUP_ROWS, fill=first)
        limits = limits.reshape(B, tiles, WARPGROUP_ROWS).max(axis=2)
    programs = ceil_div(_PROGRAMS * num_multiprocessors(), B * K * tiles)
    stages = max(2, min(_MOST_STAGES, _BUFFERS // (S * R * q.dtype.itemsize)))
    splits = max(1, min(programs, ceil_div(J, stages)))

    def block_logsumexp_kernel(*refs):
        _lse_kernel(scale, first, splits, *refs)

    found = plgpu.kernel(
        block_logsumexp_kernel,
        out_type=jax.ShapeDtypeStruct((B, K, J, tiles * WARPGROUP_ROWS), jnp.float32),
        scratch_types=(
            tiled_smem((WARPGROUP_ROWS, R), q.dtype),
            tiled_smem((stages, S, R), q.dtype),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        ),
        grid=(splits, tiles, K, B),
        grid_names=("split", "tile", "head", "batch"),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(rows, keys, pages, limits)
    found = found[..., : M * G].reshape(B, K, J, M, G)
    return found.transpose(0, 3, 1, 4, 2).reshape(B, M, N, J)
