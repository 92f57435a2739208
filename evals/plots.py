"""Plots of runs and experiments for a README, in colours that the colour-blind tell apart.

Each function draws a matplotlib Figure without pyplot, writes it (.png or .svg, by the path's
suffix; gs:// works) and returns it.
"""

import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from routing_jax.evals.results import Result
from routing_jax.evals.tables import natural_order

# Okabe and Ito's palette, without its yellow, which fades on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX*"  # their number and that of the colours have no common divisor
INK = "#333333"
FAINT = "#DDDDDD"
WIDTH = 8.0  # inches: 10-point letters come out at reading size across a README
MAX_NAMED = 48  # positions of a heat map up to which every token is named on the axis
MAX_COLUMNS = 256  # of a heat map: at README width each is still three pixels wide

_ACCURACY = (-0.05, 1.05)
# How the least possible usage is drawn.
_LEAST: dict[str, Any] = {"color": INK, "linewidth": 0.9, "linestyle": (0, (6, 3))}
_SEED: dict[str, Any] = {"markersize": 4, "alpha": 0.6, "clip_on": False}
_MEAN: dict[str, Any] = {"markersize": 10, "fillstyle": "none", "clip_on": False}


def new_figure(height: float) -> Figure:
    """An empty figure as wide as a README, of this height in inches.

    >>> new_figure(2.0).get_size_inches().tolist()
    [8.0, 2.0]
    """
    return Figure(figsize=(WIDTH, height), dpi=200, layout="constrained", facecolor="white")


def new_panels(
    count: int, across: int, height: float, above: float, *, share_axes: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, `across` of them in a row.

    Args:
      count: panels.
      across: the most in a row.
      height: inches of a row.
      above: inches for what stands above all.
      share_axes: whether all have the same range.

    >>> figure, panels = new_panels(3, 2, 2.0, 1.0)
    >>> len(panels), figure.get_size_inches().tolist()
    (3, [8.0, 5.0])
    """
    across = min(count, across)
    down = -(-count // across)
    figure = new_figure(above + height * down)
    axes_of = figure.subplots(down, across, squeeze=False, sharex=share_axes, sharey=share_axes)
    grid = list(axes_of.flat)
    for axes in grid[count:]:
        axes.remove()
    return figure, grid[:count]


def dress(axes: Axes) -> None:
    """The house's look: no box, a faint grid, ink rather than black."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, which="both")
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.title.set_color(INK)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def save_figure(figure: Figure, path: epath.PathLike) -> Figure:
    """Writes the figure; the same figure gives the same bytes."""
    path = epath.Path(path)
    kinds = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}
    if path.suffix not in kinds:
        raise ValueError(f"path is {path}; it must end with {' or '.join(kinds)}.")
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "routing_jax"}):
        figure.savefig(buffer, format=path.suffix[1:], metadata=kinds[path.suffix])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return figure


def _log_axis(
    axes: Axes,
    which: Literal["x", "y"],
    low: float,
    high: float,
    show: Callable[[float], str],
    zero: float | None = None,
) -> None:
    """A logarithmic axis from low to high with round ticks; `zero` is where a 0 is drawn."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 3, 5, 7), (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)):
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        ticks = [tick for tick in ticks if (zero or 0) * 2.5 < tick and low <= tick <= high]
        if len(ticks) > 2:
            break
    if steps == (1,) and len(ticks) > 5:  # names of neighbouring decades would touch
        ticks = ticks[::-1][::2][::-1]
    labels = [show(tick) for tick in ticks]
    if zero is not None:
        ticks, labels = [zero, *ticks], ["0", *labels]
    axis.set_minor_locator(NullLocator())
    axis.set_ticks(ticks, labels)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.10g} %"


def _lambda_start(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The last step at λ = 0 before it rises; None where it never does, or starts above 0."""
    for before, after in itertools.pairwise(rows):
        if before["lambda"] == 0 < after["lambda"]:
            return before["step"]
    return None


