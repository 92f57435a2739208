"""The work of the kernels that walk table rows, cut into items and dealt out to programs."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from routing_jax.kernels.block_sparse.mosaic_gpu.call import Geometry, at
from routing_jax.kernels.block_table import ceil_div
from routing_jax.kernels.hopper import WARPGROUP_ROWS, num_multiprocessors


class Place(NamedTuple):
    """Which item: scalars.

    Attributes:
      batch: the sequence.
      kv_head: the kv head.
      tile: the query tile.
      split: the share of the row's blocks.
      pair: the two chunks of query rows.
    """

    batch: jax.Array
    kv_head: jax.Array
    tile: jax.Array
    split: jax.Array
    pair: jax.Array


class Row(NamedTuple):
    """What an item needs of its table row before it starts: scalars, read from global memory.

    Attributes:
      blocks: how many key blocks the row visits.
      unmasked: how many of them, the first ones, need no mask.
      dense: 1 if block i of the row is block i of the sequence.
    """

    blocks: jax.Array
    unmasked: jax.Array
    dense: jax.Array


class Item:
    """Two chunks of 64 query rows and a share of their table row, inside a kernel.

    Steps go from the row's last key to its first, so those that need a mask come first.

    Attributes:
      batch: the sequence.
      kv_head: the kv head.
      tile: the query tile.
      split: the share of the row's blocks.
      steps: pieces of keys to visit.
      masked: how many of them, the first ones, need a mask.
    """

    def __init__(self, geometry: Geometry, inputs, keys: int, place: Place, row: Row):
        self._geometry, self._inputs, self._keys = geometry, inputs, keys
        self._parts = geometry.block_kv // keys  # steps a block
        self.batch, self.kv_head, self.tile, self.split, pair = place
        self._first_chunk = pair * 2
        self._row = (*at(inputs.indices.shape, self.batch, self.kv_head), self.tile)
        share = lax.div(row.blocks + geometry.splits - 1, geometry.splits)
        last = jnp.maximum(row.blocks - self.split * share, 0)  # one past the last block
        first = jnp.maximum(last - share, 0)
        self._last_piece = last * self._parts - 1
        self.steps = (last - first) * self._parts
        self.masked = (last - jnp.clip(row.unmasked, first, last)) * self._parts
        self._dense = row.dense != 0

    def chunk(self, warpgroup: jax.Array | int) -> tuple[jax.Array, pl.Slice]:
        """The query head and the rows of T that a warpgroup computes.

        An odd number of chunks leaves a warpgroup without one: it repeats the last.
        """
        geometry = self._geometry
        chunk = jnp.minimum(self._first_chunk + warpgroup, geometry.chunks - 1)
        group_head, offset = geometry.place(chunk)
        rows = pl.ds(self.tile * geometry.block_q + offset, WARPGROUP_ROWS)
        return self.kv_head * geometry.G + group_head, rows

    def piece(self, step: jax.Array) -> jax.Array:
        """Which of the row's pieces a step takes, in ascending order of keys."""
        return self._last_piece - step

    def first_key(self, step: jax.Array) -> jax.Array:
        """Where in S a step's keys begin."""
        piece = self.piece(step)
        listed = self._inputs.indices[(*self._row, self._slot(piece))]
        block = jnp.where(self._dense, lax.div(piece, self._parts), listed)
        return block * self._geometry.block_kv + lax.rem(piece, self._parts) * self._keys

    def bias(self, step: jax.Array) -> jax.Array:
        """The bias of a step's block, anything past the last step; dense rows have none."""
        slot = self._slot(self.piece(step))
        bias = self._inputs.bias[self.batch, self.kv_head, self.tile, slot]
        return jnp.where(self._dense, 0.0, bias)

    def _slot(self, piece: jax.Array) -> jax.Array:
        """The table slot of a piece: some slot for pieces that have none."""
        return jnp.clip(lax.div(piece, self._parts), 0, self._geometry.C - 1)


