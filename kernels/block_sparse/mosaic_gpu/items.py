"""The work of the kernels that walk table rows, cut into items and dealt out to programs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from routing_jax.kernels.block_sparse.mosaic_gpu.call import Geometry, at
from routing_jax.kernels.hopper import WARPGROUP_ROWS


class Item:
    """Two chunks of 64 query rows that share a table row, inside a kernel.

    Attributes:
      batch: the sequence.
      kv_head: the kv head.
      tile: the query tile.
      steps: pieces of keys that the row visits.
      unmasked: how many of them, the first ones, need no mask.
    """

    def __init__(self, geometry: Geometry, inputs, keys: int, number: jax.Array):
        self._geometry, self._inputs, self._keys = geometry, inputs, keys
        self._parts = geometry.block_kv // keys  # steps a block
        pair = lax.rem(number, geometry.pairs)
        number = lax.div(number, geometry.pairs)
        self.kv_head = lax.rem(number, geometry.K)
        number = lax.div(number, geometry.K)
        self.batch = lax.rem(number, geometry.B)
        # The longest rows of causal attention first.
        self.tile = geometry.M - 1 - lax.div(number, geometry.B)
        self._first_chunk = pair * 2
        row = (*at(inputs.lengths.shape, self.batch, self.kv_head), self.tile)
        self._row = (*at(inputs.indices.shape, self.batch, self.kv_head), self.tile)
        self.steps = inputs.lengths[row] * self._parts
        self.unmasked = inputs.unmasked[row] * self._parts
        self._dense = inputs.dense[self._row] != 0

    def chunk(self, warpgroup: jax.Array | int) -> tuple[jax.Array, pl.Slice]:
        """The query head and the rows of T that a warpgroup computes.

        An odd number of chunks leaves a warpgroup without one: it repeats the last.
        """
        geometry = self._geometry
        chunk = jnp.minimum(self._first_chunk + warpgroup, geometry.chunks - 1)
        group_head, offset = geometry.place(chunk)
        rows = pl.ds(self.tile * geometry.block_q + offset, WARPGROUP_ROWS)
        return self.kv_head * geometry.G + group_head, rows

    def slot(self, step: jax.Array) -> jax.Array:
        """The table slot of a step; the last one for steps of a dense row past it."""
        return jnp.minimum(lax.div(step, self._parts), self._geometry.C - 1)

    def first_key(self, step: jax.Array) -> jax.Array:
        """Where in S a step's keys begin."""
        listed = self._inputs.indices[(*self._row, self.slot(step))]
        block = jnp.where(self._dense, lax.div(step, self._parts), listed)
        return block * self._geometry.block_kv + lax.rem(step, self._parts) * self._keys

    def bias(self, step: jax.Array) -> jax.Array:
        """The bias of a step's block; dense rows have none."""
        bias = self._inputs.bias[self.batch, self.kv_head, self.tile, self.slot(step)]
        return jnp.where(self._dense, 0.0, bias)


def for_each_item(
    geometry: Geometry,
    inputs,
    keys: int,
    body: Callable[[Item, jax.Array, jax.Array], jax.Array],
) -> None:
    """Runs the items of this program in order.

    Items are dealt out in rounds, forwards and backwards in turn: their lengths fall from one to
    the next, so this evens out what programs get.

    Args:
      geometry: the call's sizes.
      inputs: the call's `Arrays`, as references.
      keys: keys a step.
      body: (item, how many were before, what the last call returned, 0 at first) to any int32.
    """
    program = lax.axis_index("program")
    programs = lax.axis_size("program")
    rounds = lax.div(jnp.int32(geometry.items + programs - 1), jnp.int32(programs))

    def take(i, carry):
        turned = jnp.where(lax.rem(i, 2) == 0, program, programs - 1 - program)
        number = i * programs + turned
        # The last round may be short: what it lacks is the last item again, with no harm done.
        return body(Item(geometry, inputs, keys, jnp.minimum(number, geometry.items - 1)), i, carry)

    lax.fori_loop(0, rounds, take, jnp.int32(0))


class Stream(NamedTuple):
    """An array whose pieces pass through a ring of stages in shared memory.

    Attributes:
      source: [B,S,K,H] in global memory.
      ring: [stages,keys,H].
      full: a barrier a stage: its piece has arrived.
      empty: a barrier a stage: it has been read, and may be filled again.
    """

    source: Any
    ring: Any
    full: Any
    empty: Any


def stream_pieces(item: Item, keys: int, past: jax.Array, streams: Sequence[Stream]) -> jax.Array:
    """The memory warpgroup's part of an item: copies its pieces, as far ahead as stages are free.

    Args:
      item: the item.
      keys: keys a piece.
      past: how many pieces were copied before it.
      streams: in the order in which their stages become free.

    Returns:
      How many pieces were copied in all.
    """
    stages = streams[0].ring.shape[0]

    @pl.loop(0, item.steps)
    def _(step):
        place = past + step
        stage = lax.rem(place, stages)
        where = (item.batch, pl.ds(item.first_key(step), keys), item.kv_head)
        for stream in streams:

            @pl.when(place >= stages)
            def _(stream=stream):
                plgpu.barrier_wait(stream.empty.at[stage])

            source, ring = stream.source.at[where], stream.ring.at[stage]
            plgpu.copy_gmem_to_smem(source, ring, stream.full.at[stage])

    return past + item.steps
