"""Markdown tables rendered from result files."""

import collections
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

from routing_jax.evals.results import Result, Summary, summary

# What the source claims (an article; its code is not available), for the routed model only.
PUBLISHED = {
    "recall-128": "100 % at 0.3 % (distance 126)",
    "recall-256": "100 % at 25 % (distance 254)",
    "recall-512": "100 % at 25 % (distance 510)",
}
NOTHING = "–"


class Column(NamedTuple):
    """A column's heading and how its cells are aligned."""

    name: str
    align: Literal["left", "right", "center"] = "right"


def markdown_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, padded so that its source reads as a table too.

    Raises:
      ValueError: a row with more or fewer cells than there are columns.

    >>> print(markdown_table([Column("task", "left"), Column("ms")], [["a", "1.5"]]))
    | task |  ms |
    |:-----|----:|
    | a    | 1.5 |
    """
    for i, row in enumerate(rows):
        if len(row) != len(columns):
            raise ValueError(f"Row {i} has {len(row)} cells; it must have {len(columns)}.")
    table = [[column.name for column in columns], *rows]
    table = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in table]
    widths = [max(3, *map(len, cells)) for cells in zip(*table)]
    pad: dict[str, Callable[[str, int], str]] = {
        "left": str.ljust,
        "right": str.rjust,
        "center": str.center,
    }
    lines = [
        "| " + " | ".join(pad[c.align](cell, w) for c, cell, w in zip(columns, row, widths)) + " |"
        for row in table
    ]
    rule = {"left": ":{}-", "right": "-{}:", "center": ":{}:"}
    rules = [rule[c.align].format("-" * w) for c, w in zip(columns, widths)]
    return "\n".join([lines[0], "|" + "|".join(rules) + "|", *lines[1:]])


def percent_down(fraction: float) -> str:
    """A fraction in percent, rounded down, so that only exactly 1 reads as 100 %.

    >>> percent_down(1.0), percent_down(0.999999), percent_down(0.9951)
    ('100 %', '99.99 %', '99.51 %')
    """
    return "100 %" if fraction == 1 else f"{math.floor(fraction * 1e4 + 1e-6) / 100:.2f} %"


def multiple_up(ratio: float) -> str:
    """A multiple, rounded up, so that none reads as smaller than it is.

    >>> multiple_up(1.0), multiple_up(2.001), multiple_up(243.2)
    ('1.00×', '2.01×', '244×')
    """
    places = 2 if ratio < 10 else 0
    scale = 10**places
    return f"{math.ceil(ratio * scale - 1e-6) / scale:,.{places}f}×"


def significant(value: float, digits: int = 3) -> str:
    """A number with at least so many significant digits, never in powers of ten.

    >>> significant(0.0039062), significant(25.0), significant(1234.6)
    ('0.00391', '25.0', '1,235')
    """
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def _percent(fraction: float) -> str:
    return f"{significant(100 * fraction)} %"


def _with_worst(mean: str, worst: str) -> str:
    return mean if mean == worst else f"{mean} ({worst})"


class _Row(NamedTuple):
    """The seeds of one variant in one task."""

    task: str
    variant: str
    runs: list[Result]

    def mean(
        self,
        field: str,
        show: Callable[[float], str],
        worst: Callable[[Summary], float] | None = None,
    ) -> str:
        """The mean over seeds, the worst seed where it differs, and how many seeds if not all."""
        figures = summary(self.runs, field)
        if figures is None:
            return NOTHING
        text = show(figures.mean)
        if worst is not None:
            text = _with_worst(text, show(worst(figures)))
        every = figures.seeds == len(self.runs)
        return text if every else f"{text} [{figures.seeds} of {len(self.runs)} seeds]"

    def times_least(self) -> str:
        """Usage ÷ the least possible."""
        floor = self.runs[0].least_usage
        if not floor or any(run.least_usage != floor for run in self.runs):
            return NOTHING
        usage = [run.usage / floor for run in self.runs]
        return _with_worst(multiple_up(statistics.fmean(usage)), multiple_up(max(usage)))

    def time(self, field: str) -> str:
        """A mean of wall-clock over the seeds that were timed on the device that timed most."""
        if len({run.device for run in self.runs}) == 1:
            return self.mean(field, significant)
        timed = [run for run in self.runs if getattr(run, field) is not None]
        most = collections.Counter(run.device for run in timed).most_common(2)
        if not most or len({seeds for _, seeds in most}) < len(most):
            return NOTHING
        (device, seeds), *_ = most
        mean = statistics.fmean(getattr(run, field) for run in timed if run.device == device)
        return f"{significant(mean)} [{seeds} of {len(self.runs)} seeds, {device}]"

    def devices(self) -> str:
        return ", ".join(sorted({run.device for run in self.runs}))


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """A sort key that puts recall-256 before recall-1024.

    >>> sorted(["recall-1024", "recall-256"], key=natural_order)
    ['recall-256', 'recall-1024']
    """
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)
    ]


def _rows(results: Sequence[Result]) -> list[_Row]:
    """Tasks in natural order; in each routed, its changes (routed+...), full, and the rest."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for run in sorted(results, key=lambda run: run.seed):
        groups.setdefault((run.task, run.variant), []).append(run)

    def order(key: tuple[str, str]):
        task, variant = key
        ranks = (variant == "routed", variant.startswith("routed+"), variant == "full", True)
        return natural_order(task), ranks.index(True), variant

    return [_Row(*key, groups[key]) for key in sorted(groups, key=order)]


