"""A loop whose every step reads blocks of main memory, copied a few steps ahead."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def ring_shapes(stages: int, *blocks: tuple[tuple[int, ...], Any]) -> list[Any]:
    """The scratch of a ring: buffers of so many stages for each (shape, dtype), then semaphores."""
    buffers = [pltpu.VMEM((stages, *shape), dtype) for shape, dtype in blocks]
    return [*buffers, pltpu.SemaphoreType.DMA((len(blocks), stages))]


class Span(NamedTuple):
    """Steps that are taken some at a time.

    Attributes:
      end: before which step it ends; what does not fill a whole turn is left to the next span.
      at_once: how many at a time; a divisor of the span's before, and 1 for the last.
      body: (first step, buffers [at_once,…], state) to the next state.
    """

    end: jax.Array
    at_once: int
    body: Callable[..., Any]


def for_each_step(
    spans: Sequence[Span],
    sources: Callable[[jax.Array], list[Any]],
    ring: tuple[Any, ...],
    state: Any,
) -> Any:
    """Runs through steps 0, 1, …, while the blocks of the next steps are copied.

    The copies of other steps are under way while some are worked on: a TPU takes about as long to
    begin a copy as to multiply a small block.

    Args:
      spans: see `Span`; the last one takes one step at a time.
      sources: a step to the references in main memory that it reads, one a buffer.
      ring: what `ring_shapes` asked for, with `ring_stages`.
      state: the first state.

    Returns:
      The last state.
    """
    *buffers, semaphores = ring
    stages, steps = buffers[0].shape[0], spans[-1].end
    ahead = stages - spans[0].at_once

    def copies(step):
        stage = lax.rem(step, stages)
        return [
            pltpu.make_async_copy(source, buffer.at[stage], semaphores.at[i, stage])
            for i, (source, buffer) in enumerate(zip(sources(step), buffers))
        ]

    def start(step):
        @pl.when(step < steps)
        def _():
            for copy in copies(step):
                copy.start()

    for step in range(ahead):
        start(jnp.int32(step))

    first = jnp.int32(0)
    for end, at_once, body in spans:
        turns = jnp.maximum(end - first, 0) // at_once

        def one(turn, state, first=first, at_once=at_once, body=body):
            step = first + turn * at_once
            for i in range(at_once):
                start(step + ahead + i)
            for i in range(at_once):
                for copy in copies(step + i):
                    copy.wait()
            stage = lax.rem(step, stages)
            return body(step, [buffer.at[pl.ds(stage, at_once)] for buffer in buffers], state)

        state = lax.fori_loop(0, turns, one, state)
        first += turns * at_once
    return state
