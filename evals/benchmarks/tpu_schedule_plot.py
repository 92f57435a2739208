"""The plot of `bench tpu-schedule`."""

from collections.abc import Sequence
from os import PathLike

from matplotlib.figure import Figure

from routing_jax.evals.benchmarks.tpu_schedule_report import Row
from routing_jax.evals.plots import COLORS, FAINT, INK, MARKERS


def plot(rows: Sequence[Row], path: PathLike) -> Figure | None:
    """Ours ÷ splash on a dense table, a bar a chip; and work by share of blocks listed.

    Drawn for the first kernel and head dim; None, and no file, without schedules of lists.
    """
    ours = [row for row in rows if row["peer"] == "block_sparse" and row.get("bundles")]
    if not any(row["blocks"] for row in ours):
        return None
    first = ours[0]["program"], ours[0]["head_dim"]
    ours = [row for row in ours if (row["program"], row["head_dim"]) == first]
    figure = Figure(figsize=(8.0, 3.6), dpi=200, layout="constrained", facecolor="white")
    beside, listed = figure.subplots(1, 2)
    chips = list(dict.fromkeys(row["chip"] for row in ours))
    for i, chip in enumerate(chips):
        mine = [row for row in ours if row["chip"] == chip]
        for row in mine:
            if row["of_splash"]:
                beside.bar(chip, row["of_splash"], color=COLORS[i], width=0.6)
        longest = max(row["length"] for row in mine)
        line = sorted(
            (row["density"], row["per_block"] * row["density"])
            for row in mine
            if row["length"] == longest and row["per_block"]
        )
        style = {"color": COLORS[i], "marker": MARKERS[i], "linewidth": 1.6}
        listed.plot(*zip(*line), **style, label=chip)
    beside.axhline(1.0, color=INK, linestyle="--")
    beside.set(title="dense causal table", ylabel="bundles ÷ splash's at its best tiles")
    ends = [min(row["density"] for row in ours), 1.0]
    listed.plot(ends, ends, color=INK, linestyle="--", label="proportional")
    listed.set(xscale="log", yscale="log", title="listed blocks")
    listed.set(xlabel="share of visible blocks listed", ylabel="bundles ÷ those of all blocks")
    listed.legend(frameon=False)
    for axes in (beside, listed):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
    figure.suptitle(f"the compiler's schedule, head dim {ours[0]['head_dim']}", fontsize=11)
    figure.savefig(path, metadata={"Software": None})
    return figure