def _lowest(figures: Summary) -> float:
    return figures.lowest


def _highest(figures: Summary) -> float:
    return figures.highest


def _spent(row: _Row) -> list[str]:
    """The cells that every table ends with."""
    return [
        row.mean("cost", significant),
        row.mean("kv_cost", significant),
        row.time("mixing_ms"),
        row.time("minutes"),
        str(len(row.runs)),
    ]


_SPENT = [Column("cost"), Column("kv cost"), Column("mixing, ms"), Column("minutes")]
_SPENT += [Column("seeds")]


def _with_devices(
    columns: list[Column], cells: list[list[str]], rows: list[_Row]
) -> tuple[list[Column], list[list[str]]]:
    """Names each row's device where there are several: milliseconds of two don't compare."""
    if len({run.device for row in rows for run in row.runs}) == 1:
        return columns, cells
    named = [[*line, row.devices()] for line, row in zip(cells, rows)]
    return [*columns, Column("device", "left")], named


def _task_cells(rows: list[_Row]) -> list[str]:
    """Each task's name on its first row only."""
    previous = ["", *(row.task for row in rows)]
    return ["" if row.task == before else row.task for row, before in zip(rows, previous)]


def recall_table(results: Sequence[Result]) -> str:
    """Accuracy and usage of recall tasks, a row a variant; worst seeds in brackets."""
    rows = _rows(results)
    columns = [
        Column("task", "left"),
        Column("variant", "left"),
        Column("accuracy (worst)"),
        Column("pair at first place (worst)"),
        Column("hard usage (worst)"),
        Column("× least possible (worst)"),
        *_SPENT,
        Column("published", "left"),
    ]
    cells = [
        [
            task,
            row.variant,
            row.mean("accuracy", percent_down, _lowest),
            row.mean("accuracy_first_place", percent_down, _lowest),
            row.mean("usage", _percent, _highest),
            row.times_least(),
            *_spent(row),
            PUBLISHED.get(row.task, NOTHING) if row.variant == "routed" else NOTHING,
        ]
        for task, row in zip(_task_cells(rows), rows)
    ]
    return markdown_table(*_with_devices(columns, cells, rows))


def more_in_percent(share: float) -> str:
    """A share that something is more than something else, with its sign; 0 where it rounds to it.

    >>> more_in_percent(0.0123), more_in_percent(-1e-9)
    ('+1.23 %', '+0.00 %')
    """
    return f"{round(100 * share, 2) + 0.0:+.2f} %"


def text_table(results: Sequence[Result]) -> str:
    """Bits per byte of text tasks, a row a variant, beside attention everywhere, seed by seed."""
    rows = _rows(results)
    full = {row.task: row.runs for row in rows if row.variant == "full"}
    columns = [
        Column("task", "left"),
        Column("variant", "left"),
        Column("bits per byte ± std"),
        Column("against full (worst)"),
        Column("hard usage (worst)"),
        *_SPENT,
    ]
    cells = []
    for task, row in zip(_task_cells(rows), rows):
        figures = summary(row.runs, "bits_per_byte")
        spread = "" if figures is None or figures.seeds == 1 else f" ± {figures.std:.4f}"
        against = NOTHING
        if row.variant != "full":
            against = _against(row, full.get(row.task, []), "bits_per_byte", max)
        cells.append(
            [
                task,
                row.variant,
                row.mean("bits_per_byte", "{:.4f}".format) + spread,
                against,
                row.mean("usage", _percent, _highest),
                *_spent(row),
            ]
        )
    return markdown_table(*_with_devices(columns, cells, rows))


_TOKENS = "Hard usage: fraction of tokens that attend, mean over layers."
_BLOCKS = (
    "Blocks visited: share of the key blocks that a query could see, mean over layers, of which "
    "convolutions and linear attention visit none. Cost is a mean over all layers as well; the "
    "router's work is in it and in the budget, so that fixed patterns list more blocks where it "
    "weighs. Against dense: routers with a budget went on from base, which attends everywhere, for "
    "as many steps as full; all others, '+scratch' among them, were trained as base was. An "
    "indexer's router was distilled from base before, which changed nothing else in it, and is so "
    "still while its model goes on; '+distilled' routers begin as it does. Seeds are compared "
    "one by one: their bases differ by more than the best routers do."
)


