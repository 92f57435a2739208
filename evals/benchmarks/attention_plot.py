"""The plot of the attention benchmark."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from routing_jax.evals.benchmarks.attention_report import Row
from routing_jax.evals.plots import COLORS, FAINT, INK, MARKERS

_NAMES = {
    "block_sparse": "routing_jax",
    "dense": "dense",
    "flex": "FlexAttention",
    "fused": "routing_jax, fused",
}


def plot(rows: Sequence[Row], path: Path) -> Figure | None:
    """TFLOP/s by blocks listed, a panel for forward and for both passes, a line a peer.

    Drawn at the first length and head dim that was measured; None, and no file, without a row.
    Dense attention, which lists nothing, is a dashed line.
    """
    parts = ("forward", "forward_backward")
    plain = [r for r in rows if r["part"] in parts and r["variant"] is None and r["milliseconds"]]
    if not plain:
        return None
    sizes = [plain[0][name] for name in ("length", "head_dim")]
    plain = [row for row in plain if [row["length"], row["head_dim"]] == sizes]
    figure = Figure(figsize=(8.0, 3.6), dpi=200, layout="constrained", facecolor="white")
    shown = [part for part in parts if any(row["part"] == part for row in plain)]
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axes, part in zip(panels, shown):
        mine = [row for row in plain if row["part"] == part]
        counts = sorted({row["blocks"] or row["length"] // row["block"] for row in mine})
        for i, peer in enumerate(_NAMES):
            line = sorted(
                (row["blocks"] or row["length"] // row["block"], row["rate"])
                for row in mine
                if row["peer"] == peer
            )
            if line and peer == "dense":
                axes.axhline(line[0][1], color=INK, linestyle="--", label=_NAMES[peer])
            elif line:
                style = {"color": COLORS[i], "marker": MARKERS[i], "linewidth": 1.6}
                axes.plot(*zip(*line), **style, label=_NAMES[peer])
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
        axes.set_xticks(counts, map(str, counts))
        axes.set_ylim(0, 1.1 * max(row["rate"] for row in plain))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=FAINT, linewidth=0.6)
        axes.set(xlabel="key blocks listed a query tile", title=part.replace("_", " and "))
    panels[0].set_ylabel("TFLOP/s on listed blocks")
    panels[-1].legend(frameon=False, loc="lower right")
    figure.suptitle(f"{sizes[0]} tokens, head dim {sizes[1]}", fontsize=11)
    figure.savefig(path)
    return figure
