"""The table of layer routing: each way beside dense attention, in the same trials."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from routing_jax.evals.prompt_tables import flux_table, with_interval
from routing_jax.evals.results import load_results

RESULTS = Path(__file__).resolve().parents[2] / "evals/results"
STUDENT = {4: 3.1824}  # the 97.5 % quantile of as many values


def told(example, variant, seed, right, nll, sparsity):
    tasks = {
        "passkey": {"right": right, "nll": None, "sparsity": sparsity, "dense_by_layer": [1.0]},
        "text": {"right": [0.5], "nll": nll, "sparsity": 1.0, "dense_by_layer": [0.0]},
    }
    return dataclasses.replace(
        example, task="tiny-512", variant=variant, seed=seed, details={"tasks": tasks}
    )


def test_the_table_pairs_each_way_of_routing_with_dense():
    example = load_results(RESULTS, "routed-attention")[0]
    ways = [
        told(example, "routed", 0, [1.0, 0.0, 1.0, 1.0], [1.2, 1.0], 0.5),
        told(example, "routed", 1, [1.0, 1.0, 1.0, 1.0], [1.4, 1.0], 0.7),
        told(example, "dense", 0, [1.0, 1.0, 1.0, 0.0], [1.0, 1.0], 0.0),
        told(example, "static-50", 0, [0.0, 0.0, 0.0, 0.0], [2.0, 2.0], 0.5),
    ]
    table = flux_table(ways)
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert [line.split("|")[1].strip() for line in lines] == ["dense", "static-50", "routed"]
    dense, static, routed = lines
    assert "75.0 % |" in dense
    assert "2.72" in dense
    # Differences of the seeds' mean: 0, −½, 0, 1. Seeds differ by no more than chance.
    half = STUDENT[4] * np.std([0, -50, 0, 100], ddof=1) / 2
    assert f"87.5 % (+12.5 ± {half:.1f})" in routed
    assert f"{math.exp(1.15):.2f} (+16.18 %" in routed
    assert "60.0 %" in routed
    assert f"({100 * math.expm1(1):+.2f} %" in static
    assert "nats |" not in table
    early = flux_table(ways[:1])
    said = "Not measured yet: dense, which all others stand beside. Measured: "
    assert f"**tiny-512**\n\n{said}{ways[0].variant}.\n" in early
    assert "|" not in early


@pytest.mark.parametrize(
    ("sparse", "said"),
    [
        ({"retrieval": "full", "channels": None}, "after it. (too few)"),
        ({"retrieval": "topk", "channels": None}, "after it, by 16 channels of their keys. (too"),
        ({"retrieval": "topk", "channels": 8}, "after it, by 8 channels of their keys. (too"),
        ({"retrieval": "topk", "means": 4}, "after it, by 4 means of their keys. (too"),
    ],
)
def test_the_caption_says_by_what_blocks_were_found(sparse, said):
    example = load_results(RESULTS, "routed-attention")[0]
    model = {"head_dim": 64, "sparse": {"mode": "streaming"} | sparse}
    dense = told(example, "dense", 0, [1.0], [1.0], 0.0)
    composed = dataclasses.replace(
        told(example, "dense+composed", 0, [1.0], [1.0], 0.0), config={"model": model}
    )
    assert said in flux_table([dense, composed])


def test_likelihoods_are_paired_with_those_of_dense():
    example = load_results(RESULTS, "routed-attention")[0]

    def maths(variant, nll):
        run = told(example, variant, 0, [0.0], [1.0], 0.0)
        task = {"right": [0.0] * 4, "nll": nll, "sparsity": 0.25, "dense_by_layer": [0.75]}
        return dataclasses.replace(run, details={"tasks": {"maths": task}})

    ways = [maths("dense", [1.0, 2.0, 3.0, 4.0]), maths("routed", [1.5, 2.0, 3.5, 4.2])]
    head, _, dense, routed = [line for line in flux_table(ways).splitlines() if line[:1] == "|"]
    assert "maths, nats" in head
    assert "maths, right" not in head
    assert "| 2.500 |" in " ".join(dense.split())
    half = STUDENT[4] * np.std([0.5, 0, 0.5, 0.2], ddof=1) / 2
    assert f"2.800 (+0.300 ± {half:.3f})" in routed
    assert "25.0 %" in routed


@pytest.mark.parametrize(
    ("seeds", "by_seed", "least"),
    [(1, 0.0, 930), (2, 0.0, 930), (2, 1.0, 850), (5, 0.1, 930), (5, 1.0, 930)],
)
def test_an_interval_holds_what_other_seeds_and_prompts_would_have_given(seeds, by_seed, least):
    """The true mean, 0, lies in 95 % of the intervals; of the seeds' mean alone it would not."""
    rng, prompts, held, alone = np.random.default_rng(0), 40, 0, 0
    for _ in range(1000):
        values = (
            by_seed * rng.normal(size=(seeds, 1))
            + rng.normal(size=(1, prompts))
            + 0.5 * rng.normal(size=(seeds, prompts))
        )
        mean, half = with_interval(values)
        held += abs(mean) < half
        mean, half = with_interval(values.mean(axis=0, keepdims=True))
        alone += abs(mean) < half
    assert least <= held <= 990
    if by_seed == 1:
        assert alone < 700


def test_an_interval_of_one_prompt_is_unknown_and_of_equal_values_empty():
    assert math.isnan(with_interval(np.ones((2, 1)))[1])
    assert with_interval(np.ones((2, 3))) == (1, 0)
