"""Plots of block routing: bits per byte by position, and output error against cost."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from routing_jax.evals.plots import COLORS, INK, MARKERS, dress, new_figure, save_figure
from routing_jax.evals.results import Result
from routing_jax.evals.tables import dense_of, router_of

_PERCENT = "25"  # the budget whose routers are drawn by position


def _style(i: int) -> dict[str, Any]:
    """Colour and mark of the i-th line."""
    color, mark = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
    return {"color": color, "marker": mark} | {"linewidth": 1.4, "markersize": 4}


def plot_positions(results: Sequence[Result], path: epath.PathLike) -> Figure | None:
    """Bits per byte above attention everywhere, in percent, by position; a line a variant.

    Drawn for controls and for routers at a quarter of the blocks, means over the seeds that they
    share with the dense model trained alike; None, and no file, where there are none.

    Args:
      results: of one task.
      path: where the plot goes.
    """
    parts: dict[str, dict[int, list[float]]] = {}
    edges: list[int] = []
    for run in results:
        details = run.details or {}
        if "bits_per_byte" in details:
            edges = list(details["edges"])
            parts.setdefault(run.variant, {})[run.seed] = details["bits_per_byte"]
    dense = ("full", "base", "distil")  # all attend everywhere
    shown = [v for v in parts if router_of(v) == v or v.endswith(f"-{_PERCENT}")]
    lines = {}
    for variant in (v for v in shown if v not in dense):
        base = parts.get(dense_of(variant), {})
        if seeds := sorted(base.keys() & parts[variant].keys()):
            mine, theirs = (
                np.mean([of[s] for s in seeds], axis=0) for of in (parts[variant], base)
            )
            lines[variant] = 100 * (mine / theirs - 1)
    if not lines:
        return None
    figure = new_figure(4.2)
    axes = figure.add_subplot()
    for i, (variant, above) in enumerate(lines.items()):
        axes.plot(edges, above, label=variant, **_style(i))
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
        for i, name in enumerate(routers):
            line = sorted(
                (row["cost"], row["error"])
                for row in rows
                if row["length"] == length and router_of(row["router"]) == name
            )
            axes.plot(*zip(*line), label=name, **_style(i))
        dress(axes)
        axes.set(title=f"{length:,} tokens", xlabel="cost")
    panels[0].set(ylabel="output error")
    panels[0].set_ylim(bottom=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    return save_figure(figure, path)
