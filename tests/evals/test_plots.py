import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from routing_jax.evals.plots import (
    MAX_COLUMNS,
    plot_heatmap,
    plot_history,
    plot_speed,
    plot_tradeoff,
)

PNG, SVG = b"\x89PNG\r\n\x1a\n", b"<?xml"


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def history(start: int | None = 100, usage: float = 0.01) -> list[dict]:
    """Sequences grow at step 50; λ rises after `start`, or never."""
    return [
        {
            "step": step,
            "loss": 1.0,
            "accuracy": min(1.0, step / 100),
            "lambda": 0.0 if start is None else min(0.5, max(0, step - start) / 100),
            "usage": 1.0 if start is None or step <= start else usage,
            "cost": 1.0,
            "length": 8 if step < 50 else 128,
        }
        for step in range(0, 300, 10)
    ]


def test_history_has_three_panels_over_the_same_steps(tmp_path):
    path = tmp_path / "history.png"
    figure = plot_history({"a": history(), "b": history(None)}, path, least_usage=1 / 256)
    assert path.read_bytes().startswith(PNG)
    accuracy, usage, penalty = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == ["accuracy", "hard usage", "λ"]
    assert penalty.get_xlabel() == "step"
    assert accuracy.get_xlim() == usage.get_xlim() == penalty.get_xlim()
    assert usage.get_yscale() == "log"
    assert usage.get_ylim()[0] < 1 / 256 < 1 < usage.get_ylim()[1]
    assert accuracy.get_ylim()[0] < 0 < 1 < accuracy.get_ylim()[1]
    assert legend(figure) == ["a", "b", "least possible", "λ starts to rise", "sequences grow"]


def test_history_shows_the_phase_change_in_every_panel(tmp_path):
    figure = plot_history({"a": history(100), "b": history(150)}, tmp_path / "history.png")
    for axes in figure.axes:
        dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
        assert [line.get_xdata()[0] for line in dotted] == [100, 150]
    # A penalty from the start, or none at all, has no such change.
    for start in (-500, None):
        assert "λ starts to rise" not in legend(
            plot_history({"a": history(start)}, tmp_path / "none.png")
        )


def test_a_usage_of_zero_has_a_place_of_its_own(tmp_path):
    figure = plot_history({"conv": history(usage=0.0)}, tmp_path / "history.png")
    usage = figure.axes[1]
    labels = dict(zip([t.get_text() for t in usage.get_yticklabels()], usage.get_yticks()))
    drawn = usage.lines[0].get_ydata()
    assert min(drawn) == labels["0"] > usage.get_ylim()[0]
    assert labels["100 %"] == 1


def test_an_empty_history_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'b'"):
        plot_history({"a": history(), "b": []}, tmp_path / "history.png")
    with pytest.raises(ValueError, match="at least one run"):
        plot_history({}, tmp_path / "history.png")


@pytest.mark.parametrize("length", [128, 1000, 8192])
def test_a_single_token_stays_visible(tmp_path, length):
    rng = np.random.default_rng(length)
    for place in (0, length - 1, int(rng.integers(length))):
        heatmap = np.zeros((3, length), int)
        heatmap[1, place] = 1
        tokens = [f"t{i}" for i in range(length)]
        figure = plot_heatmap(heatmap.tolist(), tokens, tmp_path / "map.png", "title")
        axes = figure.axes[0]
        (image,) = axes.images
        cells = np.asarray(image.get_array())
        assert cells.shape[1] <= MAX_COLUMNS
        ((layer, column),) = np.argwhere(cells)
        left, right, bottom, top = image.get_extent()
        width = (right - left) / cells.shape[1]
        assert layer == 1
        assert left + column * width <= place <= left + (column + 1) * width
        assert axes.get_xlim() == (-0.5, length - 0.5)
        assert (bottom, top) == (2.5, -0.5)
        # The token is named, beside its column.
        (name,) = axes.texts
        assert f"t{place}" in name.get_text().split()


def test_the_axis_says_what_a_column_is(tmp_path):
    for length, stride in ((256, 1), (257, 2), (8192, 32)):
        figure = plot_heatmap([[0] * length], None, tmp_path / "map.png", "title")
        label = figure.axes[0].get_xlabel()
        assert label == "position" if stride == 1 else f"maximum over {stride} positions" in label
    assert figure.axes[0].get_ylabel() == "layer"


def test_tokens_that_share_a_column_are_not_named(tmp_path):
    heatmap = [[1, 1] + [0] * 8190]
    figure = plot_heatmap(heatmap, ["a"] * 8192, tmp_path / "map.png", "title")
    assert len(figure.axes[0].texts) == 0
    assert "2 of 8,192" in [t.get_text() for t in _right_labels(figure)]


def _right_labels(figure):
    (right,) = figure.axes[0].child_axes
    return right.get_yticklabels()


def test_short_sequences_name_every_token_whatever_it_holds(tmp_path):
    tokens = ["\n", " ", "$", "\x00", "é", "𝔘", "", "_^{"]  # none may draw a warning
    figure = plot_heatmap([[1] * 8], tokens, tmp_path / "map.png", "title")
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == [r"\n", "␣", "$", r"\x00", r"\xe9", r"\U0001d518", "''", "_^{"]


