"""Plots of block routing: quality against cost, by position, and output error against cost."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from routing_jax.evals.plots import (
    COLORS,
    INK,
    MARKERS,
    dress,
    new_figure,
    new_panels,
    save_figure,
)
from routing_jax.evals.results import Result
from routing_jax.evals.tables import against_dense, dense_of, natural_order, router_of

_BUDGETS = (0.05, 0.12, 0.25, 0.5)  # where the axis of costs has its ticks
_PERCENT = "25"  # the budget whose routers are drawn by position
_DENSE = ("full", "base", "distil", "distil-weighed")  # all attend everywhere
_LEARNED = ("gates", "indexer", "pooled", "learned", "tree", "mass", "clusters", "weighed")
_COLORS = (*COLORS, "#8C510A")  # one for each of them
_RANDOM, _FAINT = "#666666", "#AAAAAA"  # of what chooses without looking


def _style(router: str) -> dict[str, Any]:
    """How a router or control is drawn, the same in every plot.

    What looks at its input has a colour of its own, in whichever way it was trained; the others are
    grey.
    """
    name, _, start = router.partition("+")
    if name.endswith("-gates"):
        name, start = name.removesuffix("-gates"), start or "gates"
    if name in _LEARNED:
        i = _LEARNED.index(name)
        look: dict[str, Any] = {"color": _COLORS[i], "marker": MARKERS[i], "zorder": 3}
    else:
        i = sum(map(ord, name))
        color = _RANDOM if name == "random" else _FAINT
        look = {"color": color, "marker": MARKERS[i % len(MARKERS)]}
    lines = {"": "-", "distilled": "--", "scratch": ":", "gates": "-."}
    hollow = {"fillstyle": "none"} if start else {}
    return look | {"linestyle": lines[start], "linewidth": 1.4, "markersize": 4.5} | hollow


def _order(router: str) -> tuple[int, str]:
    """Those that learn first, then random, then what is fixed."""
    name = router.partition("+")[0].removesuffix("-gates")
    if name in _LEARNED:
        return _LEARNED.index(name), router
    return len(_LEARNED) + (not name.startswith("random")), router


def _is_marked(run: Result) -> bool:
    """Whether a run attends, and not everywhere."""
    return run.variant not in _DENSE and run.usage > 0


def plot_budgets(results: Sequence[Result], path: epath.PathLike) -> Figure | None:
    """Quality against cost beside attention everywhere: a panel a task, a line a router.

    A mark is a budget: the mean over its seeds, their standard deviation as a bar; of bits per byte
    what is more than attention everywhere, trained alike of the same seed, has. The dashed line is
    attention everywhere. Controls without any attention cost next to nothing and are left out.
    A task without a mark has no panel; None, and no file, where none has attention everywhere and
    something beside it.

    Args:
      results: of the experiment.
      path: where the plot goes.
    """
    marked = {r.task for r in results if _is_marked(r)}
    dense_tasks = {r.task for r in results if r.variant in ("full", "base")}
    tasks = sorted(marked & dense_tasks, key=natural_order)
    if not tasks:
        return None
    figure, panels = new_panels(len(tasks), 2, 3.0, 1.2)
    handles: dict[str, Any] = {}
    for axes, task in zip(panels, tasks):
        runs: dict[str, list[Result]] = {}
        for run in results:
            if run.task == task:
                runs.setdefault(run.variant, []).append(run)
        text = all(run.bits_per_byte is not None for of in runs.values() for run in of)
        field = "bits_per_byte" if text else "accuracy"
        routers: dict[str, list[tuple]] = {
            router_of(v): [] for v, of in runs.items() if _is_marked(of[0])
        }
        dense = runs.get("full") or runs["base"]
        for variant, of in runs.items():
            if router_of(variant) in routers:
                if text:
                    above = against_dense(of, runs.get(dense_of(variant), []), field)
                    of = [run for run in of if run.seed in above]
                    quality = [100 * above[run.seed] for run in of]
                else:
                    quality = [getattr(run, field) for run in of]
                if not of:
                    continue
                cost = np.mean([run.cost for run in of]) / dense[0].cost
                deviation = np.std(quality, ddof=1) if len(quality) > 1 else 0.0
                routers[router_of(variant)].append((cost, np.mean(quality), deviation))
        for router in sorted(filter(routers.get, routers), key=_order):
            x, y, spread = zip(*sorted(routers[router]))
            drawn = axes.errorbar(x, y, yerr=spread, **_style(router))
            handles.setdefault(router, drawn)
        level = 0.0 if text else np.mean([getattr(run, field) for run in dense])
        axes.axhline(level, color=INK, linewidth=0.9, linestyle=(0, (6, 3)), label="_dense")
        dress(axes)
        axes.set_title(task, fontsize=11)
        what = "bits per byte above dense, %" if text else field
        axes.set(xlabel="cost ÷ attention everywhere", ylabel=what)
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(_BUDGETS, [f"{100 * budget:.0f} %" for budget in _BUDGETS])
        if not text:
            axes.set_ylim(-0.05, 1.05)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    names = sorted(handles, key=_order)
    shown = [handles[name] for name in names]
    figure.legend(shown, names, loc="outside upper center", ncols=4, frameon=False)
    return save_figure(figure, path)


def plot_positions(results: Sequence[Result], path: epath.PathLike) -> Figure | None:
    """Bits per byte above attention everywhere, in percent, by position; a line a variant.

    Drawn for what attends: controls, and routers at a quarter of the blocks. Means over the seeds
    that they share with the dense model trained alike; None, and no file, where there are none.

    Args:
      results: of one task.
      path: where the plot goes.
    """
    parts: dict[str, dict[int, list[float]]] = {}
    edges: list[int] = []
    for run in results:
        details = run.details or {}
        if "bits_per_byte" in details and run.usage > 0:  # without attention, too far off
            edges = list(details["edges"])
            parts.setdefault(run.variant, {})[run.seed] = details["bits_per_byte"]
    shown = {v for v in parts if router_of(v) == v or v.endswith(f"-{_PERCENT}")} - {*_DENSE}
    lines = {}
    for variant in sorted(shown, key=lambda variant: _order(router_of(variant))):
        base = parts.get(dense_of(variant), {})
        if seeds := sorted(base.keys() & parts[variant].keys()):
            mine, theirs = (
                np.mean([of[s] for s in seeds], axis=0) for of in (parts[variant], base)
            )
            lines[variant] = 100 * (mine / theirs - 1)
    if not lines:
        return None
    figure = new_figure(max(4.2, 0.5 + 0.21 * len(lines)))  # room for the legend
    axes = figure.add_subplot()
    for variant, above in lines.items():
        axes.plot(edges, above, label=variant, **_style(router_of(variant)))
    axes.axhline(0, color=INK, linewidth=0.8)
    dress(axes)
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    axes.set_xticks(edges, [f"{edge:,}" for edge in edges])
    axes.set(xlabel="up to position", ylabel="bits per byte above dense, %")
    figure.legend(loc="outside right upper", frameon=False)
    return save_figure(figure, path)


def plot_errors(results: Sequence[Result], path: epath.PathLike) -> Figure | None:
    """Output error against cost, a panel a length, a line a router; None, and no file, without any.

    Args:
      results: those with `attention_error` in their details count.
      path: where the plot goes.
    """
    rows = [row for run in results for row in (run.details or {}).get("attention_error", [])]
    if not rows:
        return None
    lengths = sorted({row["length"] for row in rows})
    routers = list(dict.fromkeys(router_of(row["router"]) for row in rows))
    figure = new_figure(3.4)
    panels = figure.subplots(1, len(lengths), squeeze=False, sharey=True)[0]
    for axes, length in zip(panels, lengths):
        for name in routers:
            line = sorted(
                (row["cost"], row["error"])
                for row in rows
                if row["length"] == length and router_of(row["router"]) == name
            )
            axes.plot(*zip(*line), label=name, **_style(name))
        dress(axes)
        axes.set(title=f"{length:,} tokens", xlabel="cost")
    panels[0].set(ylabel="output error")
    panels[0].set_ylim(bottom=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    return save_figure(figure, path)
