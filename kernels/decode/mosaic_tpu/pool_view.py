"""A pool [P,page_size,K,H] as it lies in a TPU's memory, and the part of it that one copy takes.

The TPU compiler orders the dimensions of a program's arguments so that tiles of 8 by 128 are
padded little. A kernel that wants another order makes it copy the whole pool in every call, so
this one takes what is there (read off compiled programs, the same for v5e and tpu7x):

- "columns" [P,K,H,page_size]: head dims that are no multiple of 128, in pages that are one.
- "rows" [P,K,page_size,H]: where K would be padded.
- "heads" [P,page_size,K,H]: the usual one. A copy takes one head of every position, cut from
  words of 32 bits, so of a 16-bit pool it takes a pair of heads: half of what is read is lost
  where every head has a list of its own, nothing where all share one.

Only pools that would be padded in each of these (neither head dim nor page size a multiple of
128) are copied before the kernel sees them.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from routing_jax.kernels.tpu import LANES

Order = Literal["columns", "rows", "heads"]


class PoolView(NamedTuple):
    """How the kernel reads a pool.

    Attributes:
      order: of the pool's dimensions, see the module.
      page_size: keys a page.
      head_dim: H.
      dtype: of the pool.
      heads: heads that one copy takes.
    """

    order: Order
    page_size: int
    head_dim: int
    dtype: jax.typing.DTypeLike
    heads: int

    @property
    def keys_axis(self) -> int:
        """Which dimension of a buffer counts keys."""
        return 1 if self.order == "columns" else 0

    def arrange(self, pool: jax.Array) -> jax.Array:
        """The pool with its dimensions in order of memory, which moves nothing there."""
        axes = {"columns": (0, 2, 3, 1), "rows": (0, 2, 1, 3), "heads": (0, 1, 2, 3)}[self.order]
        return pool.transpose(axes)

    def buffer(self, keys: int) -> tuple[tuple[int, int], jax.typing.DTypeLike]:
        """Shape and dtype of what holds `keys` keys."""
        dtype = self.dtype if self.heads == 1 else jnp.uint32
        return ((self.head_dim, keys) if self.keys_axis else (keys, self.head_dim)), dtype

    def page(self, pool_ref: Any, page: jax.Array, word: jax.Array) -> Any:
        """The keys of one page, for the `heads` heads that start at word·heads."""
        if self.order != "heads":
            return pool_ref.at[page, word]
        if pool_ref.dtype.itemsize < 4:
            pool_ref = pool_ref.bitcast(jnp.uint32)
        return pool_ref.at[page, :, word]

    def place(self, buffer: Any, i: jax.Array) -> Any:
        """Where the i-th page of a buffer goes."""
        at = pl.ds(pl.multiple_of(i * self.page_size, self.page_size), self.page_size)
        return buffer.at[:, at] if self.keys_axis else buffer.at[at]

    def matrix(self, buffer: Any, half: jax.Array | int) -> jax.Array:
        """What a buffer holds of one head: the half-th of a pair."""
        words = buffer[...]
        if self.heads == 1:
            return words
        # Bits of a bfloat16 are the upper ones of a float32; the first of a pair is the lower.
        upper = (words << jnp.uint32(16 - 16 * half)) & jnp.uint32(0xFFFF0000)
        return lax.bitcast_convert_type(upper, jnp.float32).astype(self.dtype)


def pool_view(pool: jax.Array) -> PoolView:
    """How the kernel reads a pool [P,page_size,K,H].

    >>> pool_view(jnp.ones((9, 128, 8, 64), jnp.bfloat16)).order
    'columns'
    >>> view = pool_view(jnp.ones((9, 128, 8, 128), jnp.bfloat16))
    >>> view.order, view.heads
    ('heads', 2)
    """
    page_size, K, H = pool.shape[1:]
    packed = 4 // pool.dtype.itemsize
    order: Order = "rows"
    if H % LANES == 0 and K % packed == 0 and (K in (1, 2, 4) or K % 8 == 0):
        order = "heads"
    elif H % LANES and page_size % LANES == 0:
        order = "columns"
    return PoolView(order, page_size, H, pool.dtype, packed if order == "heads" else 1)