def test_a_ragged_heatmap_is_refused(tmp_path):
    with pytest.raises(ValueError, match="equally long"):
        plot_heatmap([[0, 1], [1]], None, tmp_path / "map.png", "title")
    with pytest.raises(ValueError, match="tokens has 1"):
        plot_heatmap([[0, 1]], ["a"], tmp_path / "map.png", "title")


def test_tradeoff_draws_every_seed_and_the_mean(make_result, tmp_path):
    usages = {"routed": [0.004, 0.008], "full": [1.0, 1.0], "conv": [0.0, 0.0]}
    runs = [
        make_result(variant=variant, seed=seed, usage=usage, accuracy=0.5 + 0.5 * seed)
        for variant, values in usages.items()
        for seed, usage in enumerate(values)
    ]
    path = tmp_path / "tradeoff.svg"
    figure = plot_tradeoff(runs, path)
    assert path.read_bytes().startswith(SVG)
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("hard usage, %", "accuracy")
    seeds = {line.get_label(): line for line in axes.lines if line.get_label() in usages}
    means = [line for line in axes.lines if line.get_fillstyle() == "none"]
    assert list(seeds["routed"].get_xdata()) == [0.004, 0.008]
    assert list(seeds["routed"].get_ydata()) == [0.5, 1.0]
    assert [mean.get_xdata()[0] for mean in means][:2] == pytest.approx([0.006, 1.0])
    assert len({line.get_marker() for line in seeds.values()}) == 3
    assert len({to_hex(line.get_color()) for line in seeds.values()}) == 3
    zero = dict(zip([t.get_text() for t in axes.get_xticklabels()], axes.get_xticks()))["0"]
    assert set(seeds["conv"].get_xdata()) == {zero}
    low, high = axes.get_xlim()
    assert low < zero < 0.004 < 1 < high


def test_tradeoff_has_a_panel_a_task_each_in_its_own_measure(make_result, tmp_path):
    tasks = [f"recall-{2**i}" for i in range(7, 11)]
    runs = [make_result(task=task) for task in reversed(tasks)]
    runs.append(make_result(task="lm-stdlib", bits_per_byte=1.2))
    figure = plot_tradeoff(runs, tmp_path / "tradeoff.png")
    assert [axes.get_title() for axes in figure.axes] == ["lm-stdlib", *tasks]  # 256 before 1024
    assert [axes.get_ylabel() for axes in figure.axes] == ["bits per byte"] + ["accuracy"] * 4
    assert figure.axes[0].lines[0].get_ydata()[0] == 1.2
    with pytest.raises(ValueError, match="at least one result"):
        plot_tradeoff([], tmp_path / "none.png")


def speed_rows() -> list[dict]:
    return [
        {
            "length": length,
            "usage": usage,
            "implementation": name,
            "milliseconds": length * usage / 1000 + 0.1,
            "dense_milliseconds": length / 1000,
        }
        for length in (32768, 4096)
        for usage in (0.5, 0.01, 0.1)
        for name in ("xla", "mosaic_gpu")
    ]


def test_speed_has_a_line_a_length_and_dense_dashed(tmp_path):
    path = tmp_path / "deep" / "speed.png"
    figure = plot_speed(speed_rows(), path)
    assert path.read_bytes().startswith(PNG)
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("usage", "milliseconds")
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    solid = [line for line in axes.lines if line.get_linestyle() == "-"]
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert len(solid) == len(dashed) == 4
    for line in solid:
        assert list(line.get_xdata()) == [0.01, 0.1, 0.5]
        assert list(line.get_ydata()) == sorted(line.get_ydata())
    assert {y for line in dashed for y in line.get_ydata()} == {4.096, 32.768}
    # A length's own colour for both its lines.
    assert [to_hex(line.get_color()) for line in solid] == [
        to_hex(line.get_color()) for line in dashed
    ]
    assert legend(figure) == ["32,768 tokens", "4,096 tokens", "xla", "mosaic_gpu", "dense"]


def test_speed_refuses_what_a_logarithm_cannot_show(tmp_path):
    rows = speed_rows()
    with pytest.raises(ValueError, match=r"rows\[2\]\['usage'\] is 0"):
        plot_speed([*rows[:2], rows[2] | {"usage": 0}], tmp_path / "speed.png")
    with pytest.raises(ValueError, match="at least one row"):
        plot_speed([], tmp_path / "speed.png")


@pytest.mark.parametrize("spread", [1.0, 1.01, 1.5, 30.0, 1e5])
def test_logarithmic_axes_always_have_ticks(tmp_path, spread):
    row = {"length": 1, "implementation": "xla", "usage": 0.0123, "dense_milliseconds": 4.3}
    rows = [
        row | {"milliseconds": 4.3},
        row | {"usage": 0.0123 * spread, "milliseconds": 4.3 / spread},
    ]
    (axes,) = plot_speed(rows, tmp_path / "speed.png").axes
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        assert len([tick for tick in axis.get_ticklocs() if low <= tick <= high]) >= 2


def test_the_same_plot_gives_the_same_bytes(tmp_path):
    for suffix in ("png", "svg"):
        for name in ("a", "b"):
            plot_speed(speed_rows(), tmp_path / f"{name}.{suffix}")
        one, two = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in ("a", "b"))
        assert one == two


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\.png or \.svg"):
        plot_speed(speed_rows(), tmp_path / "speed.gif")


def test_plotting_leaves_pyplot_alone():
    code = "import sys, routing_jax.evals.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
