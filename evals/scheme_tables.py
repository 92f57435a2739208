"""The tables of the experiment 'moas', from its result files."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from routing_jax.evals.provenance import dated_versions, named_device
from routing_jax.evals.results import Result
from routing_jax.evals.tables import NOTHING, Column, markdown_table, significant

# The paper's own figures stand beside runs of its released code: seeds 1 to 3, the same text and
# split as ours (WikiText-2's validation and test parts), the whole held-out part.
RELEASED = {
    ("steps-500", "mha"): (2.182, 2.220, 2.201),
    ("steps-500", "average"): (2.170, 2.175, 2.177),
    ("steps-500", "soft"): (2.211, 2.204, 2.189),
}
PUBLISHED = {
    ("steps-500", "mha"): "2.2940",
    ("steps-500", "average"): "2.3093",
    ("steps-500", "soft"): "2.3074",
    ("steps-2000", "mha"): "1.6167",
    ("steps-2000", "average"): "1.5802",
    ("steps-2000", "soft"): "1.6618",
}


def with_error(values: Sequence[float], places: int = 4) -> str:
    """A mean and its standard error over seeds.

    >>> with_error([2.0, 2.2]), with_error([2.0])
    ('2.1000 ± 0.1000', '2.0000')
    """
    text = f"{statistics.fmean(values):.{places}f}"
    if len(values) < 2:
        return text
    return f"{text} ± {statistics.stdev(values) / math.sqrt(len(values)):.{places}f}"


def _groups(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """Runs by task and variant, 500 steps before 2,000, MHA first."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for run in sorted(results, key=lambda run: run.seed):
        groups.setdefault((run.task, run.variant), []).append(run)
    ranks = ("mha", "mha+matched", "mha+matched-nested", "gqa2", "mqa", "average", "soft")

    def order(key: tuple[str, str]) -> tuple:
        task, variant = key
        rank = ranks.index(variant) if variant in ranks else len(ranks)
        return int(task.rsplit("-", 1)[-1]), rank, variant

    return {key: groups[key] for key in sorted(groups, key=order)}


def _mean(runs: Sequence[Result], read: Callable[[Result], float | None]) -> str:
    values = [v for v in map(read, runs) if v is not None]
    return significant(statistics.fmean(values)) if values else NOTHING


def _detail(name: str) -> Callable[[Result], Any]:
    return lambda run: (run.details or {}).get(name)


def _read_bytes(run: Result) -> float | None:
    dense = _detail("kv_bytes_dense")(run)
    return None if dense is None else run.kv_cost * dense / 1024


def quality_table(results: Sequence[Result]) -> str:
    """Nats a character beside what is spent: a row a variant of a task.

    >>> quality_table([]).count("|") // 2  # a heading and a rule
    13
    """
    columns = [
        Column("task", "left"), Column("variant", "left"), Column("nats/character ± error"),
        Column("less than MHA's"), Column("kv cost"), Column("KiB read a token"),
        Column("KiB stored a token"), Column("cost"), Column("parameters, M"), Column("seeds"),
        Column("released code"), Column("paper"),
    ]  # fmt: skip
    groups = _groups(results)
    lines, before = [], ""
    for (task, variant), runs in groups.items():
        # Each beside the MHA that has as many parameters.
        equal = "mha+matched-nested" if variant.startswith("nested") else "mha+matched"
        base = groups.get((task, equal))
        gain = NOTHING
        if base and not variant.startswith("mha+matched"):
            by_seed = {run.seed: run.loss for run in base}
            gains = [by_seed[run.seed] - run.loss for run in runs if run.seed in by_seed]
            gain = with_error(gains) if gains else NOTHING
        released = RELEASED.get((task, variant))
        stored = [_detail("kv_bytes_stored")(run) for run in runs]
        lines.append(
            [
                task if task != before else "",
                variant,
                with_error([run.loss for run in runs]),
                gain,
                _mean(runs, lambda run: run.kv_cost),
                _mean(runs, _read_bytes),
                significant(stored[0] / 1024) if stored[0] else NOTHING,
                _mean(runs, lambda run: run.cost),
                f"{runs[0].parameters / 1e6:.2f}",
                str(len(runs)),
                with_error(released, 3) if released else NOTHING,
                PUBLISHED.get((task, variant), NOTHING),
            ]
        )
        before = task
    return markdown_table(columns, lines)


def use_table(results: Sequence[Result]) -> str | None:
    """How often each scheme is used, by layer and by class of character; None if none is mixed."""
    lines, before = [], ""
    for (task, variant), runs in _groups(results).items():
        mixed = [run.details for run in runs if run.details and "share" in run.details]
        if not mixed:
            continue

        def shares(read: Callable[[dict[str, Any]], list[list[float]]], mixed=mixed) -> list[str]:
            """For each layer the schemes' mean shares over seeds, in percent."""
            layers = zip(*(read(details) for details in mixed))
            means = ([statistics.fmean(s) for s in zip(*layer)] for layer in layers)
            return ["/".join(f"{100 * share:.0f}" for share in layer) for layer in means]

        def over_layers(name: str, mixed=mixed) -> str:
            known = [d["by_class"][name] for d in mixed if name in d["by_class"]]
            means = [[statistics.fmean(s) for s in zip(*layers)] for layers in known]
            if not means:
                return NOTHING
            return "/".join(f"{100 * statistics.fmean(s):.0f}" for s in zip(*means))

        entropy = statistics.fmean(statistics.fmean(d["entropy"]) for d in mixed)
        lines.append(
            [
                task if task != before else "",
                variant,
                "/".join(mixed[0]["schemes"]),
                ", ".join(shares(lambda details: details["share"])),
                *(over_layers(name) for name in ("letter", "digit", "space", "other")),
                f"{entropy:.3f}",
            ]
        )
        before = task
    columns = [
        Column("task", "left"), Column("variant", "left"), Column("schemes", "left"),
        Column("% by layer", "left"), Column("% letters"), Column("% digits"), Column("% spaces"),
        Column("% others"), Column("entropy, nats"),
    ]  # fmt: skip
    return markdown_table(columns, lines) if lines else None


