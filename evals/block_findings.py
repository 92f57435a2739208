"""What the results of block routing say: whether routing was tested, and who beats whom."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from routing_jax.evals.attention_error import least_cost
from routing_jax.evals.results import Result, Summary, summary
from routing_jax.evals.tables import Column, markdown_table, natural_order, router_of, significant

_FIXED = ("window", "sink-window", "strided", "bigbird")
_RANDOM = "random"
_MORE = 1.1  # times the blocks of the controls that a router may visit beside them
_NEEDED = 0.02  # fewer bits per byte with the whole context, or a text cannot test routing
_ERROR = 0.1


class Lead(NamedTuple):
    """By how much one variant is better than another.

    Attributes:
      by: difference of the means, above 0 where the first is better.
      errors: the same in standard errors of that difference; None with one seed on a side.
    """

    by: float
    errors: float | None

    def words(self, name: str) -> str:
        """The lead over a variant, in words.

        >>> Lead(0.0123, 3.14).words("random"), Lead(-0.5, None).words("window")
        ('0.0123 better than random (3.1 standard errors)', '0.500 worse than window (one seed)')
        """
        side = "better" if self.by > 0 else "worse"
        sure = "one seed" if self.errors is None else f"{abs(self.errors):.1f} standard errors"
        return f"{significant(abs(self.by))} {side} than {name} ({sure})"


def lead(one: Summary, other: Summary, *, more_is_better: bool) -> Lead:
    """How much better `one` is, with the standard errors of both means.

    >>> ours, theirs = Summary(3, 0.9, 0.01, 0.89, 0.91), Summary(3, 0.8, 0.01, 0.79, 0.81)
    >>> round(lead(ours, theirs, more_is_better=True).errors, 2)
    12.25
    """
    by = (one.mean - other.mean) * (1 if more_is_better else -1)
    if min(one.seeds, other.seeds) < 2:
        return Lead(by, None)
    error = math.sqrt(one.std**2 / one.seeds + other.std**2 / other.seeds)
    return Lead(by, by / error if error else math.copysign(math.inf, by) if by else 0.0)


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


def _full(figures: dict[str, Summary], *, scratch: bool) -> Summary | None:
    """Attention everywhere, trained like what it is compared with, or else as it was trained."""
    return (figures.get("full+scratch") if scratch else None) or figures.get("full")


def _gate(task: str, figures: dict[str, Summary], text: bool) -> list[str]:
    """Whether the task needs a context beyond the window."""
    full, window = _full(figures, scratch=True), figures.get("window-1k")
    if full is None or window is None:
        return []
    if not text:
        return [
            f"{task}: accuracy {full.mean:.2%} with attention everywhere, {window.mean:.2%} within "
            "1,024 tokens."
        ]
    gain = 1 - full.mean / window.mean
    verdict = "so it tests routing" if gain >= _NEEDED else "so it cannot test routing"
    return [
        f"{task}: attention everywhere has {100 * gain:.2f} % fewer bits per byte than the same "
        f"model limited to 1,024 tokens ({100 * _NEEDED:.0f} % are needed), {verdict}."
    ]


def routing_findings(results: Sequence[Result]) -> str:
    """A Markdown list: for each task and budget the best router beside its controls.

    The best is that of the best mean among those with the most seeds; what was trained from the
    start is compared with what was too, and a router that visits more than a tenth more blocks than
    all controls is named and left out. A router counts as better than its random control, or than
    the best fixed pattern, when it leads by more than two standard errors; with one seed nothing is
    said of that.

    Args:
      results: of the experiment.
    """
    said = []
    for task in sorted({run.task for run in results}, key=natural_order):
        mine = [run for run in results if run.task == task]
        text = mine[0].bits_per_byte is not None
        figures, used = (
            _by_variant(mine, field) for field in ("bits_per_byte" if text else "accuracy", "usage")
        )
        said += _gate(task, figures, text)
        budgets = {budget for variant in figures if (budget := _budget_of(variant))}
        for budget in sorted(budgets):
            said += _at_budget(task, figures, used, budget, text)
    return "\n".join(f"- {line}" for line in said)


def _by_variant(results: Sequence[Result], field: str) -> dict[str, Summary]:
    found = {
        variant: summary((run for run in results if run.variant == variant), field)
        for variant in dict.fromkeys(run.variant for run in results)
    }
    return {variant: figures for variant, figures in found.items() if figures is not None}


def _at_budget(
    task: str, figures: dict[str, Summary], used: dict[str, Summary], budget: _Budget, text: bool
) -> list[str]:
    def named(of: dict[str, Summary]) -> dict[str, Summary]:
        mine = {name: of[name] for name in of if _budget_of(name) == budget}
        return {router_of(name).partition("+")[0]: figure for name, figure in mine.items()}

    at, blocks = named(figures), named(used)
    sign = -1 if text else 1
    fixed = {n: f for n, f in at.items() if n in _FIXED}
    controls = {_RANDOM: at[_RANDOM]} if _RANDOM in at else {}
    if fixed:
        pattern = max(fixed, key=lambda name: sign * fixed[name].mean)
        controls[pattern] = fixed[pattern]
    most = _MORE * max((blocks[n].mean for n in (*fixed, *controls)), default=math.inf)
    rest = {n: f for n, f in at.items() if n not in (*_FIXED, _RANDOM)}
    routers = {n: f for n, f in rest.items() if blocks[n].mean <= most}
    if not routers:
        return []
    seeds = max(f.seeds for f in routers.values())
    routers = {n: f for n, f in routers.items() if f.seeds == seeds}
    best = max(routers, key=lambda name: sign * routers[name].mean)
    unit = "bits per byte" if text else "accuracy"
    where = f"{task} at {budget.percent} %" + ", from the start" * budget.scratch
    line = [f"{where}: best is {best}, {unit} {routers[best].mean:.4f}"]
    if full := _full(figures, scratch=budget.scratch):
        change = routers[best].mean / full.mean - 1 if full.mean else 0.0
        line[0] += f" ({100 * change:+.2f} % against attention everywhere)"
    leads = {n: lead(routers[best], f, more_is_better=not text) for n, f in controls.items()}
    line += [found.words(name) for name, found in leads.items()]
    if leads and all(found.errors is not None for found in leads.values()):
        won = all((found.errors or 0) > 2 for found in leads.values())
        line.append("better than its controls" if won else "not better than all of its controls")
    if over := [name for name in rest if blocks[name].mean > most]:
        line.append(f"beyond the budget: {', '.join(over)}")
    return ["; ".join(line) + "."]


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
