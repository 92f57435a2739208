"""Which logits of a step are hidden."""

import jax
import jax.numpy as jnp
from jax import lax

from routing_jax.kernels.block_sparse.mosaic_tpu.call import Geometry


def hide(
    geometry: Geometry,
    logits: jax.Array,
    queries: jax.Array,
    block: jax.Array,
    k_segments: jax.Array | None,
) -> jax.Array:
    """The logits [keys,rows] with −inf where a query does not see a key.

    Args:
      geometry: the call's sizes.
      logits: [block_kv,R].
      queries: [1 or 2,R], the last key that each row sees, and its segment.
      block: which key block.
      k_segments: [1,block_kv] to whole lanes, or None.
    """
    key = lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    last = queries[0:1] - block * geometry.block_kv
    seen = key <= jnp.broadcast_to(last, logits.shape)
    if k_segments is not None:
        # A row of lanes turned into a column: only whole squares transpose.
        column = jnp.broadcast_to(k_segments, (128, k_segments.shape[1])).T
        column = column[: geometry.block_kv, :1]
        own = jnp.broadcast_to(queries[1:2], logits.shape)
        seen &= own == jnp.broadcast_to(column, logits.shape)
    return jnp.where(seen, logits, -jnp.inf)