def _place(geometry: Geometry, number: jax.Array) -> Place:
    """Which item of a cluster's a program takes, by its number: the longest causal rows first."""
    scalars = []
    for size in (geometry.pairs // geometry.cluster, geometry.splits, geometry.K, geometry.B):
        scalars.append(lax.rem(number, size))
        number = lax.div(number, size)
    pairs, split, kv_head, batch = scalars
    pair = pairs * geometry.cluster + lax.axis_index("member")
    return Place(batch, kv_head, geometry.M - 1 - number, split, pair)


def for_each_item(
    geometry: Geometry,
    inputs,
    keys: int,
    body: Callable[[Item, jax.Array, jax.Array], jax.Array],
) -> None:
    """Runs the items of this program in order.

    Items are dealt out to clusters in rounds, forwards and backwards in turn: their lengths fall
    from one to the next, so this evens out what each gets. The programs of a cluster take items of
    the same row. A row is read an item ahead.

    Args:
      geometry: the call's sizes.
      inputs: the call's `Arrays`, as references.
      keys: keys a step.
      body: (item, how many were before, what the last call returned, 0 at first) to any int32.
    """
    cluster = lax.axis_index("cluster")
    clusters = lax.axis_size("cluster")
    rounds = ceil_div(geometry.cluster_items, clusters)

    def place_of(i):
        turned = jnp.where(lax.rem(i, 2) == 0, cluster, clusters - 1 - cluster)
        # The last round may be short: what it lacks is the last item again, with no harm done.
        return _place(geometry, jnp.minimum(i * clusters + turned, geometry.cluster_items - 1))

    def read(place):
        def scalar(ref):
            return ref[(*at(ref.shape, place.batch, place.kv_head), place.tile)]

        return Row(scalar(inputs.lengths), scalar(inputs.unmasked), scalar(inputs.dense))

    def take(i, carry):
        state, row = carry
        following = read(place_of(i + 1))
        return body(Item(geometry, inputs, keys, place_of(i), row), i, state), following

    lax.fori_loop(0, rounds, take, (jnp.int32(0), read(place_of(jnp.int32(0)))))


def launch(geometry: Geometry, body: Callable, out_type, threads: int) -> Callable:
    """The kernel that runs `body` in persistent programs, a cluster for every few multiprocessors.

    Args:
      geometry: the call's sizes.
      body: of references; it sees the axes 'cluster', 'member' of the cluster, and 'warpgroup'.
      out_type: shapes of the outputs.
      threads: warpgroups a program.
    """
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(min(num_multiprocessors() // geometry.cluster, geometry.cluster_items),),
        grid_names=("cluster",),
        cluster=(geometry.cluster,),
        cluster_names=("member",),
        num_threads=threads,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def ring_barriers(stages: int, readers: int) -> tuple[plgpu.Barrier, plgpu.ClusterBarrier]:
    """The barriers of a ring of stages: full in this program, empty in all of the cluster.

    Args:
      stages: of the ring.
      readers: warpgroups of a program that read it.
    """
    empty = plgpu.ClusterBarrier(
        collective_axes=("member",), num_arrivals=readers, num_barriers=stages
    )
    return plgpu.Barrier(num_barriers=stages), empty


def end_barrier(threads: int) -> plgpu.ClusterBarrier:
    """What every warpgroup waits at in the end: no program may be gone while others signal it.

    Args:
      threads: warpgroups a program.
    """
    return plgpu.ClusterBarrier(collective_axes=("member",), num_arrivals=threads)


def for_each_step[State](
    item: Item,
    step: Callable[..., State],
    last: Callable[[jax.Array, State], State],
    state: State,
) -> State:
    """Runs the steps of an item, each with the second half of the one before.

    Args:
      item: the item; nothing runs if it has no steps.
      step: (step, state, first=, masked=) to state; `first` lacks a step before it.
      last: (anything, state) to state: the second half of the last step.
      state: before.
    """
    first = jnp.minimum(item.steps, 1)
    masked = jnp.maximum(item.masked, first)  # the first step takes a mask for itself
    state = lax.fori_loop(0, first, functools.partial(step, first=True, masked=True), state)
    state = lax.fori_loop(first, masked, functools.partial(step, masked=True), state)
    state = lax.fori_loop(masked, item.steps, step, state)
    return lax.fori_loop(0, first, last, state)


class Stream(NamedTuple):
    """An array whose pieces pass through a ring of stages in shared memory.

    Attributes:
      source: [B,S,K,H] in global memory.
      ring: [stages,keys,H].
      full: a barrier a stage: its piece has arrived.
      empty: a barrier a stage and cluster: all have read it, and it may be filled again.
    """

    source: Any
    ring: Any
    full: Any
    empty: Any

    def stage(self, piece: jax.Array) -> jax.Array:
        """The stage of the ring that a piece passes through."""
        return lax.rem(piece, self.ring.shape[0])


def stream_pieces(item: Item, keys: int, past: jax.Array, streams: Sequence[Stream]) -> jax.Array:
    """The memory warpgroup's part of an item: copies its pieces, as far ahead as stages are free.

    The programs of a cluster copy a part of each piece to all of them.

    Args:
      item: the item.
      keys: keys a piece.
      past: how many pieces were copied before it.
      streams: in the order in which their stages become free.

    Returns:
      How many pieces were copied in all.
    """

    @pl.loop(0, item.steps)
    def _(step):
        place = past + step
        where = (item.batch, pl.ds(item.first_key(step), keys), item.kv_head)
        for stream in streams:
            stage = stream.stage(place)

            @pl.when(place >= stream.ring.shape[0])
            def _(stream=stream, stage=stage):
                plgpu.barrier_wait(stream.empty.at[stage])

            source, ring = stream.source.at[where], stream.ring.at[stage]
            plgpu.copy_gmem_to_smem(source, ring, stream.full.at[stage], collective_axes="member")

    return past + item.steps
