"""Causal depthwise convolution: the cheap mixer that routing falls back to."""

import chex
import jax
import jax.numpy as jnp


def causal_conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    history: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Each channel's weighted sum of the last W inputs, this one included.

    A sum of W shifted products: for the small W of this library it beats a grouped convolution
    on CPU and fuses into one loop on GPU and TPU.

    Args:
      x: [B,T,D].
      kernel: [W,D]; `kernel[-1]` weighs the present token.
      history: [B,W−1,D], the inputs before `x` (a decode cache); zeros when None.
      segment_ids: [B,T] int32; taps that reach into another segment count as zero.

    Returns:
      [B,T,D].

    Raises:
      ValueError: `kernel` or `history` does not fit `x`.

    >>> x = jnp.arange(1.0, 5.0).reshape(1, 4, 1)
    >>> causal_conv(x, jnp.array([[1.0], [10.0]])).ravel().tolist()
    [10.0, 21.0, 32.0, 43.0]
    """
    chex.assert_rank([x, kernel], [3, 2])
    B, T, D = x.shape
    W = kernel.shape[0]
    if kernel.shape[1] != D:
        raise ValueError(f"kernel must be [W,D] with D={D}; it is {kernel.shape}.")
    if history is None:
        history = jnp.zeros((B, W - 1, D), x.dtype)
    if history.shape != (B, W - 1, D):
        raise ValueError(f"history must be [B,W-1,D] = {(B, W - 1, D)}; it is {history.shape}.")
    padded = jnp.concatenate([history.astype(x.dtype), x], axis=1)
    out = jnp.zeros_like(x)
    for tap in range(W):
        shifted = jax.lax.slice_in_dim(padded, tap, tap + T, axis=1)
        if segment_ids is not None and tap < W - 1:
            back = W - 1 - tap
            earlier = jnp.pad(segment_ids, ((0, 0), (back, 0)), constant_values=-1)[:, :T]
            shifted = jnp.where((earlier == segment_ids)[:, :, None], shifted, 0)
        out += shifted * kernel[tap][None, None]
    return out
