"""What `block_logsumexp` hands to an implementation, and what it expects back."""

from collections.abc import Callable
from typing import NamedTuple

import jax


class LseInputs(NamedTuple):
    """The arrays of one call, checked and of matching shapes.

    Attributes:
      q: [B,M,N,R].
      keys: [P,K,S,R].
      pages: [B,J] int32.
      first: blocks before which none is asked for, at most J.
      ends: [B,M] int32, from `first` to J: the block at which those asked for end.
    """

    q: jax.Array
    keys: jax.Array
    pages: jax.Array
    first: int
    ends: jax.Array


class LseImplementation(NamedTuple):
    """One way to compute the log-sum-exp of blocks.

    Attributes:
      name: what callers name it by.
      refusal: inputs to None, or to why this call is not supported here.
      run: (scale, inputs) to [B,M,N,J] float32; anything where a block is not asked for.
    """

    name: str
    refusal: Callable[[LseInputs], str | None]
    run: Callable[[float, LseInputs], jax.Array]
