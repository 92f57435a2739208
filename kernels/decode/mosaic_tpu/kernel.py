"""The TPU kernel of decoding: attention of all queries of a sequence to their pages.

A program is a sequence (and a part of its lists, where those are long). It takes the kv heads one
after the other, each with its list; heads that share a list and a copy, `PoolView.heads` of them,
go together. The pages of all of them are one stream of steps, copied through a ring of buffers
some steps ahead, so that only the first copies of a sequence are waited for.

A step is `pages` pages of one head. The G·T queries are rows t·G + g of a matrix, keys stand
along the lanes: S = Q·Kᵀ, the online softmax in float32, O += P·V. Only a step that holds a key
past what the first query sees compares positions. A pool may hold anything past a sequence's end,
and 0·nan is nan, so values there are overwritten with 0 before they are multiplied.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from routing_jax.kernels.decode.mosaic_tpu.pool_view import PoolView
from routing_jax.kernels.decode.mosaic_tpu.tiling import DecodeTiling
from routing_jax.kernels.tpu import LANES
from routing_jax.kernels.tpu_arrays import multiply

_NO_KEY = 1 << 30  # past every sequence, and with a page added still an int32


class DecodeShape(NamedTuple):
    """What is fixed when the kernel is traced.

    Attributes:
      T: queries a sequence.
      G: query heads a kv head.
      K: kv heads.
      P: pages of the pool.
      shared: whether one list stands for all heads.
      scale: what logits are multiplied by.
      view: how the pool is read.
      tiling: tile sizes.
    """

    T: int
    G: int
    K: int
    P: int
    shared: bool
    scale: float
    view: PoolView
    tiling: DecodeTiling

    @property
    def together(self) -> int:
        """Heads that go through their pages together."""
        return self.view.heads if self.shared else 1


class _Step(NamedTuple):
    """A place in the stream: of which heads (in units of `together`), and which of their steps."""

    unit: jax.Array
    step: jax.Array


def scratch(shape: DecodeShape) -> dict[str, Any]:
    """What a program keeps: the rings of keys and values, and each row's softmax so far."""
    tiling, view = shape.tiling, shape.view
    block, dtype = view.buffer(tiling.pages * view.page_size)
    lines = pltpu.VMEM((shape.together, tiling.rows, LANES), jnp.float32)
    return {
        "keys": pltpu.VMEM((tiling.stages, *block), dtype),
        "values": pltpu.VMEM((tiling.stages, *block), dtype),
        "copied": pltpu.SemaphoreType.DMA((2, tiling.stages)),
        "largest": lines,
        "total": lines,
        "sums": pltpu.VMEM((shape.together, tiling.rows, view.head_dim), jnp.float32),
    }


def decode_program(shape: DecodeShape, inputs: dict[str, Any], out_ref, lse_ref, own) -> None:
    """One program.

    Args:
      shape: what is static.
      inputs: header [1,1+K], the sequence's length and how many pages each list has; pages and
        blocks [K,slots]; in all three K is 1 if heads share a list; bias [K,slots] or absent;
        q [K,R,H]; the pools in the order of `PoolView`.
      out_ref: [K,R,H].
      lse_ref: [K,R,LANES], the same in every lane.
      own: `scratch`.
    """
    out_ref[...] = jnp.zeros(out_ref.shape, out_ref.dtype)
    lse_ref[...] = jnp.full(lse_ref.shape, -jnp.inf, jnp.float32)
    units, stages = shape.K // shape.together, shape.tiling.stages
    steps = functools.partial(_steps, shape, inputs)

    def at_or_after(unit):
        """The first step of the next heads that have any."""

        def empty(unit):
            return (unit < units - 1) & (steps(jnp.minimum(unit, units - 1)) == 0)

        return _Step(lax.while_loop(empty, lambda unit: unit + 1, unit), jnp.int32(0))

    def after(place):
        further = place.step + 1 < steps(jnp.minimum(place.unit, units - 1))
        return lax.cond(
            further,
            lambda: _Step(place.unit, place.step + 1),
            lambda: at_or_after(place.unit + 1),
        )

    total = lax.fori_loop(0, units, lambda unit, total: total + steps(unit), jnp.int32(0))
    ahead = at_or_after(jnp.int32(0))
    reading = ahead

    def fetch(i, place):
        @pl.when(i < total)
        def _():
            _for_each_copy(shape, inputs, own, place, lax.rem(i, stages), lambda one: one.start())

        return after(place)

    ahead = lax.fori_loop(0, stages - 1, fetch, ahead)

    def body(i, places):
        reading, ahead = places
        ahead = fetch(i + stages - 1, ahead)
        stage = lax.rem(i, stages)
        _for_each_copy(shape, inputs, own, reading, stage, lambda one: one.wait())
        _add_pages(shape, inputs, own, reading, stage)

        @pl.when(reading.step + 1 == steps(reading.unit))
        def _():
            _finish(shape, own, reading.unit, out_ref, lse_ref)

        return after(reading), ahead

    lax.fori_loop(0, total, body, (reading, ahead))


