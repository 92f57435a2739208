"""From committed results to what people read: plots beside them, and the blocks of a README."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from routing_jax.evals.benchmarks import tpu_schedule_plot, tpu_schedule_report
from routing_jax.evals.benchmarks.mixing import table as mixing_table
from routing_jax.evals.plots import plot_heatmap, plot_history, plot_speed, plot_tradeoff
from routing_jax.evals.readme import update_blocks
from routing_jax.evals.results import Result, load_results
from routing_jax.evals.tables import routed_attention_table

ROUTED_ATTENTION = "routed-attention"
MIXING = "mixing"
TPU_SCHEDULE = "tpu-schedule"


def benchmark_caption(result: Mapping[str, Any]) -> str:
    """What a mixing benchmark ran on, from its result file."""
    config = result["config"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    driver = f", driver {result['driver']}" if result.get("driver") else ""
    return (
        f"{result['device']}{driver}, {config['dtype']}, batch 1, {config['num_heads']} query and "
        f"{config['num_kv_heads']} key/value heads of {config['head_dim']}, width "
        f"{config['width']}; attention everywhere by {result['attention']}. Median of "
        f"{config['repeats']}, {result['date'][:10]}. Versions: {versions}."
    )


def readme_blocks(folder: epath.PathLike) -> dict[str, str]:
    """The content of every README block that the results in `folder` give.

    Args:
      folder: holds routed-attention/*.json, mixing/*.json and tpu-schedule/*.json.
    """
    folder = epath.Path(folder)
    blocks = {}
    if results := load_results(folder, ROUTED_ATTENTION):
        blocks[ROUTED_ATTENTION] = routed_attention_table(results)
    for path in sorted((folder / MIXING).glob("*.json")):
        bench = json.loads(path.read_text())
        blocks[f"{MIXING}-{path.stem}"] = (
            f"{mixing_table(bench['rows'])}\n\n{benchmark_caption(bench)}"
        )
    for path in sorted((folder / TPU_SCHEDULE).glob("*.json")):
        bench = json.loads(path.read_text())
        blocks[f"{TPU_SCHEDULE}-{path.stem}"] = (
            f"{tpu_schedule_report.table(bench['rows'])}\n\n{tpu_schedule_report.caption(bench)}"
        )
    return blocks


def plot_results(folder: epath.PathLike) -> None:
    """Draws the plots of all results, each beside its JSON files.

    Args:
      folder: holds routed-attention/*.json, mixing/*.json and tpu-schedule/*.json.
    """
    folder = epath.Path(folder)
    results = load_results(folder, ROUTED_ATTENTION)
    if results:
        plot_routed_attention(results, folder / ROUTED_ATTENTION)
    for path in sorted((folder / MIXING).glob("*.json")):
        rows = json.loads(path.read_text())["rows"]
        shown = [r for r in rows if r["part"] == "mixing" and r["milliseconds"] and r["usage"]]
        if shown:
            plot_speed(shown, path.with_suffix(".png"))
    for path in sorted((folder / TPU_SCHEDULE).glob("*.json")):
        tpu_schedule_plot.plot(json.loads(path.read_text())["rows"], path.with_suffix(".png"))


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
