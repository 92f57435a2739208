"""The table of layer routing: each way beside dense attention, in the same trials."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from routing_jax.evals.prompt_tables import flux_table
from routing_jax.evals.results import load_results

RESULTS = Path(__file__).resolve().parents[2] / "evals/results"


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
    # Differences of the seeds' mean: 0, −½, 0, 1.
    half = 1.96 * np.std([0, -50, 0, 100], ddof=1) / 2
    assert f"87.5 % (+12.5 ± {half:.1f})" in routed
    assert f"{math.exp(1.15):.2f} (+16.18 %" in routed
    assert "60.0 %" in routed
    assert f"({100 * math.expm1(1):+.2f} %" in static
    assert "nats |" not in table
    with pytest.raises(ValueError, match="tiny-512 has no result of variant 'dense'"):
        flux_table(ways[:1])


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
    half = 1.96 * np.std([0.5, 0, 0.5, 0.2], ddof=1) / 2
    assert f"2.800 (+0.300 ± {half:.3f})" in routed
    assert "25.0 %" in routed
