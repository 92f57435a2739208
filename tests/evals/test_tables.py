import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing_jax.evals.tables import (
    Column,
    block_routing_table,
    caption,
    markdown_table,
    multiple_up,
    percent_down,
    recall_table,
    routed_attention_table,
    significant,
    text_table,
)


def cells(table: str) -> list[dict[str, str]]:
    """The rows of a markdown table, by heading."""
    lines = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.split("\n")
    ]
    assert len({len(line) for line in lines}) == 1
    return [dict(zip(lines[0], line)) for line in lines[2:]]


def test_a_table_is_rectangular_and_aligned():
    columns = [Column("name", "left"), Column("ms"), Column("note", "center")]
    table = markdown_table(columns, [["a|b", "1", "two\nlines"], ["c", "12,345", ""]])
    lines = table.split("\n")
    assert len({len(line) for line in lines}) == 1
    rule = lines[1].strip("|").split("|")
    assert [(r[0] == ":", r[-1] == ":") for r in rule] == [
        (True, False),
        (False, True),
        (True, True),
    ]
    first, second = cells(table)
    assert first == {"name": r"a\|b", "ms": "1", "note": "two lines"}
    assert second["ms"] == "12,345"


def test_a_ragged_row_is_refused():
    with pytest.raises(ValueError, match="Row 1 has 1 cells; it must have 2"):
        markdown_table([Column("a"), Column("b")], [["1", "2"], ["3"]])


@given(st.floats(0, 1))
def test_accuracy_is_never_flattered(fraction):
    shown = float(percent_down(fraction).removesuffix(" %")) / 100
    assert shown <= fraction + 1e-9
    assert fraction - shown < 1e-4 + 1e-9
    assert (shown == 1) == (fraction == 1)


@given(st.floats(0, 5000))
def test_a_multiple_is_never_flattered(ratio):
    shown = float(multiple_up(ratio).removesuffix("×").replace(",", ""))
    assert shown >= ratio - 1e-6
    assert shown - ratio < (0.011 if ratio < 10 else 1.001)


@given(st.floats(1e-6, 1e6))
def test_significant_digits(value):
    text = significant(value)
    assert float(text.replace(",", "")) == pytest.approx(value, rel=5.1e-3)
    assert "e" not in text


@pytest.fixture
def recall(make_result):
    return [
        make_result(task=task, variant=variant, seed=seed, accuracy=accuracy, usage=usage)
        for task in ("recall-1024", "recall-128")
        for variant, usage in (("conv", 0.0), ("full", 1.0), ("routed", 1 / 256))
        for seed, accuracy in ((1, 1.0), (0, 0.9995))
    ]


def test_recall_rows_are_in_order_with_mean_and_worst_seed(recall):
    rows = cells(recall_table(recall))
    assert [row["variant"] for row in rows] == ["routed", "full", "conv"] * 2
    # 128 before 1024, each task named once.
    assert [row["task"] for row in rows] == ["recall-128", "", "", "recall-1024", "", ""]
    routed = rows[0]
    assert routed["accuracy (worst)"] == "99.97 % (99.95 %)"
    assert routed["hard usage (worst)"] == "0.391 %"
    assert routed["× least possible (worst)"] == "1.00×"
    assert routed["cost"] == "0.0100"
    assert routed["kv cost"] == "0.0200"
    assert routed["mixing, ms"] == "0.500"
    assert routed["seeds"] == "2"
    assert rows[1]["× least possible (worst)"] == "256×"


def test_changes_of_the_routed_model_follow_it(make_result):
    names = ["random", "full", "routed+pause", "conv", "routed", "routed+back"]
    rows = cells(recall_table([make_result(variant=name) for name in names]))
    assert [row["variant"] for row in rows] == [
        "routed",
        "routed+back",
        "routed+pause",
        "full",
        "conv",
        "random",
    ]


def test_the_claim_stands_beside_the_routed_model_alone(recall):
    published = [row["published"] for row in cells(recall_table(recall))]
    assert "0.3 %" in published[0]
    assert "126" in published[0]
    assert set(published[1:]) == {"–"}


def test_the_worst_usage_is_the_highest(make_result):
    runs = [make_result(seed=i, usage=usage) for i, usage in enumerate([1 / 256, 3 / 256])]
    (row,) = cells(recall_table(runs))
    assert row["hard usage (worst)"] == "0.781 % (1.17 %)"
    assert row["× least possible (worst)"] == "2.00× (3.00×)"


def test_a_figure_that_some_seeds_lack_says_so(make_result):
    runs = [make_result(seed=0), make_result(seed=1, mixing_ms=None)]
    (row,) = cells(recall_table(runs))
    assert row["mixing, ms"] == "0.500 [1 of 2 seeds]"
    (row,) = cells(recall_table(runs[1:]))
    assert row["mixing, ms"] == "–"


