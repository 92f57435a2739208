"""How fast a mixing layer gets as fewer of its tokens attend, against attention everywhere.

`run` times four parts at each length: the mixing itself (router, compaction, gather and scatter
included; queries, keys and values given), a decode step, the projections alone, and the whole
layer. Dense attention is cuDNN's on a GPU and XLA's in blocks elsewhere.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from routing_jax.evals.benchmarks.environment import environment
from routing_jax.evals.benchmarks.mixing_cases import Case, cases
from routing_jax.evals.benchmarks.mixing_config import MixingBenchConfig, Part, default_config
from routing_jax.evals.benchmarks.running import (
    Clock,
    Measured,
    beside_dense,
    collect,
    measure_in_time,
    missing_word,
    record,
)
from routing_jax.evals.benchmarks.timing import State, Timing, chained, time_program
from routing_jax.kernels import default_implementation

__all__ = ["MixingBenchConfig", "default_config", "main", "run", "table"]

Row = dict[str, Any]
Program = Callable[[list[State]], list[State]]


def _count_sets(config: MixingBenchConfig, case: Case) -> int:
    """How many input sets together exceed the cache."""
    inputs = {k: v for k, v in jax.eval_shape(lambda: case.state(0)).items() if k != "y"}
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(inputs))
    return 1 + config.cache_bytes // size


def _compile(config: MixingBenchConfig, length: int, case: Case) -> Program:
    sets = _count_sets(config, case)
    shapes = [jax.eval_shape(lambda: case.state(0))] * sets
    return chained(case.step, config.calls(length)).lower(shapes).compile()


def _measure(config: MixingBenchConfig, length: int, case: Case, program: Program) -> Timing:
    sets = _count_sets(config, case)
    calls = -(-config.calls(length) // sets) * sets
    states = [case.state(config.seed + 10 * i) for i in range(sets)]
    timing, _ = time_program(program, states, calls, config.repeats, config.target_ms)
    return timing


def _rows(config: MixingBenchConfig, part: Part, clock: Clock) -> Iterator[Row]:
    """The rows of one part. All its programs are compiled before any is timed."""
    cases_at = {length: cases(config, part, length) for length in config.lengths}
    with concurrent.futures.ThreadPoolExecutor(config.compile_threads) as pool:

        def compile_in_time(length: int, case: Case) -> Program:
            clock.check()
            return _compile(config, length, case)

        unique = {(T, case.name): case for T, found in cases_at.items() for case in found}
        programs = {key: pool.submit(compile_in_time, key[0], c) for key, c in unique.items()}

    def measure(length: int, case: Case) -> Measured:
        compiled = programs[length, case.name]
        return measure_in_time(clock, compiled, lambda p: _measure(config, length, case, p))

    for length, (dense_case, *routed_cases) in cases_at.items():
        dense = measure(length, dense_case)
        for case in routed_cases:
            row = {
                "part": part,
                "length": length,
                "usage": case.usage,
                "tokens": case.tokens,
                "implementation": "compaction",
            }
            yield row | beside_dense(measure(length, case), dense)


def run(config: MixingBenchConfig, report: Callable[[dict[str, Any]], None] | None = None) -> dict:
    """Measures everything the config asks for.

    Args:
      config: sizes, usages and timing.
      report: called with the result so far after each row.

    Returns:
      A JSON-ready dict: device, driver, versions, date, attention (the dense backend), config,
      seconds taken, and rows. A row holds part, length, usage, tokens, implementation,
      milliseconds and spread (interquartile range) of one call, the same for dense, and speedup;
      a row that failed holds `error`, and None for what is missing.
    """
    clock = Clock(config.seconds)
    result: dict[str, Any] = {
        **environment(),
        "attention": default_implementation(jax.numpy.dtype(config.dtype)),
        "config": dataclasses.asdict(config),
    }
    parts = (_rows(config, part, clock) for part in config.parts)
    return collect(result, itertools.chain.from_iterable(parts), report)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["milliseconds"] is None:
        return missing_word(row)
    ratio = f" ({row['speedup']:.3g}×)" if row["speedup"] else ""
    return f"{row['milliseconds']:.3g}{ratio}"


def table(rows: list[Row]) -> str:
    """Markdown: a table a part, a line a length, a column a usage; milliseconds and speed-up.

    A part of which nothing was measured is left out.

    >>> row = {"part": "mixing", "length": 4096, "usage": 0.01, "milliseconds": 1.0,
    ...        "dense_milliseconds": 20.0, "speedup": 20.0}
    >>> print(table([row]))
    **mixing**, milliseconds (speed-up over dense)
    <BLANKLINE>
    | length | dense | 1 % |
    | ---: | ---: | ---: |
    | 4096 | 20 | 1 (20×) |
    """
    blocks = []
    for part in dict.fromkeys(row["part"] for row in rows if row["milliseconds"] is not None):
        found = {(row["length"], row["usage"]): row for row in rows if row["part"] == part}
        lengths, usages = (sorted({key[i] for key in found}) for i in (0, 1))
        names = [f"{100 * usage:.4g} %" for usage in usages]
        if part == "decode":
            names = ["routed" if usage else "not routed" for usage in usages]
        lines = [
            f"**{part}**, milliseconds (speed-up over dense)",
            "",
            f"| length | dense | {' | '.join(names)} |",
            "| ---: |" + " ---: |" * (1 + len(usages)),
        ]
        for length in lengths:
            line = [found.get((length, usage)) for usage in usages]
            dense = next((r["dense_milliseconds"] for r in line if r), None)
            shown = "none" if dense is None else f"{dense:.3g}"
            lines.append(f"| {length} | {shown} | {' | '.join(map(_cell, line))} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def main(config: MixingBenchConfig, out: Path) -> dict[str, Any]:
    """Runs the benchmark, prints each row as it comes and the table last, and writes JSON.

    The file is replaced after every row, so a run that is cut off keeps what it measured.

    Args:
      config: see `run`.
      out: the JSON file to write; its folder is made.

    Returns:
      The result of `run`.
    """

    def heading(result: dict[str, Any]) -> str:
        return (
            f"{result['device']}, {config.dtype}: {config.num_heads} query and "
            f"{config.num_kv_heads} key/value heads of {config.head_dim}, batch 1, dense "
            f"attention by {result['attention']}"
        )

    return record(
        functools.partial(run, config), Path(out), describe=_line, table=table, heading=heading
    )


def _line(row: Row) -> str:
    line = f"{row['part']:<11} {row['length']:>6} {100 * row['usage']:>6.4g} %  "
    if row["milliseconds"] is not None:
        line += f"{row['milliseconds']:>10.4f} ms ± {row['spread']:<8.2g} "
    if row["dense_milliseconds"] is not None:
        line += f"dense {row['dense_milliseconds']:>10.4f} ms ± {row['dense_spread']:<8.2g} "
    if row["speedup"] is not None:
        line += f"{row['speedup']:>8.2f}×"
    return f"{line} {row.get('error', '')}"
