"""What every benchmark's run needs: a time limit, errors as text, results written whole."""

import concurrent.futures
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from routing_jax.evals.benchmarks.timing import Timing
from routing_jax.files import write_whole


class Clock:
    """The time left of a budget; 0 seconds for no limit."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds if seconds else float("inf")
        self._seconds = seconds

    def check(self) -> None:
        """Raises TimeoutError, which says that something was skipped, once the time is spent."""
        if time.monotonic() > self._end:
            raise TimeoutError(f"skipped: the {self._seconds:g} s allowed were spent.")


def error_text(error: Exception) -> str:
    r"""A failure in one line, for a row.

    >>> error_text(MemoryError("too\nbig"))
    'MemoryError: too big'
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class Measured[T](NamedTuple):
    """What came of one measurement: its timing, or why there is none."""

    timing: T | None
    error: str | None


def measure_in_time[T](
    clock: Clock, program: concurrent.futures.Future, measure: Callable[[Any], T]
) -> Measured[T]:
    """Times a program once it is compiled, unless that failed or the time is spent.

    Args:
      clock: of the whole benchmark.
      program: compiled by another thread.
      measure: takes what was compiled.
    """
    try:
        ready = program.result()
        clock.check()
        return Measured(measure(ready), None)
    except Exception as error:  # one size that fails must not cost the others
        return Measured(None, error_text(error))


def beside_dense(routed: Measured[Timing], dense: Measured[Timing]) -> dict[str, Any]:
    """What a row says of a routed and a dense measurement: times, spreads, speed-up, errors.

    >>> row = beside_dense(Measured(Timing(2.0, 0.1), None), Measured(Timing(6.0, 0.2), None))
    >>> row["milliseconds"], row["speedup"], "error" in row
    (2.0, 3.0, False)
    >>> beside_dense(Measured(None, "MemoryError: big"), Measured(Timing(6.0, 0.2), None))["error"]
    'routed: MemoryError: big'
    """
    timed, base = routed.timing, dense.timing
    row: dict[str, Any] = {
        "milliseconds": timed and timed.milliseconds,
        "spread": timed and timed.spread,
        "dense_milliseconds": base and base.milliseconds,
        "dense_spread": base and base.spread,
        "speedup": timed and base and base.milliseconds / timed.milliseconds,
    }
    failed = {"routed": routed.error, "dense": dense.error}
    errors = [f"{name}: {error}" for name, error in failed.items() if error]
    return row | ({"error": "; ".join(errors)} if errors else {})


def missing_word(row: dict[str, Any]) -> str:
    """What a table shows of a row without a measurement.

    >>> missing_word({"error": "TimeoutError: skipped: the 5 s allowed were spent."})
    'skipped'
    """
    return "skipped" if "skipped" in row.get("error", "") else "failed"


def set_memory_fraction(fraction: float) -> None:
    """The share of a GPU's memory that jax takes at its start, unless the user has said another."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    if not any(name in os.environ for name in names):
        os.environ[names[0]] = str(fraction)


def write_json(result: dict[str, Any], out: Path) -> None:
    """Replaces `out` at once: a reader sees the old file or the new one, whole.

    Raises:
      OSError: it can't be written; the file is named.
    """
    write_whole(out, json.dumps(result, indent=1, allow_nan=False) + "\n")


def collect(
    result: dict[str, Any],
    rows: Iterable[dict[str, Any]],
    report: Callable[[dict[str, Any]], None] | None,
    revise: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """A result with rows added as they come, and the seconds since the first was asked for.

    Args:
      result: says how and where things are measured.
      rows: are measured as they are taken.
      report: called with the result so far after each row; None for nobody.
      revise: changes in the result what follows from its rows, before it is reported.

    Returns:
      The result, the same dict.

    >>> collect({"device": "CPU"}, ({"milliseconds": i} for i in range(2)), None)["rows"]
    [{'milliseconds': 0}, {'milliseconds': 1}]
    """
    start = time.monotonic()
    result |= {"seconds": 0.0, "rows": []}
    for row in rows:
        result["rows"].append(row)
        if revise is not None:
            revise(result)
        result["seconds"] = round(time.monotonic() - start, 1)
        if report is not None:
            report(result)
    return result


def record(
    run: Callable[[Callable[[dict[str, Any]], None]], dict[str, Any]],
    out: Path,
    *,
    describe: Callable[[dict[str, Any]], str],
    table: Callable[[list[dict[str, Any]]], str],
    heading: Callable[[dict[str, Any]], str] | None = None,
    plot: Callable[[list[dict[str, Any]], Path], Any] | None = None,
) -> dict[str, Any]:
    """Runs a benchmark, prints each row as it comes and the table last, and writes JSON.

    The file is replaced after every row, so a run that is cut off keeps what it measured.

    Args:
      run: takes what is to be called with the result so far after each row; returns the result.
      out: the JSON file to write; its folder is made.
      describe: a row to a line.
      table: all rows to Markdown.
      heading: a result to the line before its first row.
      plot: draws all rows into a file, named as `out` but for '.png'.

    Returns:
      The result of `run`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)

    def report(result: dict[str, Any]) -> None:
        write_json(result, out)
        if heading is not None and len(result["rows"]) == 1:
            print(heading(result))
        print(describe(result["rows"][-1]), flush=True)

    result = run(report)
    print(f"\n{table(result['rows'])}\n")
    if plot is not None:
        plot(result["rows"], out.with_suffix(".png"))
    print(f"{len(result['rows'])} rows in {result['seconds']} s: {out}")
    return result
