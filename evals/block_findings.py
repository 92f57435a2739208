"""What the results of block routing say: whether routing was tested, and who beats whom."""

import math
import statistics
from collections.abc import Collection, Sequence
from typing import NamedTuple

from routing_jax.evals.attention_error import least_cost
from routing_jax.evals.results import Result, Summary, summary
from routing_jax.evals.tables import (
    Column,
    against_dense,
    dense_of,
    markdown_table,
    more_in_percent,
    natural_order,
    router_of,
    significant,
)

# What doesn't look at its input; the best counts. In the last, heads learn how far they see.
_FIXED = ("window", "sink-window", "strided", "bigbird", "window-gates")
_RANDOM = ("random", "random-gates")  # each of which counts
_MORE = 1.1  # times the cost of the controls that a router may have beside them
_NEEDED = 0.02  # fewer bits per byte with the whole context, or a text cannot test routing
_ERROR = 0.1


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


class Lead(NamedTuple):
    """By how much one variant is better than another, seed by seed.

    Attributes:
      by: mean of the seeds' differences, above 0 where the first is better.
      errors: the same in standard errors of that mean; None with one seed.
      seeds: how many both have.
    """

    by: float
    errors: float | None
    seeds: int

    def words(self, name: str) -> str:
        """The lead over a variant, in words.

        >>> Lead(0.0123, 3.14, 2).words("random"), Lead(-0.5, None, 1).words("window")
        ('0.0123 better than random (3.1 standard errors, 2 seeds)', '0.500 worse than window (one seed)')
        """  # noqa: E501 - as it is printed
        sure = _seeds(self.seeds)
        if not self.by:
            return f"as good as {name} ({sure})"
        if self.errors is not None:
            found = f"{abs(self.errors):.1f} standard errors, "
            sure = ("the same in " if math.isinf(self.errors) else found) + sure
        side = "better" if self.by > 0 else "worse"
        return f"{significant(abs(self.by))} {side} than {name} ({sure})"


def lead(ours: Sequence[float], theirs: Sequence[float], *, more_is_better: bool) -> Lead:
    """How much better `ours` are than `theirs` of the same seeds.

    What is trained of one seed goes on from its base and reads the same batches, and bases may
    differ by more than routers do.

    Args:
      ours: a figure a seed.
      theirs: of the same seeds in the same order.
      more_is_better: of the figure.

    >>> round(lead([0.9, 1.9, 2.7], [0.8, 1.7, 2.6], more_is_better=True).errors, 2)
    4.0
    """
    leads = [(a - b) * (1 if more_is_better else -1) for a, b in zip(ours, theirs, strict=True)]
    by, seeds = statistics.fmean(leads), len(leads)
    if seeds < 2:
        return Lead(by, None, seeds)
    error = statistics.stdev(leads) / math.sqrt(seeds)
    return Lead(by, by / error if error else math.copysign(math.inf, by) if by else 0.0, seeds)


class _Budget(NamedTuple):
    """What is compared: routers at one budget, trained alike."""

    percent: int
    scratch: bool


def _percent_of(variant: str) -> int | None:
    budget = variant.removeprefix(router_of(variant)).removeprefix("-")
    return int(budget) if budget else None


def _budget_of(variant: str) -> _Budget | None:
    percent = _percent_of(variant)
    return None if percent is None else _Budget(percent, "+scratch" in variant)


def _figures(runs: Sequence[Result], field: str, seeds: Collection[int]) -> Summary:
    """Of some of the seeds, which the runs have."""
    found = summary((run for run in runs if run.seed in seeds), field)
    assert found is not None
    return found