def test_milliseconds_are_of_the_device_that_most_seeds_had(make_result):
    runs = [make_result(seed=0, device="cpu"), make_result(seed=1), make_result(seed=2)]
    (row,) = cells(recall_table(runs))
    assert row["mixing, ms"] == "0.500 [2 of 3 seeds, NVIDIA H100 80GB HBM3]"
    (row,) = cells(recall_table(runs[:2]))
    assert row["mixing, ms"] == "–"
    # A seed that was not timed counts for no device.
    runs[1:] = [make_result(seed=seed, mixing_ms=None) for seed in (1, 2)]
    (row,) = cells(recall_table(runs))
    assert row["mixing, ms"] == "0.500 [1 of 3 seeds, cpu]"
    (row,) = cells(recall_table([*runs, make_result(seed=3)]))
    assert row["mixing, ms"] == "–"


def test_several_devices_are_named_in_each_row(make_result):
    runs = [make_result(), make_result(variant="full", device="cpu")]
    assert [row["device"] for row in cells(recall_table(runs))] == ["NVIDIA H100 80GB HBM3", "cpu"]
    assert "device" not in recall_table(runs[:1])


def test_text_is_compared_with_full_attention(make_result):
    bits = {"full": [1.0, 1.02], "routed": [1.02, 1.02], "conv": [1.5]}
    runs = [
        make_result(task="lm-stdlib", variant=v, seed=i, bits_per_byte=b, accuracy_first_place=None)
        for v, values in bits.items()
        for i, b in enumerate(values)
    ]
    rows = {row["variant"]: row for row in cells(text_table(runs))}
    assert list(rows) == ["routed", "full", "conv"]
    assert rows["full"]["bits per byte ± std"] == "1.0100 ± 0.0141"
    # Seed by seed: one that has no other seed is not held against what the others had.
    assert rows["routed"]["against full (worst)"] == "+1.00 % (+2.00 %)"
    assert rows["conv"]["against full (worst)"] == "+50.00 %"
    assert rows["full"]["against full (worst)"] == "–"
    without = [run for run in runs if run.variant != "full"]
    assert cells(text_table(without))[0]["against full (worst)"] == "–"


def test_the_caption_comes_from_the_results(make_result):
    runs = [
        make_result(seed=3),
        make_result(seed=7, device="TPU v5 lite", versions={"jax": "0.12.0"}, sequences=4096),
    ]
    text = caption(runs)
    for part in ("NVIDIA H100 80GB HBM3; TPU v5 lite", "jax 0.11.2", "jax 0.12.0", "Seeds: 3, 7"):
        assert part in text
    assert "2,048 to 4,096" in text
    assert "standard deviation" in text


def test_each_kind_of_task_has_its_table(recall, make_result):
    text = make_result(task="lm", bits_per_byte=1.2)
    both = routed_attention_table([*recall, text])
    assert both.split("\n\n") == [
        recall_table(recall),
        text_table([text]),
        caption([*recall, text]),
    ]
    assert "bits per byte" not in routed_attention_table(recall)
    # The order of the files changes nothing.
    assert routed_attention_table([text, *recall[::-1]]) == both
    with pytest.raises(ValueError, match="at least one result"):
        routed_attention_table([])


def test_block_routers_stand_beside_dense_attention_of_their_task(make_result):
    def made(task, variant, seed=0, **changes):
        return make_result(task=task, variant=variant, seed=seed, **changes)

    heads = {"head_usage": [[0.1, 0.2], [0.25, 0.3]]}
    table, told = block_routing_table(
        [
            made("needle", "learned-25", accuracy=0.9, usage=0.2, details=heads),
            made("needle", "learned-25", 1, accuracy=0.7, usage=0.3, details=heads),
            made("needle", "full", accuracy=1.0, usage=1.0),
            made("needle", "full", 1, accuracy=0.8, usage=1.0),
            made("needle", "learned-12", accuracy=0.6),
            made("needle", "learned-12", 2, accuracy=0.1),
            made("text", "full", bits_per_byte=2.0, accuracy=0.5),
            made("text", "base", bits_per_byte=1.0, accuracy=0.5),
            made("text", "window-1k", bits_per_byte=2.1, accuracy=0.5),
        ]
    ).split("\n\n")
    dense, few, learned, _, base, window = cells(table)
    assert dense["router and budget, %"] == "full"
    assert learned["accuracy (worst)"] == "80.00 % (70.00 %)"
    assert learned["against dense (worst)"] == "-11.25 % (-12.50 %)"  # seed by seed
    assert few["against dense (worst)"] == "-40.00 % [1 of 2 seeds]"
    assert learned["blocks visited (worst)"] == "25.0 % (30.0 %)"
    assert learned["by head"] == "10.0 % to 30.0 %"
    assert window["bits per byte ± std"] == "2.1000"
    assert window["against dense (worst)"] == "+110.00 %"
    assert base["against dense (worst)"] == "–"
    assert window["accuracy (worst)"] == dense["by head"] == "–"
    assert "NVIDIA H100" in told
    assert "Blocks visited: share of the key blocks" in told
    assert "tokens that attend" not in told
    with pytest.raises(ValueError, match="results is empty"):
        block_routing_table([])
