"""Which logits of a tile are hidden: later keys, other segments, and what pads the last block."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from routing_jax.kernels.block_sparse.mosaic_gpu.call import Geometry


def hide(
    geometry: Geometry, inputs, logits: jax.Array, batch, q_rows, first_key, *, transposed: bool
) -> jax.Array:
    """The logits of a piece with −inf where a query does not see a key.

    Args:
      geometry: the call's sizes.
      inputs: the call's `Arrays`, as references.
      logits: [queries,keys], or [keys,queries] if `transposed`.
      batch: the sequence.
      q_rows: the queries, a slice of T.
      first_key: the first key's position.
      transposed: whether queries run along columns.
    """
    queries, keys = (1, 0) if transposed else (0, 1)

    def of_place(dimension):
        return plgpu.broadcasted_iota(jnp.int32, logits.shape, dimension, layout=plgpu.Layout.WGMMA)

    def of_array(array, rows, dimension):
        layout = plgpu.Layout.WGMMA.reduce(1 - dimension)
        where = batch if array.shape[0] > 1 else 0
        values = plgpu.load(array.at[where, rows], layout=layout, optimized=False)
        return lax.broadcast_in_dim(values, logits.shape, [dimension])

    key = of_place(keys) + first_key
    seen = None
    if geometry.causal:
        if inputs.positions is None:
            position = of_place(queries) + q_rows.start
        else:
            position = of_array(inputs.positions, q_rows, queries)
        seen = position >= key
    if geometry.S % geometry.block_kv:
        inside = key < geometry.S
        seen = inside if seen is None else seen & inside
    if inputs.q_segments is not None:
        own = of_array(inputs.q_segments, q_rows, queries)
        k_rows = pl.ds(first_key, logits.shape[keys])
        same = own == of_array(inputs.k_segments, k_rows, keys)
        seen = same if seen is None else seen & same
    return logits if seen is None else jnp.where(seen, logits, -jnp.inf)


def hide_later(
    geometry: Geometry,
    inputs,
    logits: jax.Array,
    batch,
    q_rows,
    first_key,
    *,
    padding: bool = False,
) -> jax.Array:
    """The logits [keys,queries] of 64 keys with −inf where a query does not see one.

    Args:
      geometry: the call's sizes.
      inputs: the call's `Arrays`, as references.
      logits: [64,queries].
      batch: the sequence.
      q_rows: the queries, a slice of T.
      first_key: the first key's position.
      padding: whether keys that pad the last block are hidden for certain. Their own gradients
        are dropped, but what they add to a query's is not: with k = 0 it is 0, or nan where P
        overflows.
    """

    def masked(logits):
        return hide(geometry, inputs, logits, batch, q_rows, first_key, transposed=True)

    if inputs.q_segments is not None:
        return masked(logits)
    sees_all = None
    if geometry.causal:
        first_query = q_rows.start
        if inputs.positions is not None:
            where = batch if inputs.positions.shape[0] > 1 else 0
            first_query = inputs.positions[where, q_rows.start]
        sees_all = first_query >= first_key + logits.shape[0] - 1
    if padding and geometry.S % geometry.block_kv:
        whole = first_key + logits.shape[0] <= geometry.S
        sees_all = whole if sees_all is None else sees_all & whole
    if sees_all is None:
        return logits
    return lax.cond(sees_all, lambda logits: logits, masked, logits)


def positions_of(inputs, batch, q_rows) -> jax.Array:
    """[64] int32, the positions of a chunk's queries, one a row of an accumulator."""
    where = batch if inputs.positions.shape[0] > 1 else 0
    layout = plgpu.Layout.WGMMA.reduce(1)
    return plgpu.load(inputs.positions.at[where, q_rows], layout=layout, optimized=False)
