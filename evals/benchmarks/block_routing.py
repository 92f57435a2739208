"""How fast block routing is, end to end with router and table, beside dense attention.

`run` times four parts at each length, forward and training: attention with queries, keys and
values given, the whole layer, the router alone, and a whole model. Dense attention is cuDNN's on a
GPU and XLA's elsewhere; it is timed in the same run, by the same chained calls.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from routing_jax.evals.benchmarks.block_routing_cases import Case, cases
from routing_jax.evals.benchmarks.block_routing_config import (
    BlockRoutingBenchConfig,
    Part,
    default_config,
    take_all_memory,
)
from routing_jax.evals.benchmarks.block_routing_report import Row, describe, plot, table
from routing_jax.evals.benchmarks.environment import environment
from routing_jax.evals.benchmarks.program import compile_program, measure
from routing_jax.evals.benchmarks.running import (
    Clock,
    Measured,
    beside_dense,
    collect,
    measure_in_time,
    record,
)
from routing_jax.kernels import default_implementation

__all__ = ["BlockRoutingBenchConfig", "default_config", "main", "run", "take_all_memory"]


def _rows(config: BlockRoutingBenchConfig, part: Part, clock: Clock) -> Iterator[Row]:
    """The rows of one part. All its programs are compiled before any is timed."""
    found = {
        (length, passing): cases(config, part, passing, length)
        for length in config.lengths
        for passing in config.passes
    }

    def compiled(case: Case) -> Callable:
        clock.check()
        return compile_program(config, case.program)

    with concurrent.futures.ThreadPoolExecutor(config.compile_threads) as pool:
        programs = {
            at: [pool.submit(compiled, case) for case in some] for at, some in found.items()
        }

    def timed(case: Case, program: concurrent.futures.Future) -> Measured:
        return measure_in_time(clock, program, lambda ready: measure(config, case.program, ready))

    for (length, passing), some in found.items():
        if not some:
            continue
        futures = programs[length, passing]
        dense = timed(some[0], futures[0])
        for case, future in zip(some[1:], futures[1:]):
            assert case.counts is not None
            row = {
                "part": part,
                "pass": passing,
                "length": length,
                "router": case.router,
                "budget": case.budget,
                "cost": case.counts.cost,
                "router_cost": case.counts.router,
            }
            yield row | beside_dense(timed(case, future), dense)


def run(
    config: BlockRoutingBenchConfig, report: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Measures everything the config asks for.

    Args:
      config: sizes, budgets and timing.
      report: called with the result so far after each row.

    Returns:
      A JSON-ready dict: device, driver, versions, date, attention (the dense backend), config,
      seconds taken, and rows. A row holds part, pass, length, router, budget, cost and router_cost
      (multiply-adds ÷ dense attention's, counted), milliseconds and spread (interquartile range)
      of one call, the same for dense, and speedup; for part 'router', dense is the forward pass of
      attention. A row that failed holds `error`, and None for what is missing.
    """
    clock = Clock(config.seconds)
    result: dict[str, Any] = {
        **environment(),
        "attention": default_implementation(jax.numpy.dtype(config.dtype)),
        "config": dataclasses.asdict(config),
    }
    parts = (_rows(config, part, clock) for part in config.parts)
    return collect(result, itertools.chain.from_iterable(parts), report)


def main(config: BlockRoutingBenchConfig, out: Path) -> dict[str, Any]:
    """Runs the benchmark, prints each row and the tables, and writes JSON and a plot beside it.

    The file is replaced after every row, so a run that is cut off keeps what it measured.

    Args:
      config: see `run`.
      out: the JSON file to write; its folder is made. The plot gets its name with '.png'.

    Returns:
      The result of `run`.
    """

    def heading(result: dict[str, Any]) -> str:
        return f"{result['device']}, {config.dtype}, dense attention by {result['attention']}"

    return record(
        functools.partial(run, config),
        Path(out),
        describe=describe,
        table=table,
        heading=heading,
        plot=plot,
    )