def _row(shape: DecodeShape, unit: jax.Array) -> jax.Array | int:
    return 0 if shape.shared else unit


def _pages(shape: DecodeShape, inputs, unit: jax.Array) -> jax.Array:
    """How many pages these heads list here."""
    slots = shape.tiling.slots
    return jnp.clip(inputs["header"][0, 1 + _row(shape, unit)] - pl.program_id(1) * slots, 0, slots)


def _steps(shape: DecodeShape, inputs, unit: jax.Array) -> jax.Array:
    return pl.cdiv(_pages(shape, inputs, unit), shape.tiling.pages)


def _for_each_copy(shape: DecodeShape, inputs, own, place: _Step, stage, act) -> None:
    """Starts or awaits the copies of a step's pages."""
    view, width = shape.view, shape.tiling.pages
    row, first = _row(shape, place.unit), place.step * width
    word = place.unit if shape.together == view.heads else lax.div(place.unit, view.heads)

    def one(i, _):
        page = jnp.clip(inputs["pages"][row, first + i], 0, shape.P - 1)
        for n, (pool, ring) in enumerate((("k_pool", "keys"), ("v_pool", "values"))):
            source = view.page(inputs[pool], page, word)
            buffer = view.place(own[ring].at[stage], i)
            act(pltpu.make_async_copy(source, buffer, own["copied"].at[n, stage]))
        return _

    pages = jnp.minimum(_pages(shape, inputs, place.unit) - first, width)
    lax.fori_loop(0, pages, one, 0)


def _add_pages(shape: DecodeShape, inputs, own, place: _Step, stage: jax.Array) -> None:
    """One step's keys and values to the running softmax of its heads."""
    view, width = shape.view, shape.tiling.pages
    row, first = _row(shape, place.unit), place.step * width
    length, count = inputs["header"][0, 0], _pages(shape, inputs, place.unit) - first
    position = length - shape.T  # of the first query
    values = own["values"].at[stage]

    @pl.when(place.step == 0)
    def _():
        own["largest"][...] = jnp.full(own["largest"].shape, -jnp.inf, jnp.float32)
        for name in ("total", "sums"):
            own[name][...] = jnp.zeros(own[name].shape, jnp.float32)

    def first_key(i):
        """Where the i-th page's keys begin; a page outside the pool has none."""
        slot = jnp.minimum(first + i, shape.tiling.slots - 1)
        page = inputs["pages"][row, slot]
        exists = (i < count) & (page >= 0) & (page < shape.P)
        return jnp.where(exists, inputs["blocks"][row, slot] * view.page_size, _NO_KEY)

    starts = [first_key(i) for i in range(width)]
    end = functools.reduce(jnp.maximum, starts) + view.page_size

    @pl.when(end > length)
    def _():
        lax.fori_loop(0, width, lambda i, _: _clear(view, values, i, length - first_key(i)), None)

    for j in range(shape.together):
        head = place.unit * shape.together + j
        half = j if shape.together == view.heads else lax.rem(head, view.heads)
        keys = view.matrix(own["keys"].at[stage], half)
        logits = multiply(inputs["q"][head], keys, (1, 1 - view.keys_axis)) * shape.scale
        if "bias" in inputs:
            slots = [jnp.minimum(first + i, shape.tiling.slots - 1) for i in range(width)]
            logits += _spread([inputs["bias"][head, slot] for slot in slots], view.page_size)
        logits = lax.cond(
            end > position + 1,
            lambda logits: _hide(shape, logits, _spread(starts, view.page_size), position),
            lambda logits: logits,
            logits,
        )
        _add_piece(own, j, logits, view.matrix(values, half), view.keys_axis)


