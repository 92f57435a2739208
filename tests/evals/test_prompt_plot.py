"""The plot of layer routing: what is drawn of which results."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from routing_jax.evals.prompt_plot import plot_prompts
from routing_jax.evals.results import load_results

RESULTS = Path(__file__).resolve().parents[2] / "evals/results"


def look(bar):
    line = bar.lines[0]
    return line.get_color(), line.get_marker(), line.get_fillstyle()


def told(variant, usage, right, nll):
    example = load_results(RESULTS, "routed-attention")[0]
    tasks = {
        "passkey": {"right": right, "nll": None, "sparsity": 1 - usage},
        "text": {"right": [0.5], "nll": nll, "sparsity": 1 - usage},
    }
    return dataclasses.replace(
        example, task="tiny-512", variant=variant, usage=usage, details={"tasks": tasks}
    )


def test_each_way_stands_where_its_sparsity_and_its_difference_to_dense_say(tmp_path):
    ways = [
        told("dense", 1.0, [1.0, 1.0, 0.0], [1.0, 2.0]),
        told("static-75", 0.25, [1.0, 0.0, 0.0], [1.5, 2.0]),
    ]
    figure = plot_prompts(ways, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    left, right = figure.axes
    # Student's quantiles for 3 and for 2 values.
    for axes, lost, half in (
        (left, -100 / 3, 4.3027 * np.std([0, -100, 0], ddof=1) / 3**0.5),
        (right, 25.0, 12.7062 * np.std([50, 0], ddof=1) / 2**0.5),
    ):
        dense, static = (bar.lines[0].get_xydata()[0] for bar in axes.containers)
        assert dense.tolist() == [0, 0]
        assert static == pytest.approx([75, lost])
        (ends,) = axes.containers[1].lines[2][0].get_segments()
        assert ends[:, 1] == pytest.approx([lost - half, lost + half], rel=1e-4)


def test_the_ways_of_routing_are_named_within_the_plot(tmp_path):
    names = ["random", "sparse", "static+routed", "static+tasks"]
    names += [f"{who}{how}" for who in ("dense", "routed", "static") for how in ("", "+composed")]
    ways = [told(name, 0.5, [1.0, 1.0], [1.0, 1.0]) for name in names]
    figure = plot_prompts(ways, tmp_path / "plot.png")
    legend = figure.legends[0]
    assert {text.get_text() for text in legend.get_texts()} == set(names)
    looks = {name: look(bar) for name, bar in zip(sorted(names), figure.axes[0].containers)}
    assert len(set(looks.values())) == len(names)
    assert looks["routed"][:2] == looks["routed+composed"][:2]
    box, width = legend.get_window_extent(), figure.bbox.width
    assert 0 <= box.x0 < box.x1 <= width


def test_nothing_is_drawn_where_dense_attention_does_no_task(tmp_path):
    ways = [told(v, 0.5, [0.0, 0.0], [1.0, 1.0]) for v in ("dense", "sparse")]
    assert plot_prompts(ways, tmp_path / "plot.png") is None
    assert not list(tmp_path.iterdir())
