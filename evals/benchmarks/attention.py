"""Block-sparse attention against dense attention and FlexAttention, in one run on the same tables.

`run` measures six parts: the device's ceilings, how far each peer is from float32, the forward
pass, forward and backward together, decoding, and the building of a table beside the pass that
uses it. Rates count the listed blocks for every peer alike, partly visible ones as whole, but
T²/2 pairs for dense attention over a whole sequence.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from routing_jax.evals.benchmarks import attention_flex
from routing_jax.evals.benchmarks.attention_agreement import agreeing_peers, differences
from routing_jax.evals.benchmarks.attention_cases import (
    Case,
    cases,
    flops,
    listed_blocks,
    page_bytes,
)
from routing_jax.evals.benchmarks.attention_config import (
    AttentionBenchConfig,
    Part,
    default_config,
)
from routing_jax.evals.benchmarks.attention_plot import plot
from routing_jax.evals.benchmarks.attention_programs import ceilings, programs
from routing_jax.evals.benchmarks.attention_report import (
    Row,
    break_even,
    describe,
    table,
    with_ratios,
)
from routing_jax.evals.benchmarks.environment import environment, ptxas_version
from routing_jax.evals.benchmarks.program import Program, compile_program, measure
from routing_jax.evals.benchmarks.running import Clock, collect, error_text, record
from routing_jax.evals.benchmarks.timing import Timing
from routing_jax.kernels import default_implementation

__all__ = ["AttentionBenchConfig", "default_config", "main", "run"]

_UNITS = {"decode": "GB/s", "copy": "GB/s", "table": None}


def _row(case: Case | None, part: Part, peer: str, listed: int | None) -> Row:
    """The fields that say what was measured; `listed` is None where it was not counted."""
    row: Row = {"part": part, "peer": peer}
    if case is None:
        return row
    row |= {name: value for name, value in case._asdict().items() if name != "part"}
    if listed is None:
        return row | {"listed": None, "density": None}
    every = listed_blocks(case._replace(blocks=0), 0) if case.blocks else listed
    return row | {"listed": listed, "density": listed / every}


def _timed(row: Row, work: float, timing: Timing) -> Row:
    unit = _UNITS.get(row["peer"], _UNITS.get(row["part"], "TFLOP/s")) if work else None
    rate = work / timing.milliseconds / (1e6 if unit == "GB/s" else 1e9) if unit else None
    return row | {
        "milliseconds": timing.milliseconds,
        "spread": timing.spread,
        "rate": rate,
        "unit": unit,
    }


def _failed(row: Row, error: Exception) -> Row:
    missing = dict.fromkeys(("milliseconds", "spread", "rate", "unit"))
    return row | missing | {"error": error_text(error)}


def _flex_row(config: AttentionBenchConfig, case: Case, listed: int, clock: Clock) -> Row:
    row = _row(case, case.part, "flex", listed)
    try:
        clock.check()
        timing = attention_flex.time_flex(config, case)
    except Exception as error:
        return _failed(row, error)
    work = flops(case, listed)
    if case.part == "decode":
        work = page_bytes(case, listed, np.dtype(jax.numpy.dtype(config.dtype)).itemsize)
    return _timed(row, work, timing)


def _rows(config: AttentionBenchConfig, part: Part, clock: Clock) -> Iterator[Row]:
    """The rows of a timed part. All its jax programs are compiled before any is timed."""
    found: list[Case | None] = [None] if part == "ceiling" else [*cases(config, part)]

    def prepare(case: Case | None) -> tuple[int, list[tuple[Program, Any]]]:
        clock.check()
        listed = 0 if case is None else listed_blocks(case, config.seed)
        todo = ceilings(config) if case is None else programs(config, case, listed)

        def compiled(program: Program) -> Any:
            try:
                clock.check()
                return compile_program(config, program)
            except Exception as error:  # one that cannot compile must not cost the others
                return error

        return listed, [(program, compiled(program)) for program in todo]

    with concurrent.futures.ThreadPoolExecutor(config.compile_threads) as pool:
        prepared = [pool.submit(prepare, case) for case in found]

    for case, future in zip(found, prepared):
        try:
            listed, todo = future.result()
        except Exception as error:
            yield _failed(_row(case, part, "block_sparse", None), error)
            continue
        for program, compiled in todo:
            row = _row(case, part, program.peer, listed)
            try:
                if isinstance(compiled, Exception):
                    raise compiled
                clock.check()
                yield _timed(row, program.work, measure(config, program, compiled))
            except Exception as error:
                yield _failed(row, error)
        if case and part != "table" and attention_flex.takes(config, case):
            yield _flex_row(config, case, listed, clock)


def _agreement_rows(config: AttentionBenchConfig, clock: Clock) -> Iterator[Row]:
    for case in cases(config, "agreement"):
        for peer in agreeing_peers(config, case):
            row = _row(case, "agreement", peer, listed_blocks(case, config.seed))
            try:
                clock.check()
                yield row | {"difference": differences(config, case, peer)}
            except Exception as error:
                yield _failed(row, error)


def run(config: AttentionBenchConfig, report: Callable[[dict[str, Any]], None] | None = None):
    """Measures everything the config asks for.

    Args:
      config: sizes, peers and timing.
      report: called with the result so far after each row.

    Returns:
      A JSON-ready dict: device, driver, versions, ptxas, date, dense (its backend), flex (None,
      or why it is not measured), config, seconds taken, rows, and break_even. A row holds what
      was measured, milliseconds and spread (interquartile range) of one call, rate and unit,
      ratio (peer → its milliseconds ÷ this row's) and of_matmul, the share of the matmul
      ceiling. A row that failed holds `error` and None for what is missing; one of part
      'agreement' holds `difference` instead of times.
    """
    clock = Clock(config.seconds)
    result: dict[str, Any] = {
        **environment(),
        "ptxas": ptxas_version(),
        "dense": default_implementation(jax.numpy.dtype(config.dtype)),
        "flex": attention_flex.flex_refusal() if "flex" in config.peers else "not asked for",
        "config": dataclasses.asdict(config),
        "break_even": [],
    }

    def rows() -> Iterator[Row]:
        for part in config.parts:
            agree = part == "agreement"
            yield from _agreement_rows(config, clock) if agree else _rows(config, part, clock)

    def revise(result: dict[str, Any]) -> None:
        result["rows"] = with_ratios(result["rows"])
        result["break_even"] = break_even(result["rows"])

    return collect(result, rows(), report, revise)


def main(config: AttentionBenchConfig, out: Path) -> dict[str, Any]:
    """Runs the benchmark, prints each row and the table, and writes JSON and a plot beside it.

    The file is replaced after every row, so a run that is cut off keeps what it measured.

    Args:
      config: see `run`.
      out: the JSON file to write; its folder is made. The plot gets its name with '.png'.

    Returns:
      The result of `run`.
    """

    def heading(result: dict[str, Any]) -> str:
        flex = f"; no FlexAttention: {result['flex']}" if result["flex"] else ""
        return f"{result['device']}, {config.dtype}, dense by {result['dense']}{flex}"

    return record(
        functools.partial(run, config),
        Path(out),
        describe=describe,
        table=table,
        heading=heading,
        plot=plot,
    )