def caption(results: Sequence[Result], usage: str = _TOKENS) -> str:
    """How to read the tables and what they were measured on, all of it from the results.

    Args:
      results: that the tables show.
      usage: what is said of the column of usage.
    """
    devices = sorted({run.device for run in results})
    packages = sorted(
        {(name, version) for run in results for name, version in run.versions.items()}
    )
    seeds = sorted({run.seed for run in results})
    sequences = sorted({run.sequences for run in results})
    held_out = f"{sequences[0]:,}" + (f" to {sequences[-1]:,}" if len(sequences) > 1 else "")
    return (
        "Mean over seeds, the worst seed in brackets where it reads otherwise; ± is the sample "
        "standard deviation over seeds. Accuracy is rounded down. "
        f"{usage} Cost and kv cost: multiply-adds and key/value bytes ÷ those of full attention. "
        f"Device: {'; '.join(devices)}. "
        f"Versions: {', '.join(f'{name} {version}' for name, version in packages)}. "
        f"Seeds: {', '.join(map(str, seeds))}. Held-out sequences a run: {held_out}."
    )


def routed_attention_table(results: Sequence[Result]) -> str:
    """The experiment's tables and their caption; results with bits per byte are text.

    Raises:
      ValueError: no results.
    """
    if not results:
        raise ValueError("results is empty; a table needs at least one result.")
    text = [run for run in results if run.bits_per_byte is not None]
    recall = [run for run in results if run.bits_per_byte is None]
    parts = [recall_table(recall)] if recall else []
    parts += [text_table(text)] if text else []
    return "\n\n".join([*parts, caption(results)])


def router_of(variant: str) -> str:
    """The router of a variant of block routing, without its budget in percent.

    >>> router_of("sink-window-25"), router_of("window-1k")
    ('sink-window', 'window-1k')
    """
    return re.sub(r"-\d+$", "", variant)


def dense_of(variant: str) -> str:
    """The variant with attention everywhere that was trained as this one of block routing.

    >>> [dense_of(variant) for variant in ("pooled-25", "pooled+scratch-25", "window-1k")]
    ['full', 'base', 'base']
    """
    went_on = router_of(variant) != variant and "+scratch" not in variant
    return "full" if went_on else "base"


def _head_range(row: _Row) -> str:
    """Least and most share of blocks that a head visits, over layers and seeds."""
    shares = [
        share
        for run in row.runs
        for layer in (run.details or {}).get("head_usage", [])
        for share in layer
    ]
    return f"{_percent(min(shares))} to {_percent(max(shares))}" if shares else NOTHING


def against_dense(runs: Sequence[Result], dense: Sequence[Result], field: str) -> dict[int, float]:
    """By how much of dense attention's figure each seed's is more than that of the same seed.

    Bases of several seeds may differ by more than routers do: nothing is compared across them.

    Args:
      runs: of one variant.
      dense: attention everywhere, trained alike.
      field: the figure.
    """
    theirs = {run.seed: getattr(run, field) for run in dense}
    return {
        run.seed: getattr(run, field) / theirs[run.seed] - 1
        for run in runs
        if theirs.get(run.seed) and getattr(run, field) is not None
    }


def _against(
    row: _Row, dense: Sequence[Result], field: str, worst: Callable[[Iterable[float]], float]
) -> str:
    more = against_dense(row.runs, dense, field).values()
    if not more:
        return NOTHING
    text = _with_worst(*map(more_in_percent, (statistics.fmean(more), worst(more))))
    every = len(more) == len(row.runs)
    return text if every else f"{text} [{len(more)} of {len(row.runs)} seeds]"


def block_routing_table(results: Sequence[Result]) -> str:
    """Quality and cost of block routers, a row a router and budget, beside dense attention.

    Raises:
      ValueError: no results.
    """
    if not results:
        raise ValueError("results is empty; a table needs at least one result.")
    rows = _rows(results)
    dense = {(row.task, row.variant): row.runs for row in rows if row.variant in ("full", "base")}
    columns = [
        Column("task", "left"),
        Column("router and budget, %", "left"),
        Column("accuracy (worst)"),
        Column("bits per byte ± std"),
        Column("against dense (worst)"),
        Column("blocks visited (worst)"),
        Column("by head"),
        *_SPENT,
    ]
    cells = []
    for task, row in zip(_task_cells(rows), rows):
        text = row.runs[0].bits_per_byte is not None
        figures = summary(row.runs, "bits_per_byte")
        spread = "" if figures is None or figures.seeds == 1 else f" ± {figures.std:.4f}"
        field = "bits_per_byte" if text else "accuracy"
        against = NOTHING
        if row.variant not in ("full", "base"):
            peers = dense.get((row.task, dense_of(row.variant)), [])
            against = _against(row, peers, field, max if text else min)
        cells.append(
            [
                task,
                row.variant,
                NOTHING if text else row.mean("accuracy", percent_down, _lowest),
                row.mean("bits_per_byte", "{:.4f}".format) + spread,
                against,
                row.mean("usage", _percent, _highest),
                _head_range(row),
                *_spent(row),
            ]
        )
    table = markdown_table(*_with_devices(columns, cells, rows))
    return "\n\n".join([table, caption(results, _BLOCKS)])
