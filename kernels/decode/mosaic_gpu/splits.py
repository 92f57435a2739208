"""Decoding in splits: the kernel on each share of a page list, then the merge."""

import jax
import jax.numpy as jnp

from routing_jax.kernels.decode.implementation import DecodeInputs
from routing_jax.kernels.decode.mosaic_gpu.kernel import attend_to_splits
from routing_jax.kernels.decode.mosaic_gpu.tiling import decode_tiling
from routing_jax.kernels.decode.rows import queries_of_rows, rows_of_queries
from routing_jax.kernels.hopper import WARPGROUP_ROWS
from routing_jax.kernels.online_softmax import merge_splits


def run_on_hopper(scale: float, inputs: DecodeInputs) -> tuple[jax.Array, jax.Array]:
    """The call, whatever device it is traced on; it only compiles for a Hopper GPU.

    Args:
      scale: what q·k is multiplied by.
      inputs: the call, of shapes that `shape_refusal` accepts.

    Returns:
      out [B,T,N,H] in q's dtype and lse [B,T,N] float32.

    >>> from routing_jax.kernels.decode.pages import PageList
    >>> pool = jnp.ones((1, 64, 1, 64), jnp.bfloat16)
    >>> one = PageList(jnp.array([[1]]), jnp.array([[[0]]]), jnp.array([[[0]]]))
    >>> inputs = DecodeInputs(pool[:, :1], pool, pool, one, jnp.array([9]), None)
    >>> jax.eval_shape(lambda: run_on_hopper(1.0, inputs))[0].shape
    (1, 1, 1, 64)
    """
    B, T, N, H = inputs.q.shape
    page_size, K = inputs.k_pool.shape[1:3]
    rows = rows_of_queries(inputs.q, K)
    R = rows.shape[2]
    tiling = decode_tiling(B * K, R, H, page_size, inputs.pages.pages.shape[2])
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, -R % WARPGROUP_ROWS), (0, 0)))
    outs, lses = attend_to_splits(rows, scale, inputs, tiling)
    out, lse = merge_splits(outs[:, :, :, :R], lses[:, :, :, :R], axis=2)
    out, lse = queries_of_rows(out, lse, T, N)
    return out.astype(inputs.q.dtype), lse
