"""What `block_sparse_decode` hands to an implementation, and what it expects back."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from routing_jax.kernels.decode.pages import PageList


class DecodeInputs(NamedTuple):
    """The arrays of one call, checked and of matching shapes.

    Attributes:
      q: [B,T,N,H].
      k_pool: [P,page_size,K,H].
      v_pool: [P,page_size,K,H].
      pages: rows of [B, K or 1].
      lengths: [B] int32.
      block_bias: [B,K,C] or None.
    """

    q: jax.Array
    k_pool: jax.Array
    v_pool: jax.Array
    pages: PageList
    lengths: jax.Array
    block_bias: jax.Array | None


class DecodeImplementation(NamedTuple):
    """One way to compute block-sparse decoding.

    Attributes:
      name: what callers name it by.
      refusal: inputs to None, or to why this call is not supported here.
      run: (scale, inputs) to out [B,T,N,H] in q's dtype and lse [B,T,N] float32.
    """

    name: str
    refusal: Callable[[DecodeInputs], str | None]
    run: Callable[[float, DecodeInputs], tuple[jax.Array, jax.Array]]
