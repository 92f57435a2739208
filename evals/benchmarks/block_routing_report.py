"""What the rows of the block-routing benchmark say: a table a part, and speed-ups by length."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from routing_jax.evals.benchmarks.running import missing_word
from routing_jax.evals.plots import COLORS, FAINT, INK, MARKERS
from routing_jax.evals.provenance import dated_versions, named_device

Row = dict[str, Any]

_TITLES = {
    ("attention", "forward"): "**Router, table and attention**, forward",
    ("attention", "training"): "**Router, table and attention**, forward and backward",
    ("layer", "forward"): "**The whole layer**, forward",
    ("layer", "training"): "**The whole layer**, forward and backward",
    ("model", "forward"): "**The whole model**, prefill",
    ("model", "training"): "**The whole model**, a training step",
}


def describe(row: Row) -> str:
    """A row in one line, for the terminal.

    >>> describe({"part": "layer", "pass": "forward", "length": 8192, "router": "learned",
    ...           "budget": "12 %", "cost": 0.125, "router_cost": 0.005, "milliseconds": 2.0,
    ...           "spread": 0.1, "dense_milliseconds": 8.0, "speedup": 4.0})
    'layer forward 8192 learned 12 %: 2 ms ± 0.1, dense 8 ms, 4.00×, cost 0.125, router 0.5 %'
    """
    said = []
    if row["milliseconds"] is not None:
        said.append(f"{row['milliseconds']:.4g} ms ± {row['spread']:.2g}")
    if row["dense_milliseconds"] is not None:
        said.append(f"dense {row['dense_milliseconds']:.4g} ms")
    if row["speedup"] is not None:
        said.append(f"{row['speedup']:.2f}×")
    said += [f"cost {row['cost']:.3g}", f"router {100 * row['router_cost']:.2g} %"]
    said += [row["error"]] if "error" in row else []
    name = f"{row['part']} {row['pass']} {row['length']} {row['router']} {row['budget']}"
    return f"{name}: {', '.join(said)}"


def _column(row: Mapping[str, Any]) -> str:
    return f"{row['router']}, {row['budget']}"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["milliseconds"] is None:
        return missing_word(row)
    if row["part"] != "router":
        return f"{row['milliseconds']:.3g}" + (
            f" ({row['speedup']:.2f}×)" if row["speedup"] else ""
        )
    shares = [f"{100 * row['router_cost']:.2g} % counted"]
    if row["dense_milliseconds"]:
        shares.insert(0, f"{100 * row['milliseconds'] / row['dense_milliseconds']:.2g} % of dense")
    return f"{row['milliseconds']:.3g} ({', '.join(shares)})"


def table(rows: Sequence[Row]) -> str:
    """Markdown: a table a part and pass, a line a length, a column a router and budget.

    A part of which nothing was measured is left out.

    >>> row = {"part": "layer", "pass": "forward", "length": 8192, "router": "learned",
    ...        "budget": "12 %", "milliseconds": 2.0, "dense_milliseconds": 8.0, "speedup": 4.0}
    >>> print(table([row]))
    **The whole layer**, forward, milliseconds (speed-up over dense)
    <BLANKLINE>
    | length | dense | learned, 12 % |
    | ---: | ---: | ---: |
    | 8192 | 8 | 2 (4.00×) |
    """
    blocks = []
    measured = [row for row in rows if row["milliseconds"] is not None]
    for part, passing in dict.fromkeys((row["part"], row["pass"]) for row in measured):
        mine = [row for row in rows if (row["part"], row["pass"]) == (part, passing)]
        found = {(row["length"], _column(row)): row for row in mine}
        columns = list(dict.fromkeys(map(_column, mine)))
        title = f"{_TITLES.get((part, passing))}, milliseconds (speed-up over dense)"
        if part == "router":
            title = (
                "**The router alone**, milliseconds (of dense attention's forward pass; "
                "multiply-adds of dense attention's)"
            )
        lines = [
            title,
            "",
            f"| length | dense | {' | '.join(columns)} |",
            "| ---: |" + " ---: |" * (1 + len(columns)),
        ]
        for length in sorted({row["length"] for row in mine}):
            line = [found.get((length, column)) for column in columns]
            dense = next((r["dense_milliseconds"] for r in line if r), None)
            shown = "none" if dense is None else f"{dense:.3g}"
            lines.append(f"| {length} | {shown} | {' | '.join(map(_cell, line))} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def caption(result: Mapping[str, Any]) -> str:
    """What a block-routing benchmark ran on, from its result file.

    Args:
      result: of `block_routing.run`.
    """
    config = result["config"]
    router, model = config["router"], config["model"]
    return (
        f"{named_device(result)}, {config['dtype']}, batch 1; layer: {config['num_heads']} query "
        f"and {config['num_kv_heads']} key/value heads of {config['head_dim']}, width "
        f"{config['width']}; model: {model['layers']}, {model['num_heads']} heads of "
        f"{model['head_dim']}, width {model['width']}; tiles of {router['block_q']} queries, "
        f"blocks of {router['block_kv']} keys; dense attention by {result['attention']}. Router "
        f"and table are in every time. Median of {config['repeats']}, {dated_versions(result)}"
    )


def plot(rows: Sequence[Row], path: Path) -> Figure | None:
    """Speed-up over dense by length: a panel a pass, a line a part and budget.

    None, and no file, where no speed-up was measured.
    """
    shown = [row for row in rows if row["part"] != "router" and row["speedup"]]
    if not shown:
        return None
    passes = list(dict.fromkeys(row["pass"] for row in shown))
    figure = Figure(figsize=(8.0, 3.8), dpi=200, layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(passes), squeeze=False, sharey=True)[0]
    parts = list(dict.fromkeys(row["part"] for row in shown))
    budgets = list(dict.fromkeys(row["budget"] for row in shown))
    for axes, passing in zip(panels, passes):
        for i, part in enumerate(parts):
            for j, budget in enumerate(budgets):
                wanted = passing, part, budget
                line = sorted(
                    (row["length"], row["speedup"])
                    for row in shown
                    if (row["pass"], row["part"], row["budget"]) == wanted
                )
                if line:
                    style = {"color": COLORS[i], "linestyle": ("-", "--", ":")[j % 3]}
                    label = f"{part}, {budget}"
                    axes.plot(*zip(*line), marker=MARKERS[i], linewidth=1.6, label=label, **style)
        axes.axhline(1, color=INK, linewidth=0.8)
        axes.set_xscale("log", base=2)
        lengths = sorted({row["length"] for row in shown})
        axes.minorticks_off()
        axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=FAINT, linewidth=0.6)
        axes.set(xlabel="tokens", title=passing)
    panels[0].set_ylabel("times as fast as dense")
    panels[0].set_ylim(bottom=0)
    panels[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path)
    return figure