def _clear(view: PoolView, values, i: jax.Array, live: jax.Array) -> None:
    """Overwrites with 0 what the i-th page holds past its first `live` keys."""

    @pl.when(live < view.page_size)
    def _():
        page = view.place(values, i)
        kept = page[...]
        wide = kept if kept.dtype.itemsize == 4 else kept.astype(jnp.float32)
        key = lax.broadcasted_iota(jnp.int32, wide.shape, view.keys_axis)
        page[...] = jnp.where(key < live, wide, jnp.zeros_like(wide)).astype(kept.dtype)


def _spread(scalars: list[jax.Array], page_size: int) -> jax.Array:
    """[1,pages·page_size], each page's scalar in the lanes of its keys."""
    width = max(LANES, page_size)
    lane = lax.broadcasted_iota(jnp.int32, (1, width), 1)
    parts = []
    for begin in range(0, len(scalars), width // page_size):
        group = scalars[begin : begin + width // page_size]
        part = jnp.full((1, width), group[0])
        for i, scalar in enumerate(group[1:], 1):
            part = jnp.where(lane >= i * page_size, scalar, part)
        parts.append(part)
    return jnp.concatenate(parts, axis=1)


def _hide(shape: DecodeShape, logits: jax.Array, starts: jax.Array, position) -> jax.Array:
    """The logits [R,keys] with −inf where a query does not see a key."""
    lane = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    key = jnp.broadcast_to(starts, logits.shape) + (lane & (shape.view.page_size - 1))
    row = lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    for t in range(1, shape.T):
        position += (row >= t * shape.G).astype(jnp.int32)
    return jnp.where(key <= position, logits, -jnp.inf)


def _add_piece(own, j: int, logits: jax.Array, values: jax.Array, keys_axis: int) -> None:
    """The online softmax of rows j, one step on."""
    largest, total, sums = (own[name].at[j] for name in ("largest", "total", "sums"))
    old = largest[...][:, :1]
    new = jnp.maximum(old, logits.max(axis=1, keepdims=True))
    shift = jnp.where(new == -jnp.inf, 0.0, new)  # −inf − −inf would be nan
    weights = jnp.exp(logits - shift)
    fade = jnp.exp(old - shift)
    largest[...] = jnp.broadcast_to(new, largest.shape)
    total[...] = total[...] * fade + weights.sum(axis=1, keepdims=True)
    piece = multiply(weights.astype(values.dtype), values, (1, keys_axis))
    sums[...] = sums[...] * fade + piece


def _finish(shape: DecodeShape, own, unit: jax.Array, out_ref, lse_ref) -> None:
    """Writes the rows of these heads."""
    for j in range(shape.together):
        total = own["total"][j]
        safe = jnp.where(total > 0, total, 1.0)
        head = unit * shape.together + j
        out_ref[head] = (own["sums"][j] / safe[:, :1]).astype(out_ref.dtype)
        lse_ref[head] = jnp.where(total > 0, own["largest"][j] + jnp.log(safe), -jnp.inf)
