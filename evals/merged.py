"""Several runs of one benchmark on one device, read as one result."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Group = tuple[Any, ...]

# What runs may differ in: what was measured, when, for how long and how often, and what rows say.
_OWN = frozenset({"rows", "date", "seconds", "xla_flags", "config", "runs"})
_ASKED = frozenset(
    {"parts", "passes", "who", "lengths", "prefill_batches", "decode_batches", "fractions"}
    | {"repeats", "seconds", "row_seconds", "compile_threads"}
    | {"blocks", "means", "channels"}
)


def merged(results: Sequence[Mapping[str, Any]], group: Callable[[Row], Group]) -> dict[str, Any]:
    """One result of several: what was measured again is what the later run found.

    Rows that are compared with one another stay together, as machines differ from run to run: all
    of a group are from the run that timed most of them, the latest of such.

    Args:
      results: of one benchmark on one device, in any order, their dates ISO 8601.
      group: what a row is compared within, beginning with the part that it belongs to.

    Returns:
      The latest result that rows were taken from, with the rows of all, the most repeats of any,
      and `runs`: date, xla_flags and groups of each run that rows were taken from.

    Raises:
      ValueError: no results, of several devices, or of runs that differ in more than what was
        measured and how often.

    >>> one = {"device": "box", "date": "2026-01-01", "config": {"repeats": 5},
    ...        "rows": [{"part": "step", "milliseconds": 2.0}]}
    >>> two = one | {"date": "2026-01-02", "rows": [{"part": "step", "milliseconds": 1.0}]}
    >>> merged([two, one], lambda row: (row["part"],))["rows"]
    [{'part': 'step', 'milliseconds': 1.0}]
    """
    devices = sorted({result["device"] for result in results})
    if len(devices) != 1:
        raise ValueError(f"results are of {len(devices)} devices ({', '.join(devices)}); give one.")
    in_order = sorted(results, key=lambda result: result["date"])
    found: dict[Group, tuple[int, int]] = {}  # rows timed, and the run that timed them
    for i, result in enumerate(in_order):
        timed: dict[Group, int] = {}
        for row in result["rows"]:
            timed[group(row)] = timed.get(group(row), 0) + (row["milliseconds"] is not None)
        for name, count in timed.items():
            found[name] = max(found.get(name, (0, 0)), (count, i))
    runs = [
        {
            "date": result["date"],
            "xla_flags": result.get("xla_flags", ""),
            "groups": [name for name, (_, run) in found.items() if run == i],
        }
        for i, result in enumerate(in_order)
    ]
    used = [result for result, run in zip(in_order, runs) if run["groups"]] or in_order[-1:]
    _check_alike(used)
    rows = [
        row
        for i, result in enumerate(in_order)
        for row in result["rows"]
        if found[group(row)][1] == i
    ]
    last = used[-1]
    config = last.get("config", {})
    repeats = [result.get("config", {}).get("repeats", 0) for result in used]
    config = config | ({"repeats": max(repeats)} if max(repeats) else {})
    return {**last, "config": config, "rows": rows, "runs": [run for run in runs if run["groups"]]}


def _check_alike(results: Sequence[Mapping[str, Any]]) -> None:
    """Refuses runs whose caption would not be true of one another's rows."""
    for result in results[1:]:
        for one, other, free in (
            (results[0], result, _OWN),
            (results[0].get("config", {}), result.get("config", {}), _ASKED),
        ):
            differ = [n for n in one.keys() | other.keys() if one.get(n) != other.get(n)]
            if differ := sorted(set(differ) - free):
                name = differ[0]
                raise ValueError(
                    f"runs of {results[0]['date'][:10]} and {result['date'][:10]} differ in {name} "
                    f"({one.get(name)!r} and {other.get(name)!r}); they can't be read as one."
                )
