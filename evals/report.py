"""From committed results to what people read: plots beside them, and the blocks of a README."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from routing_jax.evals.benchmarks import (
    attention_plot,
    attention_report,
    block_routing_report,
    serve_path_report,
    tpu_schedule_plot,
    tpu_schedule_report,
)
from routing_jax.evals.benchmarks.mixing import table as mixing_table
from routing_jax.evals.block_bases import made_again, on_one_base, other_bases
from routing_jax.evals.block_findings import error_table, routing_findings
from routing_jax.evals.block_plots import plot_budgets, plot_errors, plot_positions
from routing_jax.evals.merged import Group, merged
from routing_jax.evals.plots import plot_heatmap, plot_history, plot_speed, plot_tradeoff
from routing_jax.evals.prompt_plot import plot_prompts
from routing_jax.evals.prompt_tables import flux_table
from routing_jax.evals.provenance import dated_versions, named_device
from routing_jax.evals.readme import update_blocks
from routing_jax.evals.results import Result, load_results, read_result
from routing_jax.evals.scheme_plots import plot_layer_use, plot_quality
from routing_jax.evals.scheme_tables import moas_table, times_caption, times_table
from routing_jax.evals.tables import block_routing_table, routed_attention_table

ROUTED_ATTENTION = "routed-attention"
MOAS = "moas"
MOAS_TIMES = "moas-times"
BLOCK_ROUTING = "block-routing"
FLUX = "flux"
MIXING = "mixing"
ATTENTION = "attention"
BLOCK_ROUTING_SPEED = "block-routing-speed"
TPU_SCHEDULE = "tpu-schedule"
SERVE_PATH = "serve-path"

_AGAIN = "again"  # holds a second making of some runs, from other bases

# Benchmarks whose runs on one device are read as one, and what their rows are compared within.
_COMPARED: dict[str, Callable[[dict[str, Any]], Group]] = {
    MOAS_TIMES: lambda row: (row["part"],),
    BLOCK_ROUTING_SPEED: lambda row: (f"{row['part']} {row['pass']}", row["length"]),
    SERVE_PATH: lambda row: (row["part"], row["length"], row["batch"]),
}


def benchmark_caption(result: Mapping[str, Any]) -> str:
    """What a mixing benchmark ran on, from its result file."""
    config = result["config"]
    return (
        f"{named_device(result)}, {config['dtype']}, batch 1, {config['num_heads']} query and "
        f"{config['num_kv_heads']} key/value heads of {config['head_dim']}, width "
        f"{config['width']}; attention everywhere by {result['attention']}. Median of "
        f"{config['repeats']}, {dated_versions(result)}"
    )


def readme_blocks(folder: epath.PathLike) -> dict[str, str]:
    """The content of every README block that the results in `folder` give.

    Args:
      folder: holds a folder of JSON files for each experiment and benchmark.
    """
    folder = epath.Path(folder)
    blocks = {}
    if results := load_results(folder, ROUTED_ATTENTION):
        blocks[ROUTED_ATTENTION] = routed_attention_table(results)
    if results := load_results(folder, MOAS):
        blocks[MOAS] = moas_table(results)
    if results := load_results(folder, BLOCK_ROUTING):
        blocks[BLOCK_ROUTING] = block_routing_text(results, made_twice(folder))
    if results := load_results(folder, FLUX):
        blocks[FLUX] = flux_table(results)
    for name, table, caption in (
        (MIXING, mixing_table, benchmark_caption),
        (MOAS_TIMES, times_table, times_caption),
        (ATTENTION, attention_report.table, attention_report.caption),
        (BLOCK_ROUTING_SPEED, block_routing_report.table, block_routing_report.caption),
        (TPU_SCHEDULE, tpu_schedule_report.table, tpu_schedule_report.caption),
        (SERVE_PATH, serve_path_report.table, serve_path_report.caption),
    ):
        for title, bench in _benchmarks(folder, name).items():
            blocks[f"{name}-{title}"] = f"{table(bench['rows'])}\n\n{caption(bench)}"
    return blocks


def _benchmarks(folder: epath.Path, name: str) -> dict[str, dict[str, Any]]:
    """The results of a benchmark by name: of files, or of devices, by which their files begin."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((folder / name).glob("*.json")):
        bench, title = json.loads(path.read_text()), path.stem
        if name in _COMPARED:
            title = title.partition("-")[0]
        if name == SERVE_PATH:
            title += f"-{bench['config']['model']}"
        found.setdefault(title, []).append(bench)
    return {
        title: merged(benches, _COMPARED[name]) if name in _COMPARED else benches[0]
        for title, benches in found.items()
    }


