"""The plots of the experiment 'moas', from its result files."""

from collections.abc import Sequence

import numpy as np
from etils import epath
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from routing_jax.evals.plots import COLORS, MARKERS, dress, new_figure, new_panels, save_figure
from routing_jax.evals.results import Result


def plot_quality(results: Sequence[Result], path: epath.PathLike) -> Figure:
    """Nats a token against key/value bytes read, a panel a task; a variant is a mean of its seeds.

    Bars are standard errors over seeds.

    Args:
      results: of one experiment.
      path: where the plot goes.

    Raises:
      ValueError: no results.
    """
    if not results:
        raise ValueError("results is empty; a plot needs at least one result.")
    tasks = list(dict.fromkeys(run.task for run in results))
    variants = list(dict.fromkeys(run.variant for run in results))
    figure = new_figure(2.0 + 3.0 * len(tasks))
    for axes, task in zip(figure.subplots(len(tasks), 1, squeeze=False).flat, tasks):
        for i, variant in enumerate(variants):
            runs = [run for run in results if (run.task, run.variant) == (task, variant)]
            if not runs:
                continue
            losses = [run.loss for run in runs]
            error = np.std(losses, ddof=1) / len(runs) ** 0.5 if len(runs) > 1 else 0.0
            axes.errorbar(
                np.mean([run.kv_cost for run in runs]),
                np.mean(losses),
                yerr=error,
                color=COLORS[i % len(COLORS)],
                marker=MARKERS[i // len(COLORS) % len(MARKERS)],
                linestyle="none",
                capsize=3,
            )
        dress(axes)
        axes.set_title(task, fontsize=11)
        axes.set(xlabel="key/value bytes read ÷ those of MHA", ylabel="nats a token")
    handles = [
        Line2D(
            [],
            [],
            label=variant,
            color=COLORS[i % len(COLORS)],
            marker=MARKERS[i // len(COLORS) % len(MARKERS)],
            linestyle="none",
        )
        for i, variant in enumerate(variants)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    return save_figure(figure, path)


def plot_layer_use(results: Sequence[Result], path: epath.PathLike) -> Figure:
    """How much each layer uses the dearest scheme over training, a panel a run.

    Args:
      results: with `details` of mixed schemes.
      path: where the plot goes.

    Raises:
      ValueError: no results.
    """
    if not results:
        raise ValueError("results is empty; a plot needs at least one result.")
    figure, panels = new_panels(len(results), 3, 2.2, 1.0, share_axes=True)
    layers = 0
    for axes, run in zip(panels, results):
        rows = (run.details or {})["history"]
        use = np.array([row["usage_per_layer"] for row in rows])
        layers = max(layers, use.shape[1])
        for layer, color in zip(range(use.shape[1]), COLORS):
            axes.plot([row["step"] for row in rows], 100 * use[:, layer], color=color)
        dress(axes)
        axes.set_title(run.variant, fontsize=10)
        axes.set_ylim(-5, 105)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("% of the dearest scheme", fontsize=10)
    handles = [
        Line2D([], [], color=color, label=f"layer {layer}")
        for layer, color in zip(range(layers), COLORS)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=6, frameon=False)
    return save_figure(figure, path)