def plot_history(
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    path: epath.PathLike,
    *,
    least_usage: float | None = None,
) -> Figure:
    """Accuracy, usage and λ over the steps, one colour a run; a dotted line where λ starts to rise.

    Usage is logarithmic; where it is 0 there is a place for that below.

    Args:
      histories: label → rows as in Result.history.
      path: where the plot goes.
      least_usage: the smallest usage that solves the task, drawn for reference.

    Raises:
      ValueError: no run, a run without rows, or a path of another format.

    >>> import tempfile
    >>> row = {"step": 0, "accuracy": 0.1, "usage": 1.0, "lambda": 0.0, "length": 8}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     figure = plot_history({"routed": [row, row | {"step": 9}]}, folder + "/history.png")
    >>> [axes.get_ylabel() for axes in figure.axes]
    ['accuracy', 'hard usage', 'λ']
    """
    if empty := [label for label, rows in histories.items() if not rows]:
        raise ValueError(f"histories[{empty[0]!r}] is empty; it must hold at least one row.")
    if not histories:
        raise ValueError("histories is empty; it must hold at least one run.")
    figure = new_figure(5.6 + 0.05 * len(histories))
    panels = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 2])
    accuracy, usage, penalty = panels
    used = [row["usage"] for rows in histories.values() for row in rows]
    low = min([u for u in [*used, least_usage] if u] or [0.1]) / 1.6
    zero = low / 1.6 if 0 in used else None
    handles, starts, grows = [], False, False
    for i, (label, rows) in enumerate(histories.items()):
        style: dict[str, Any] = {
            "color": COLORS[i % len(COLORS)],
            "linestyle": ("-", "--", ":")[i // len(COLORS) % 3],
            "linewidth": 1.6,
        }
        steps = [row["step"] for row in rows]
        for axes, key in zip(panels, ("accuracy", "usage", "lambda")):
            values = [row[key] for row in rows]
            axes.plot(steps, [v or zero for v in values] if axes is usage else values, **style)
        handles.append(Line2D([], [], label=label, **style))
        longer = [b for a, b in itertools.pairwise(rows) if b["length"] > a["length"]]
        grows |= bool(longer)
        accuracy.plot(
            [row["step"] for row in longer],
            [row["accuracy"] for row in longer],
            **(style | {"linestyle": "none", "marker": "v", "markersize": 5}),
        )
        start = _lambda_start(rows)
        starts |= start is not None
        if start is not None:
            for axes in panels:
                axes.axvline(start, color=style["color"], linestyle=":", linewidth=1.2)
    if least_usage is not None:
        usage.axhline(least_usage, **_LEAST)
        handles.append(Line2D([], [], label="least possible", **_LEAST))
    if starts:
        handles.append(Line2D([], [], color=INK, linestyle=":", label="λ starts to rise"))
    if grows:
        handles.append(
            Line2D([], [], color=INK, linestyle="none", marker="v", label="sequences grow")
        )
    for axes in panels:
        dress(axes)
    accuracy.set(ylabel="accuracy", ylim=_ACCURACY)
    accuracy.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _percent(value)))
    usage.set_ylabel("hard usage")
    _log_axis(usage, "y", zero / 1.3 if zero else low, 1.4, _percent, zero)
    highest = max(row["lambda"] for rows in histories.values() for row in rows)
    penalty.set(xlabel="step", ylabel="λ", ylim=(-0.05 * (highest or 1), 1.15 * (highest or 1)))
    penalty.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    figure.align_ylabels(panels)
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    return save_figure(figure, path)


