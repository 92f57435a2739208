"""One call of decoding on a TPU: queries to rows, a program a sequence, rows to queries."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from routing_jax.kernels.block_table import ceil_div
from routing_jax.kernels.decode.implementation import DecodeInputs
from routing_jax.kernels.decode.mosaic_tpu.kernel import DecodeShape, decode_program, scratch
from routing_jax.kernels.decode.mosaic_tpu.pool_view import pool_view
from routing_jax.kernels.decode.mosaic_tpu.tiling import decode_tiling, vector_memory
from routing_jax.kernels.decode.rows import queries_of_rows, rows_of_queries
from routing_jax.kernels.online_softmax import merge_splits
from routing_jax.kernels.padding import pad_axis
from routing_jax.kernels.tpu import LANES
from routing_jax.kernels.tpu_arrays import in_main_memory


def run_on_tpu(scale: float, inputs: DecodeInputs) -> tuple[jax.Array, jax.Array]:
    """The call, whatever device it is traced on; it only compiles for a TPU.

    Args:
      scale: what q·k is multiplied by.
      inputs: the call, of shapes that `shape_refusal` accepts.

    Returns:
      out [B,T,N,H] in q's dtype and lse [B,T,N] float32.

    >>> from routing_jax.kernels.decode.pages import PageList
    >>> pool = jnp.ones((1, 64, 1, 64), jnp.bfloat16)
    >>> one = PageList(jnp.array([[1]]), jnp.array([[[0]]]), jnp.array([[[0]]]))
    >>> inputs = DecodeInputs(pool[:, :1], pool, pool, one, jnp.array([9]), None)
    >>> jax.eval_shape(lambda: run_on_tpu(1.0, inputs))[0].shape
    (1, 1, 1, 64)
    """
    q, k_pool, v_pool, pages, lengths, block_bias = inputs
    B, T, N, H = q.shape
    K, list_heads, C = k_pool.shape[2], *pages.pages.shape[1:]
    G = N // K
    cores = pltpu.get_tpu_info().num_cores if pltpu.is_tpu_device() else 1
    tiling, view = decode_tiling(inputs, cores), pool_view(k_pool)
    splits, R = ceil_div(C, tiling.slots), tiling.rows
    counts = jnp.where(lengths[:, None] > 0, jnp.clip(pages.counts, 0, C), 0)
    lists = {"pages": pages.pages, "blocks": pages.blocks}
    if block_bias is not None:
        lists["bias"] = block_bias.astype(jnp.float32)
    operands = lists | {
        "header": jnp.concatenate([lengths[:, None], counts], axis=1)[:, None],
        "q": pad_axis(rows_of_queries(q, K), 2, R),
        "k_pool": in_main_memory(view.arrange(k_pool)),
        "v_pool": in_main_memory(view.arrange(v_pool)),
    }
    specs = {
        name: pl.BlockSpec(
            (None, x.shape[1], tiling.slots), lambda b, s: (b, 0, s), memory_space=pltpu.SMEM
        )
        for name, x in lists.items()
    } | {
        "header": pl.BlockSpec(
            (None, 1, 1 + list_heads), lambda b, s: (b, 0, 0), memory_space=pltpu.SMEM
        ),
        "q": pl.BlockSpec((None, K, R, H), lambda b, s: (b, 0, 0, 0)),
        "k_pool": pl.BlockSpec(memory_space=pltpu.HBM),
        "v_pool": pl.BlockSpec(memory_space=pltpu.HBM),
    }
    shape = DecodeShape(T, G, K, k_pool.shape[0], list_heads == 1, scale, view, tiling)
    kind = q.dtype if splits == 1 else jnp.float32
    outs, lses = pl.pallas_call(
        functools.partial(decode_program, shape),
        grid=(B, splits),
        in_specs=[specs],
        out_specs=tuple(
            pl.BlockSpec((None, None, K, R, size), lambda b, s: (b, s, 0, 0, 0))
            for size in (H, LANES)
        ),
        out_shape=(
            jax.ShapeDtypeStruct((B, splits, K, R, H), kind),
            jax.ShapeDtypeStruct((B, splits, K, R, LANES), jnp.float32),
        ),
        scratch_shapes=[scratch(shape)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            vmem_limit_bytes=min(2 * vector_memory(inputs, tiling), 56 * 2**20),
            disable_bounds_checks=True,  # a page is in the pool; checks take as long as a copy
        ),
        cost_estimate=_cost(inputs, R),
        name="block_sparse_decode",
    )(operands)
    out, lse = outs[:, 0], lses[:, 0, ..., 0]
    if splits > 1:
        out, lse = merge_splits(outs, lses[..., 0], axis=1)
    out, lse = queries_of_rows(out, lse, T, N)
    return out.astype(q.dtype), lse


def _cost(inputs: DecodeInputs, rows: int) -> pl.CostEstimate:
    """What the compiler may assume: lists that are full, which no shape tells."""
    page_size, K, H = inputs.k_pool.shape[1:]
    B, _, C = inputs.pages.pages.shape
    keys = B * K * min(C, inputs.k_pool.shape[0]) * page_size
    return pl.CostEstimate(
        flops=4 * keys * rows * H,
        transcendentals=keys * rows,
        bytes_accessed=2 * keys * H * inputs.k_pool.dtype.itemsize,
    )