class _Task:
    """The runs of one task, by variant, and how they are compared."""

    def __init__(self, name: str, runs: Sequence[Result]):
        self.name = name
        self.text = runs[0].bits_per_byte is not None
        self.field = "bits_per_byte" if self.text else "accuracy"
        self.unit = "bits per byte" if self.text else "accuracy"
        self.first = min(run.seed for run in runs)
        self.variants: dict[str, list[Result]] = {}
        for run in runs:
            self.variants.setdefault(run.variant, []).append(run)

    def chosen(self, variants: Collection[str]) -> str:
        """The best of some variants, by the first seed."""

        def figure(variant: str) -> float:
            mean = _figures(self.variants[variant], self.field, {self.first}).mean
            return -mean if self.text else mean

        return max(variants, key=figure)

    def seeds(self, *variants: str) -> set[int]:
        """The seeds by which they are compared: those that did not choose, if there are two."""
        of_each = [{run.seed for run in self.variants[variant]} for variant in variants]
        common = set.intersection(*of_each)
        later = common - {self.first}
        return later if len(later) > 1 else {self.first}

    def lead(self, one: str, other: str) -> Lead:
        """How much better one variant is than another, by the seeds that compare them."""
        seeds = sorted(self.seeds(one, other))
        figures = (
            {run.seed: getattr(run, self.field) for run in self.variants[v]} for v in (one, other)
        )
        ours, theirs = ([of[seed] for seed in seeds] for of in figures)
        return lead(ours, theirs, more_is_better=not self.text)

    def cost(self, variant: str) -> float:
        """Of the first seed, router included, as a share of what attention everywhere costs."""
        costs = {
            run.variant: run.cost
            for runs in self.variants.values()
            for run in runs
            if run.seed == self.first
        }
        return costs[variant] / costs.get(dense_of(variant), 1.0)

    def gate(self) -> list[str]:
        """Whether the task needs a context beyond the window."""
        windows, bases = self.variants.get("window-1k", []), self.variants.get("base", [])
        gains = [0.0 - more for more in against_dense(bases, windows, self.field).values()]
        if not gains:
            return []
        sure = _seeds(len(gains))
        if not self.text:
            seeds = {run.seed for run in bases} & {run.seed for run in windows}
            base, window = (_figures(runs, self.field, seeds) for runs in (bases, windows))
            return [
                f"{self.name}: accuracy {base.mean:.2%} with attention everywhere, "
                f"{window.mean:.2%} within 1,024 tokens ({sure})."
            ]
        verdict = "so it tests routing" if min(gains) >= _NEEDED else "so it cannot test routing"
        least = f", {100 * min(gains):.2f} % at least" if len(gains) > 1 else ""
        return [
            f"{self.name}: attention everywhere has {100 * statistics.fmean(gains):.2f} % fewer "
            f"bits per byte than the same model limited to 1,024 tokens ({sure}{least}; "
            f"{100 * _NEEDED:.0f} % are needed), {verdict}."
        ]

    def at(self, budget: _Budget) -> list[str]:
        """The best router at a budget beside its controls."""
        names = {
            variant: router_of(variant).removesuffix("+scratch")
            for variant, runs in self.variants.items()
            if _budget_of(variant) == budget and any(run.seed == self.first for run in runs)
        }
        fixed = [variant for variant, name in names.items() if name in _FIXED]
        controls = [variant for variant, name in names.items() if name in _RANDOM]
        rest = [variant for variant in names if variant not in (*fixed, *controls)]
        held = [v for v in (*fixed, *controls) if not names[v].endswith("-gates")]
        most = _MORE * max(map(self.cost, held), default=math.inf)
        routers = [variant for variant in rest if self.cost(variant) <= most]
        if not routers:
            return []
        most_seeds = max(len(self.variants[variant]) for variant in routers)
        best = self.chosen([v for v in routers if len(self.variants[v]) == most_seeds])
        if fixed:
            controls.append(self.chosen(fixed))

        def named(variant: str) -> str:
            return f"{names[variant]} at {100 * self.cost(variant):.1f} % of the cost"

        figure = _figures(self.variants[best], self.field, self.seeds(best)).mean
        where = f"{self.name} at {budget.percent} %" + ", from the start" * budget.scratch
        line = [f"{where}: best is {named(best)}, {self.unit} {figure:.4f}"]
        dense = dense_of(best)
        more = against_dense(self.variants[best], self.variants.get(dense, []), self.field)
        if seeds := self.seeds(best) & more.keys():
            change = statistics.fmean(more[seed] for seed in seeds)
            line[0] += f" ({more_in_percent(change)} against attention everywhere)"
        leads = {variant: self.lead(best, variant) for variant in controls}
        line += [found.words(named(variant)) for variant, found in leads.items()]
        if leads and all(found.errors is not None for found in leads.values()):
            won = all((found.errors or 0) > 2 for found in leads.values())
            line.append(
                "better than its controls" if won else "not better than all of its controls"
            )
        if over := [named(variant) for variant in rest if self.cost(variant) > most]:
            line.append(f"beyond the budget: {', '.join(over)}")
        return ["; ".join(line) + "."]


def routing_findings(results: Sequence[Result]) -> str:
    """A Markdown list: for each task and budget the best router beside its controls.

    The best router, of those with the most seeds, and the best fixed pattern are chosen by the
    first seed; they are compared by the others, so that no figure that was chosen by stands in what
    it chose. A router counts as better than a random control, or than that pattern, when it leads
    by more than two standard errors, seed by seed; with fewer than two seeds besides the first
    nothing is said of that. What was trained from the start is compared with what was too, and a
    router that costs more than a tenth more than all controls without gates is named and left out.

    Args:
      results: of the experiment.
    """
    said = []
    for name in sorted({run.task for run in results}, key=natural_order):
        task = _Task(name, [run for run in results if run.task == name])
        said += task.gate()
        budgets = {budget for variant in task.variants if (budget := _budget_of(variant))}
        for budget in sorted(budgets):
            said += task.at(budget)
    if any(run.seed != results[0].seed for run in results):
        said.append(
            "Routers and patterns are chosen by the first seed and compared by the others, where "
            "there are two; the table's means are of all."
        )
    return "\n".join(f"- {line}" for line in said)


def error_table(results: Sequence[Result]) -> str:
    """Output error of routers beside dense attention and the cost of a tenth of error; or ''.

    Args:
      results: of the experiment; those with `attention_error` in their details count.
    """
    rows = [row for run in results for row in (run.details or {}).get("attention_error", [])]
    if not rows:
        return ""
    lengths = sorted({row["length"] for row in rows})
    columns = [Column("router", "left"), Column("budget, %")]
    columns += [Column(f"{length:,} tokens: error at cost") for length in lengths]
    cells = []
    for router in dict.fromkeys(row["router"] for row in rows):
        found = {row["length"]: row for row in rows if row["router"] == router}
        name = router_of(router)
        shown = [f"{found[n]['error']:.3f} at {found[n]['cost']:.3f}" for n in lengths]
        cells.append([name, str(_percent_of(router) or ""), *shown])
    for name in dict.fromkeys(router_of(row["router"]) for row in rows):
        least = [
            least_cost(
                [r for r in rows if router_of(r["router"]) == name and r["length"] == length],
                _ERROR,
            )
            for length in lengths
        ]
        shown = ["–" if cost is None else f"{cost:.3f}" for cost in least]
        cells.append([f"{name}: cost of error {_ERROR:g}", "", *shown])
    return markdown_table(columns, cells)