def plot_results(folder: epath.PathLike) -> None:
    """Draws the plots of all results, each beside its JSON files.

    Args:
      folder: holds a folder of JSON files for each experiment and benchmark.
    """
    folder = epath.Path(folder)
    results = load_results(folder, ROUTED_ATTENTION)
    if results:
        plot_routed_attention(results, folder / ROUTED_ATTENTION)
    if results := load_results(folder, MOAS):
        plot_moas(results, folder / MOAS)
    if results := load_results(folder, BLOCK_ROUTING):
        plot_block_routing(results, folder / BLOCK_ROUTING)
    if results := load_results(folder, FLUX):
        plot_prompts(results, folder / FLUX / "tradeoff.png")
    for path in sorted((folder / MIXING).glob("*.json")):
        rows = json.loads(path.read_text())["rows"]
        shown = [r for r in rows if r["part"] == "mixing" and r["milliseconds"] and r["usage"]]
        if shown:
            plot_speed(shown, path.with_suffix(".png"))
    for name, drawn in (
        (ATTENTION, attention_plot),
        (BLOCK_ROUTING_SPEED, block_routing_report),
        (TPU_SCHEDULE, tpu_schedule_plot),
    ):
        for title, bench in _benchmarks(folder, name).items():
            drawn.plot(bench["rows"], folder / name / f"{title}.png")


def plot_routed_attention(results: list[Result], folder: epath.Path) -> None:
    """Histories and heat maps of seed 0, a file a task, and accuracy against usage of all.

    Args:
      results: of the experiment.
      folder: where the plots go.
    """
    for task in sorted({r.task for r in results}):
        mine = [r for r in results if r.task == task and r.seed == 0 and r.history]
        if mine:
            plot_history(
                {r.variant: r.history for r in mine},
                folder / f"history_{task}.png",
                least_usage=mine[0].least_usage,
            )
        for r in mine:
            if r.variant == "routed" and r.heatmap is not None:
                title = f"{task}: which token attended in which layer"
                plot_heatmap(r.heatmap, r.heatmap_tokens, folder / f"heatmap_{task}.png", title)
    plot_tradeoff(results, folder / "tradeoff.png")


def plot_moas(results: list[Result], folder: epath.Path) -> None:
    """Nats a character against key/value bytes, and how seed 0 came to use its schemes.

    Args:
      results: of the experiment.
      folder: where the plots go.
    """
    plot_quality(results, folder / "quality.png")
    for task in sorted({r.task for r in results}):
        first = [r for r in results if r.task == task and r.seed == 0]
        mixed = [r for r in first if r.details and "share" in r.details]
        if mixed:
            plot_layer_use(mixed, folder / f"use_{task}.png")


def plot_block_routing(results: list[Result], folder: epath.Path) -> None:
    """Quality against cost, bits per byte by position, and output error against cost.

    Args:
      results: of the experiment.
      folder: where the plots go.
    """
    results, _ = on_one_base(results)
    plot_budgets(results, folder / "tradeoff.png")
    for task in sorted({r.task for r in results}):
        mine = [r for r in results if r.task == task]
        plot_positions(mine, folder / f"positions_{task}.png")
        plot_errors(mine, folder / f"errors_{task}.png")


def made_twice(folder: epath.PathLike) -> list[Result]:
    """A second making of some runs of block routing, from other bases; see `made_again`.

    Args:
      folder: the results.
    """
    return [*map(read_result, sorted((epath.Path(folder) / BLOCK_ROUTING / _AGAIN).glob("*.json")))]


def block_routing_text(results: Sequence[Result], again: Sequence[Result] = ()) -> str:
    """The experiment's table, what follows from it, and the output errors.

    Args:
      results: of the experiment.
      again: a second making of some of its runs, from other bases.
    """
    twice = made_again(results, again)
    results, others = on_one_base(results)
    parts = [block_routing_table(results), other_bases(others), routing_findings(results), twice]
    return "\n\n".join(part for part in [*parts, error_table(results)] if part)


def report(folder: epath.PathLike, readme: epath.PathLike | None) -> None:
    """Draws all plots, and brings a README's blocks up to date with the results.

    Args:
      folder: the results.
      readme: a Markdown file with a block for each table; None to draw only.

    Raises:
      ValueError: a malformed result, or a README without one of the blocks.
    """
    plot_results(folder)
    if readme is not None:
        path = epath.Path(readme)
        path.write_text(update_blocks(path.read_text(), readme_blocks(folder)))
