"""How long the variants of the experiment 'moas' take, one after another in one process."""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from routing_jax.evals.benchmarks.environment import environment
from routing_jax.evals.benchmarks.running import record
from routing_jax.evals.model_time import (
    decode_milliseconds,
    forward_milliseconds,
    median_milliseconds,
)
from routing_jax.evals.scheme_tables import times_table
from routing_jax.models import Decoder, init_params
from routing_jax.train.config import TrainConfig
from routing_jax.train.data import batches
from routing_jax.train.experiments.experiment import Run
from routing_jax.train.step import init_state, make_train_step


def step_milliseconds(config: TrainConfig) -> float:
    """Wall-clock of one training step, with all that it updates.

    Args:
      config: the run.
    """
    step = jax.jit(make_train_step(config), donate_argnums=0)
    size = config.batch_size(config.data.length)
    batch = jax.device_put(next(batches(config.data, split="train", seed=0, batch_size=size)))
    state = jax.jit(lambda: init_state(config))()

    def call() -> jax.Array:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["loss"]

    return median_milliseconds(call)


def _row(run: Run) -> dict[str, Any]:
    config = run.config
    model, data = config.model, config.data
    size = config.batch_size(data.length)
    tokens = next(batches(data, split="train", seed=0, batch_size=size)).tokens
    params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    masked = jax.jit(functools.partial(Decoder(model).apply, mode="masked"))
    out: Any = masked({"params": params}, tokens)
    return {
        "variant": run.variant,
        "kv_cost": float(out.reports.kv_cost.mean()),
        "step_ms": step_milliseconds(config),
        "forward_ms": forward_milliseconds(model, params, tokens),
        "decode_ms": decode_milliseconds(model, params, tokens[:1]),
    }


def time_variants(runs: Sequence[Run], out: Path) -> dict[str, Any]:
    """Times a training step, a forward pass and a decoded token of every variant, untrained.

    A router that was never trained spreads tokens about evenly; `kv_cost` says how.

    Args:
      runs: of the experiment; of each variant the first is taken.
      out: the JSON file to write; its folder is made.

    Returns:
      What is written: device, driver, versions, date, seconds, and rows of variant, kv_cost,
      step_ms, forward_ms and decode_ms.
    """
    first = {run.variant: run for run in reversed(runs)}

    def measure(report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        start = time.monotonic()
        result: dict[str, Any] = {**environment(), "seconds": 0.0, "rows": []}
        for variant in dict.fromkeys(run.variant for run in runs):
            result["rows"].append(_row(first[variant]))
            result["seconds"] = round(time.monotonic() - start, 1)
            report(result)
        return result

    line = (
        "{variant:<24} step {step_ms:8.3f} ms, forward {forward_ms:8.3f} ms, decode "
        "{decode_ms:8.3f} ms, kv cost {kv_cost:.3f}"
    )
    return record(measure, out, describe=line.format_map, table=times_table)
