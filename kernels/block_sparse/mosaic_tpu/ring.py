"""A loop whose every step reads blocks of main memory, copied a few steps ahead."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from routing_jax.kernels.block_sparse.mosaic_tpu.call import STAGES


def ring_shapes(*blocks: tuple[tuple[int, ...], Any]) -> list[Any]:
    """The scratch of a ring: a buffer for each (shape, dtype), then the semaphores."""
    buffers = [pltpu.VMEM((STAGES, *shape), dtype) for shape, dtype in blocks]
    return [*buffers, pltpu.SemaphoreType.DMA((len(blocks), STAGES))]


def in_main_memory(x: jax.Array) -> jax.Array:
    """The array, kept where copies run beside the work.

    Left to itself, XLA moves one that fits into vector memory, and a copy from there is a loop of
    loads and stores that the program waits for.
    """
    return pltpu.with_memory_space_constraint(x, pltpu.HBM)


def for_each_step(
    steps: jax.Array,
    sources: Callable[[jax.Array], list[Any]],
    ring: tuple[Any, ...],
    body: Callable[..., Any],
    state: Any,
) -> Any:
    """Runs `body` for steps 0, 1, …, while the blocks of the next steps are copied.

    Two steps' copies are under way while a third's are worked on: a TPU takes about as long to
    begin a copy as to multiply a small block.

    Args:
      steps: how many.
      sources: a step to the references in main memory that it reads, one a buffer.
      ring: what `ring_shapes` asked for.
      body: (step, buffers, state) to the next state.
      state: the first state.

    Returns:
      The last state.
    """
    *buffers, semaphores = ring

    def copies(step):
        stage = lax.rem(step, STAGES)
        return [
            pltpu.make_async_copy(source, buffer.at[stage], semaphores.at[i, stage])
            for i, (source, buffer) in enumerate(zip(sources(step), buffers))
        ]

    def start(step):
        @pl.when(step < steps)
        def _():
            for copy in copies(step):
                copy.start()

    for ahead in range(STAGES - 1):
        start(jnp.int32(ahead))

    def one(step, state):
        start(step + STAGES - 1)
        for copy in copies(step):
            copy.wait()
        stage = lax.rem(step, STAGES)
        return body(step, [buffer.at[stage] for buffer in buffers], state)

    return lax.fori_loop(0, steps, one, state)
