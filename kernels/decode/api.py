"""The front door of decoding: checks and the choice of implementation."""

import jax

from routing_jax.kernels.checks import (
    check_bias,
    check_dtype,
    check_head_groups,
    check_same_floats,
    match_shape,
    resolve_scale,
)
from routing_jax.kernels.choice import choose
from routing_jax.kernels.decode.implementation import DecodeImplementation, DecodeInputs
from routing_jax.kernels.decode.mosaic_gpu import MOSAIC_GPU
from routing_jax.kernels.decode.mosaic_tpu import MOSAIC_TPU
from routing_jax.kernels.decode.pages import PageList, check_pages
from routing_jax.kernels.decode.xla import XLA

# In the order in which they are tried when the caller names none. XLA refuses nothing, so what
# stands behind it runs only by name: nothing of Mosaic TPU has run on a TPU yet.
IMPLEMENTATIONS: tuple[DecodeImplementation, ...] = (MOSAIC_GPU, XLA, MOSAIC_TPU)

MAX_QUERIES = 8


def block_sparse_decode(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    pages: PageList,
    lengths: jax.Array,
    *,
    block_bias: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention of a sequence's last few queries to the listed pages of a KV pool.

    The T queries are the last of their sequence: query t stands at position lengths − T + t,
    its own key is in the pool, and it attends to the listed keys up to that position. A query
    that sees no key (every one, where the length is 0) gets output 0 and log-sum-exp −inf. For
    inference: reverse-mode gradients are not defined.

    Args:
      q: [B,T,N,H], T from 1 to 8; bfloat16, float16 or float32.
      k_pool: [P,page_size,K,H], N a multiple of K; P pages shared by all sequences.
      v_pool: [P,page_size,K,H].
      pages: which pages to read; dense decoding lists them all (`dense_pages`).
      lengths: [B] int32, keys of each sequence, the T newest included; 0 skips the sequence.
      block_bias: [B,K,C], K may be 1; added to the logits of each listed page, as in
        `block_sparse_attention`.
      scale: what q·k is multiplied by; 1/√H when None.
      implementation: 'mosaic_gpu' (Hopper GPUs), 'xla', 'mosaic_tpu', or None for the first of
        the first two that supports the call.
      return_lse: whether to return the log-sum-exp too.

    Returns:
      [B,T,N,H] in q's dtype; with `return_lse` also [B,T,N] float32.

    Raises:
      ValueError: shapes, dtypes or values that do not fit; values are checked as in
        `block_sparse_attention`.
      NotImplementedError: the named implementation does not support the call.

    >>> import jax.numpy as jnp
    >>> from routing_jax.kernels.decode.pages import contiguous_pages, dense_pages
    >>> cache = jnp.ones((2, 256, 1, 16)); lengths = jnp.array([200, 0])
    >>> pool = cache.reshape(-1, 64, 1, 16)
    >>> pages = dense_pages(contiguous_pages(2, 4), lengths, 64)
    >>> q = jnp.ones((2, 1, 4, 16))
    >>> block_sparse_decode(q, pool, pool, pages, lengths)[:, 0, 0, 0].tolist()
    [1.0, 0.0]
    """
    inputs = _check_inputs(q, k_pool, v_pool, pages, lengths, block_bias)
    scale = resolve_scale(scale, q.shape[-1])
    chosen = choose(implementation, IMPLEMENTATIONS, lambda one: one.refusal(inputs))
    out, lse = chosen.run(scale, inputs)
    return (out, lse) if return_lse else out


def _check_inputs(q, k_pool, v_pool, pages, lengths, block_bias) -> DecodeInputs:
    sizes = match_shape("q", q, "BTNH", {})
    if sizes["T"] > MAX_QUERIES:
        raise ValueError(f"q must hold at most {MAX_QUERIES} queries a sequence; it is {q.shape}.")
    pool_sizes = {"H": sizes["H"]}
    pool_sizes = match_shape("k_pool", k_pool, "PSKH", pool_sizes)
    match_shape("v_pool", v_pool, "PSKH", pool_sizes)
    B, K = sizes["B"], pool_sizes["K"]
    check_head_groups("k_pool", q, k_pool)
    check_same_floats({"q": q, "k_pool": k_pool, "v_pool": v_pool})
    if not isinstance(pages, PageList):
        raise ValueError(f"pages must be a PageList; it is a {type(pages).__name__}.")
    check_pages(pages, batch=B, kv_heads=K, pool_size=pool_sizes["P"])
    match_shape("lengths", lengths, "B", sizes)
    check_dtype("lengths", lengths, ("int32",))
    if block_bias is not None:
        block_bias = check_bias(block_bias, "BKC", (B, K, pages.pages.shape[2]))
    return DecodeInputs(q, k_pool, v_pool, pages, lengths, block_bias)
