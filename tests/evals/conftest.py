"""A made-up result, for every test of the reporting."""

from collections.abc import Callable
from typing import Any

import pytest

from routing_jax.evals.results import Result


@pytest.fixture
def make_result() -> Callable[..., Result]:
    def make(**changes: Any) -> Result:
        row = {"step": 0, "loss": 4.0, "accuracy": 0.02, "lambda": 0.0, "usage": 1.0}
        row |= {"cost": 1.0, "length": 8}
        values = {
            "experiment": "routed-attention",
            "task": "recall-128",
            "variant": "routed",
            "seed": 0,
            "accuracy": 0.9998,
            "accuracy_first_place": 1.0,
            "loss": 0.001,
            "bits_per_byte": None,
            "usage": 1 / 256,
            "usage_per_layer": [0.0, 1 / 128],
            "cost": 0.01,
            "kv_cost": 0.02,
            "least_usage": 1 / 256,
            "sequences": 2048,
            "steps": 1500,
            "tokens": 12_288_000,
            "parameters": 140_000,
            "minutes": 1.25,
            "mixing_ms": 0.5,
            "device": "NVIDIA H100 80GB HBM3",
            "versions": {"jax": "0.11.2", "flax": "0.12.10"},
            "config": {"model": {"width": 64, "layers": "conv,routed*2"}},
            "history": [row, row | {"step": 20, "accuracy": 0.5}],
            "heatmap": [[0, 0, 0], [0, 1, 0]],
            "heatmap_tokens": ["k  3", "λ", " \n[\t]"],
        }
        return Result(**(values | changes))

    return make