def elsewhere_table(results: Sequence[Result]) -> str | None:
    """Nats a character on other texts, router and all as they were trained; None without any."""
    groups = _groups(results)
    found = [_detail("elsewhere")(run) or {} for runs in groups.values() for run in runs]
    names = sorted({name for texts in found for name in texts})
    if not names:
        return None
    lines, before = [], ""
    for (task, variant), runs in groups.items():
        cells = []
        for name in names:
            texts = [run.details["elsewhere"].get(name) for run in runs if run.details]
            losses = [text["loss"] for text in texts if text]
            costs = [text["kv_cost"] for text in texts if text]
            cells += [with_error(losses), f"{statistics.fmean(costs):.3f}"] if losses else [
                NOTHING, NOTHING
            ]  # fmt: skip
        lines.append([task if task != before else "", variant, *cells])
        before = task
    columns = [Column("task", "left"), Column("variant", "left")]
    for name in names:
        columns += [Column(f"{name}, nats/character ± error"), Column("kv cost")]
    return markdown_table(columns, lines)


# What a variant is timed at, by the heading of its column; of decoding, bytes stand beside.
_TIMED = {
    "step": "step, ms",
    "forward": "forward, ms",
    "decode": "decode, ms",
    "decode-long": "long cache, ms",
}


def times_table(rows: Sequence[dict[str, Any]]) -> str:
    """Milliseconds of each variant at what was timed, beside MHA's.

    >>> row = {"part": "step", "variant": "mha", "milliseconds": 4.0, "kv_cost": 1.0,
    ...        "kv_bytes": None}
    >>> long = row | {"part": "decode-long", "milliseconds": 0.5, "kv_bytes": 2**20}
    >>> rows = [row, row | {"variant": "soft", "milliseconds": 6.0}, long]
    >>> print(times_table(rows))
    | variant |     step, ms | long cache, ms | MiB read |
    |:--------|-------------:|---------------:|---------:|
    | mha     | 4.00 (1.00×) |  0.500 (1.00×) |     1.00 |
    | soft    | 6.00 (1.50×) |              – |        – |
    """
    found = {(row["part"], row["variant"]): row for row in rows if row["milliseconds"] is not None}
    timed = [part for part in _TIMED if any(part == of for of, _ in found)]

    def cells(part: str, variant: str) -> list[str]:
        row, base = found.get((part, variant)), found.get((part, "mha"))
        shown = [NOTHING] * (1 + part.startswith("decode"))
        if row is not None:
            beside = f" ({row['milliseconds'] / base['milliseconds']:.2f}×)" if base else ""
            shown[0] = significant(row["milliseconds"]) + beside
            shown[1:] = [significant(row["kv_bytes"] / 2**20) for _ in shown[1:]]
        return shown

    columns = [Column("variant", "left")]
    for part in timed:
        columns += [Column(_TIMED[part]), Column("MiB read")][: 1 + part.startswith("decode")]
    lines = [
        [name, *(cell for part in timed for cell in cells(part, name))]
        for name in dict.fromkeys(row["variant"] for row in rows)
    ]
    return markdown_table(columns, lines)


def times_caption(result: dict[str, Any]) -> str:
    """What the times were measured on, from their result file."""
    return (
        "Models as initialised, one after another in one process, calls chained on the device; × "
        "beside MHA. Step: a whole training step; forward: a batch in evaluation; decode: a token "
        "of one sequence at the end of a context; long cache: the same of "
        f"{result['long']:,} tokens; MiB of keys and values that it read, counted. "
        f"{named_device(result)}, {dated_versions(result)}"
    )


def moas_table(results: Sequence[Result]) -> str:
    """The experiment's tables and how to read them.

    Raises:
      ValueError: no results.
    """
    if not results:
        raise ValueError("results is empty; a table needs at least one result.")
    devices = "; ".join(sorted({run.device for run in results}))
    caption = (
        "Whole held-out part; ± is the standard error over seeds. Less than MHA's: nats saved "
        "against MHA with as many parameters (mha+matched, of nested schemes mha+matched-nested), "
        "paired by seed. Kv cost: key/value bytes read ÷ those of MHA; KiB read for a decoded "
        "token, mean over the context's positions; KiB stored for each token. Released code: three "
        "seeds of it on WikiText-2's validation and test parts. Paper: its own figures, on another "
        f"split. Device: {devices}."
    )
    parts = [quality_table(results), use_table(results), elsewhere_table(results), caption]
    return "\n\n".join(part for part in parts if part)
