"""The front door of the search for blocks: checks and the choice of implementation."""

import jax
import jax.numpy as jnp

from routing_jax.kernels.block_lse.implementation import LseImplementation, LseInputs
from routing_jax.kernels.block_lse.mosaic_gpu import MOSAIC_GPU
from routing_jax.kernels.block_lse.xla import XLA
from routing_jax.kernels.checks import (
    check_dtype,
    check_head_groups,
    check_same_floats,
    match_shape,
)
from routing_jax.kernels.choice import choose

IMPLEMENTATIONS: tuple[LseImplementation, ...] = (MOSAIC_GPU, XLA)
"""In the order in which they are tried when the caller names none."""


def block_logsumexp(
    q: jax.Array,
    keys: jax.Array,
    pages: jax.Array,
    ends: jax.Array,
    *,
    scale: float,
    first: int = 0,
    implementation: str | None = None,
) -> jax.Array:
    """Log Σ exp(scale·q·k) over the keys of each block, of those that a query asks for.

    What a softmax over all keys gives to a block is the softmax of these numbers over blocks. Keys
    may have fewer channels than attention's. No gradients are defined.

    Args:
      q: [B,M,N,R]; bfloat16, float16 or float32.
      keys: [P,K,S,R], N a multiple of K: P pages of S keys each, a kv head's keys together.
      pages: [B,J] int32, the page of each block; read only where a block is asked for.
      ends: [B,M] int32; a query asks for the blocks from `first` to the one before its end.
      scale: what q·k is multiplied by.
      first: blocks before which none is asked for.
      implementation: 'mosaic_gpu' (Hopper GPUs), 'xla', or None for the first that supports the
        call.

    Returns:
      [B,M,N,J] float32; −inf for blocks that are not asked for.

    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: the named implementation does not support the call.

    >>> q, keys = jnp.ones((1, 1, 1, 2)), jnp.zeros((3, 1, 4, 2)).at[2].set(jnp.log(3.0) / 2)
    >>> found = block_logsumexp(q, keys, jnp.array([[0, 2, 1]]), jnp.array([[2]]), scale=1.0)
    >>> jnp.exp(found)[0, 0, 0].round(2).tolist()
    [4.0, 12.0, 0.0]
    """
    inputs = _check_inputs(q, keys, pages, ends, first)
    chosen = choose(implementation, IMPLEMENTATIONS, lambda one: one.refusal(inputs))
    found = chosen.run(scale, inputs)
    block = jnp.arange(pages.shape[1], dtype=jnp.int32)[None, None, None]
    asked = (block >= inputs.first) & (block < inputs.ends[:, :, None, None])
    return jnp.where(asked, found, -jnp.inf)


def _check_inputs(q, keys, pages, ends, first) -> LseInputs:
    sizes = match_shape("q", q, "BMNR", {})
    match_shape("keys", keys, "PKSR", {"R": sizes["R"]})
    check_head_groups("keys", q, keys, axis=1)
    check_same_floats({"q": q, "keys": keys})
    sizes = match_shape("pages", pages, "BJ", sizes)
    match_shape("ends", ends, "BM", sizes)
    for name, array in (("pages", pages), ("ends", ends)):
        check_dtype(name, array, ("int32",))
    if first < 0:
        raise ValueError(f"first is {first}; it must be at least 0.")
    first = min(first, sizes["J"])
    return LseInputs(q, keys, pages, first, jnp.clip(ends, first, sizes["J"]))
