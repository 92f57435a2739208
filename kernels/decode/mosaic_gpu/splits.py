"""Decoding in splits: the kernel on each share of a page list, then the merge."""

import jax
import jax.numpy as jnp

from routing_jax.kernels.decode.implementation import DecodeInputs
from routing_jax.kernels.decode.mosaic_gpu.kernel import attend_to_splits
from routing_jax.kernels.decode.mosaic_gpu.tiling import decode_tiling
from routing_jax.kernels.hopper import WARPGROUP_ROWS


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
    G = N // K
    rows = inputs.q.reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, H)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, -T * G % WARPGROUP_ROWS), (0, 0)))
    tiling = decode_tiling(B * K, T * G, H, page_size, inputs.pages.pages.shape[2])
    outs, lses = attend_to_splits(rows, scale, inputs, tiling)
    out, lse = merge_splits(outs[:, :, :, : T * G], lses[:, :, :, : T * G])
    out = out.reshape(B, K, T, G, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)
    lse = lse.reshape(B, K, T, G).transpose(0, 2, 1, 3).reshape(B, T, N)
    return out.astype(inputs.q.dtype), lse


def merge_splits(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The softmax over all keys from the softmaxes over each split's: exact but for rounding.

    Args:
      outs: [B,K,splits,R,H] float32, the mean of each split's values.
      lses: [B,K,splits,R] float32, the log-sum-exp of its logits; −inf where it has no key.

    Returns:
      [B,K,R,H] and [B,K,R], float32; 0 and −inf where no split has a key.

    >>> outs, lses = jnp.array([1.0, 5.0, 0.0]), jnp.array([0.0, jnp.log(3.0), -jnp.inf])
    >>> out, lse = merge_splits(outs.reshape(1, 1, 3, 1, 1), lses.reshape(1, 1, 3, 1))
    >>> round(float(out[0, 0, 0, 0]), 5), round(float(jnp.exp(lse[0, 0, 0])), 5)
    (4.0, 4.0)
    """
    maximum = lses.max(axis=2)
    shift = jnp.where(maximum == -jnp.inf, 0.0, maximum)  # −inf − −inf would be nan
    weights = jnp.exp(lses - shift[:, :, None])
    total = weights.sum(axis=2)
    out = (weights[..., None] * outs).sum(axis=2)
    return out / jnp.where(total == 0, 1.0, total)[..., None], shift + jnp.log(total)
