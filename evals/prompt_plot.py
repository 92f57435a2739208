"""The plot of the experiment 'flux': what each way of routing loses, and what it saves."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from routing_jax.evals.plots import COLORS, INK, MARKERS, dress, new_figure, save_figure
from routing_jax.evals.prompt_tables import (
    by_variant,
    counted_tasks,
    more_than_dense,
    with_interval,
)
from routing_jax.evals.results import Result
from routing_jax.evals.tables import natural_order, router_of

# How a mark is filled: not, where layers that are not sparse search.
_FILLS = {"": "full", "+composed": "none"}


def _parts(variant: str) -> tuple[str, str]:
    """Who decides which layers are sparse, and whether the others search.

    >>> _parts("static+composed-75")
    ('static', '+composed')
    """
    who, search, _ = router_of(variant).partition("+composed")
    return who, search


def plot_prompts(results: Sequence[Result], path: epath.PathLike) -> Figure | None:
    """Right answers and nats against the share of sparse layers, beside dense attention's.

    A row of panels for each task of which dense attention was measured with right answers and with
    plain text; None, and no file, where there is none. Answers are means over the tasks that dense
    attention does well enough; bars are 95 % intervals, as in the table.

    Args:
      results: of the experiment.
      path: where the plot goes.
    """
    groups = by_variant(results)
    shown = [
        name
        for name in sorted(groups, key=natural_order)
        if "dense" in groups[name]
        and counted_tasks(groups[name]["dense"])
        and "text" in (groups[name]["dense"][0].details or {})["tasks"]
    ]
    if not shown:
        return None
    deciders = list(dict.fromkeys(_parts(v)[0] for name in shown for v in groups[name]))
    figure = new_figure(1.1 + 2.7 * len(shown))
    panels = figure.subplots(len(shown), 2, squeeze=False)
    seen: dict[str, Any] = {}
    for (left, right), name in zip(panels, shown):
        dense = groups[name]["dense"]
        asked = counted_tasks(dense)
        for variant in sorted(groups[name], key=natural_order):
            runs = groups[name][variant]
            who, search = _parts(variant)
            i = deciders.index(who)
            style: dict[str, Any] = {
                "color": COLORS[i % len(COLORS)],
                "marker": MARKERS[i % len(MARKERS)],
                "fillstyle": _FILLS[search],
                "linestyle": "none",
                "capsize": 3,
            }
            sparse = 100 * (1 - np.mean([run.usage for run in runs]))
            points = [100 * more_than_dense(dense, runs, task, "right") for task in asked]
            nats = more_than_dense(dense, runs, "text", "nll")
            for axes, values in ((left, np.hstack(points)), (right, 100 * nats)):
                mean, half = with_interval(values)
                seen[router_of(variant)] = axes.errorbar(sparse, mean, yerr=half, **style)
        for axes, label in ((left, "right answers, points"), (right, "nats of text, ×100")):
            dress(axes)
            axes.axhline(0, color=INK, linewidth=0.8)
            axes.set(xlabel="sparse layers, %", ylabel=f"{label}\nmore than dense")
        left.set_title(name, fontsize=11, loc="left")
    names = sorted(seen, key=lambda name: (deciders.index(_parts(name)[0]), name))
    marks = [seen[name] for name in names]
    figure.legend(marks, names, loc="outside upper center", ncols=3, frameon=False)
    return save_figure(figure, path)
