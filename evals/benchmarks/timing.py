"""Wall-clock of a step on the device: calls chained in one program, repeated, median and spread."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

State = dict[str, Any]
"""What a step reads and writes: inputs under any name, its output under 'y'."""

# Runs of one repeat are dispatched without waiting, so that the host's part hides behind the
# device's; more than this many would only fill the queue.
_MOST_RUNS = 200
# A run of this many seconds needs no separate warm-up: what a first run adds is far below it.
_WARMS_ITSELF = 1.0


class Timing(NamedTuple):
    """Milliseconds of one call: the median of the repeats, and their interquartile range."""

    milliseconds: float
    spread: float


def chained(step: Callable[[State], State], calls: int) -> jax.stages.Wrapped:
    """One program that runs `step` on each of a few input sets in turn, `calls` times in all.

    Every call is tied to the one before by an optimization barrier around all inputs and outputs:
    the compiler can neither hoist a call out of the loop, nor drop one, nor compute only a part
    of an output, and no byte is moved for it. The state is donated, so nothing is copied per run.

    Args:
      step: State -> State of the same shapes, with 'y' replaced.
      calls: how often it runs, rounded up to a multiple of the number of sets given.

    >>> import jax.numpy as jnp
    >>> step = lambda s: {"x": s["x"], "y": s["y"] + s["x"]}
    >>> float(chained(step, 3)([{"x": jnp.float32(2), "y": jnp.float32(0)}])[0]["y"])
    6.0
    """

    def run(sets: list[State]) -> list[State]:
        def once(_: int, sets: list[State]) -> list[State]:
            for i in range(len(sets)):
                sets = [*sets[:i], step(sets[i]), *sets[i + 1 :]]
                sets = jax.lax.optimization_barrier(sets)
            return sets

        return jax.lax.fori_loop(0, -(-calls // len(sets)), once, sets)

    return jax.jit(run, donate_argnums=0)


def time_program(
    run: Callable[[list[State]], list[State]],
    sets: list[State],
    calls: int,
    repeats: int,
    target_ms: float,
) -> tuple[Timing, list[State]]:
    """Times a program made by `chained`.

    Args:
      run: the program, compiled or not.
      sets: its input; it is donated.
      calls: how many calls of the step one run makes.
      repeats: how many samples are taken.
      target_ms: runs are dispatched together until a sample takes about this long.

    Returns:
      (Timing of one call, the state after the last).
    """

    def sample(sets: list[State], runs: int) -> tuple[float, list[State]]:
        start = time.perf_counter()
        for _ in range(runs):
            sets = run(sets)
        jax.block_until_ready(sets)
        return (time.perf_counter() - start) / runs, sets

    jax.block_until_ready(sets)
    samples: list[float] = []
    seconds, sets = sample(sets, 1)
    if seconds > _WARMS_ITSELF:
        samples.append(seconds)
    else:
        seconds, sets = sample(sets, 1)
    runs = min(_MOST_RUNS, max(1, round(target_ms / 1000 / seconds)))
    while len(samples) < repeats:
        seconds, sets = sample(sets, runs)
        samples.append(seconds)
    low, median, high = (1000 / calls * np.percentile(samples, [25, 50, 75])).tolist()
    return Timing(round(median, 6), round(high - low, 6)), sets