def plot_heatmap(
    heatmap: Sequence[Sequence[int]],
    tokens: Sequence[str] | None,
    path: epath.PathLike,
    title: str,
) -> Figure:
    """Which token attended in which layer: a row a layer, positions from left to right.

    Above MAX_COLUMNS positions a column shows the maximum over several, so that a single token
    stays visible; the axis says over how many. Where few tokens attend, they are named.

    Args:
      heatmap: [L][T] of 0 or 1.
      tokens: [T] of strings, or None.
      path: where the plot goes.
      title: above the plot.

    Raises:
      ValueError: not L equally long rows, or another number of tokens than positions.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     figure = plot_heatmap([[0] * 512], None, folder + "/map.png", "no token attends")
    >>> figure.axes[0].get_xlabel()
    'position (each column: the maximum over 2 positions)'
    """
    lengths = {len(row) for row in heatmap}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"heatmap has rows of {sorted(lengths)}; all must be equally long, above 0."
        )
    attended = np.asarray(heatmap, bool)
    num_layers, length = attended.shape
    if tokens is not None and len(tokens) != length:
        raise ValueError(f"tokens has {len(tokens)} entries; heatmap has {length} positions.")
    stride = -(-length // MAX_COLUMNS)
    columns = -(-length // stride)
    padded = np.pad(attended, ((0, 0), (0, columns * stride - length)))
    cells = padded.reshape(num_layers, columns, stride).max(axis=-1)

    figure = new_figure(1.6 + 0.42 * num_layers)
    axes = figure.add_subplot()
    axes.imshow(
        cells,
        cmap=ListedColormap(["#EEF1F4", COLORS[1]]),
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, columns * stride - 0.5, num_layers - 0.5, -0.5),
    )
    axes.set_xlim(-0.5, length - 0.5)
    for layer in range(1, num_layers):
        axes.axhline(layer - 0.5, color="white", linewidth=4)
    step = f" (each column: the maximum over {stride} positions)" if stride > 1 else ""
    axes.set(xlabel="position" + step, ylabel="layer")
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_yticks(range(num_layers))
    shares = axes.secondary_yaxis("right")
    counts = attended.sum(axis=1)
    shares.set_yticks(range(num_layers), [f"{count:,} of {length:,}" for count in counts])
    shares.set_ylabel("tokens that attend", color=INK)
    dress(axes)
    axes.grid(False)
    for each in (axes, shares):
        each.spines[:].set_visible(False)
        each.tick_params(length=0, axis="y", colors=INK)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if tokens is not None and length <= MAX_NAMED:
        axes.set_xticks(range(length), [_readable(token) for token in tokens], rotation=90)
        axes.set_xlabel("token")
        for label in axes.get_xticklabels():
            label.set_parse_math(False)
    elif tokens is not None:
        for layer in range(num_layers):
            _name_tokens(axes, layer, np.flatnonzero(attended[layer]), tokens, stride)
    return save_figure(figure, path)


def _readable(token: str) -> str:
    """A token in letters that every font has, spaces and control characters visible."""
    return ascii(token)[1:-1].replace(" ", "␣") or "''"


def _name_tokens(
    axes: Axes, layer: int, positions: np.ndarray, tokens: Sequence[str], stride: int
) -> None:
    """Names attending tokens beside their columns, where there is room and none shares it."""
    length = len(tokens)
    letter, gap = 0.012 * length, 0.004 * length  # of the axis: a letter's width, column to text
    columns = positions // stride
    taken = [(column * stride - 0.5, (column + 1) * stride - 0.5) for column in columns]
    for place, column in zip(positions, columns):
        if np.sum(columns == column) > 1:
            continue
        text = _readable(tokens[place])
        width = letter * (len(text) + 2)
        left, right = column * stride - 0.5 - gap, (column + 1) * stride - 0.5 + gap
        sides = {
            "left": (right, right + width, f"◂ {text}"),
            "right": (left - width, left, f"{text} ▸"),
        }
        for align, (start, stop, named) in sides.items():
            if start >= 0 and stop < length and all(stop < a or b < start for a, b in taken):
                taken.append((start, stop))
                edge = start if align == "left" else stop
                label = axes.text(edge, layer, named, ha=align, va="center", fontsize=9, color=INK)
                label.set_parse_math(False)
                break


def plot_tradeoff(results: Sequence[Result], path: epath.PathLike) -> Figure:
    """Quality against hard usage, a panel a task; small marks are seeds, large ones their mean.

    Quality is bits per byte for tasks whose results have it, accuracy for all others. Usage is
    logarithmic; a usage of 0 stands at the left edge, behind a line.

    Args:
      results: of an experiment.
      path: where the plot goes.

    Raises:
      ValueError: no results.
    """
    if not results:
        raise ValueError("results is empty; a plot needs at least one result.")
    tasks = sorted({run.task for run in results}, key=natural_order)
    variants = list(dict.fromkeys(run.variant for run in results))
    marks: dict[str, dict[str, Any]] = {
        variant: {
            "color": COLORS[i % len(COLORS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": "none",
        }
        for i, variant in enumerate(variants)
    }
    used = [run.usage for run in results if run.usage > 0]
    used += [run.least_usage for run in results if run.least_usage]
    low = min(used, default=0.1) / 2
    zero = low / 2.5

    figure, panels = new_panels(len(tasks), 3, 2.5, 1.0)
    for axes, task in zip(panels, tasks):
        in_task = [run for run in results if run.task == task]
        in_bits = all(run.bits_per_byte is not None for run in in_task)
        for variant, mark in marks.items():
            runs = [run for run in in_task if run.variant == variant]
            if not runs:
                continue
            x = [run.usage for run in runs]
            y = [getattr(run, "bits_per_byte" if in_bits else "accuracy") for run in runs]
            axes.plot([u or zero for u in x], y, **mark, **_SEED, label=variant)
            axes.plot([np.mean(x) or zero], [np.mean(y)], **mark, **_MEAN)
        dress(axes)
        axes.set_title(task, fontsize=11)
        axes.set(xlabel="hard usage, %", ylabel="bits per byte" if in_bits else "accuracy")
        _log_axis(axes, "x", zero / 1.8, 2.2, lambda share: f"{100 * share:.10g}", zero)
        axes.axvline(low, color=INK, linewidth=0.8)
        if not in_bits:
            axes.set_ylim(_ACCURACY)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _percent(value)))
        for floor in {run.least_usage for run in in_task if run.least_usage}:
            axes.axvline(floor, **_LEAST)
    handles = [Line2D([], [], label=name, markersize=6, **mark) for name, mark in marks.items()]
    plain: dict[str, Any] = {"color": INK, "marker": "o", "linestyle": "none"}
    handles.append(Line2D([], [], label="one seed", **plain, **_SEED))
    handles.append(Line2D([], [], label="mean of seeds", **plain, **_MEAN))
    if any(run.least_usage for run in results):
        handles.append(Line2D([], [], label="least possible", **_LEAST))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    return save_figure(figure, path)


def plot_speed(rows: Sequence[Mapping[str, Any]], path: epath.PathLike) -> Figure:
    """Milliseconds against usage, both logarithmic, a line a length; dense as dashed reference.

    Args:
      rows: each with length (tokens), usage, implementation, milliseconds, dense_milliseconds.
      path: where the plot goes.

    Raises:
      ValueError: no rows, or a usage or time that is not above 0.

    >>> import tempfile
    >>> row = {"length": 4096, "usage": 0.01, "implementation": "xla"}
    >>> row |= {"milliseconds": 1.0, "dense_milliseconds": 9.0}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     figure = plot_speed([row], folder + "/speed.png")
    >>> figure.axes[0].get_ylabel()
    'milliseconds'
    """
    if not rows:
        raise ValueError("rows is empty; a plot needs at least one row.")
    for i, row in enumerate(rows):
        for key in ("usage", "milliseconds", "dense_milliseconds"):
            if row[key] <= 0:
                raise ValueError(f"rows[{i}][{key!r}] is {row[key]}; it must be above 0.")
    lengths = sorted({row["length"] for row in rows})
    implementations = list(dict.fromkeys(row["implementation"] for row in rows))
    # Ordered colours for an ordered quantity; viridis ends before it fades on white.
    colors = dict(zip(lengths, mpl.colormaps["viridis"](np.linspace(0.0, 0.8, len(lengths)))))
    markers = dict(zip(implementations, MARKERS))
    figure = new_figure(4.4)
    axes = figure.add_subplot()
    for length in lengths:
        for name in implementations:
            line = sorted(
                (row for row in rows if (row["length"], row["implementation"]) == (length, name)),
                key=lambda row: row["usage"],
            )
            usage = [row["usage"] for row in line]
            style = {"color": colors[length], "linewidth": 1.6}
            times = [row["milliseconds"] for row in line]
            axes.plot(usage, times, marker=markers[name], markersize=5, **style)
            dense = [row["dense_milliseconds"] for row in line]
            axes.plot(usage, dense, **(style | {"linestyle": "--", "linewidth": 1.2}))
    dress(axes)
    used = [row["usage"] for row in rows]
    times = [row[key] for row in rows for key in ("milliseconds", "dense_milliseconds")]
    axes.set(xlabel="usage", ylabel="milliseconds")
    _log_axis(axes, "x", min(used) / 1.3, max(used) * 1.3, _percent)
    _log_axis(axes, "y", min(times) / 1.5, max(times) * 1.5, lambda value: f"{value:,.10g}")
    handles = [
        Line2D([], [], color=colors[length], linewidth=1.6, label=f"{length:,} tokens")
        for length in reversed(lengths)
    ]
    handles += [
        Line2D([], [], color=INK, linewidth=1.6, marker=markers[name], markersize=5, label=name)
        for name in implementations
    ]
    handles.append(Line2D([], [], color=INK, linewidth=1.2, linestyle="--", label="dense"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return save_figure(figure, path)
