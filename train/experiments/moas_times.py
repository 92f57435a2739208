"""How long the variants of the experiment 'moas' take, one after another in one process."""

import concurrent.futures
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from routing_jax.evals.benchmarks.environment import environment
from routing_jax.evals.benchmarks.running import Clock, collect, measure_in_time, record
from routing_jax.evals.benchmarks.timing import State
from routing_jax.evals.model_time import (
    Compiled,
    ModelProgram,
    compile_program,
    decode_program,
    forward_program,
    time_model,
)
from routing_jax.evals.scheme_tables import times_table
from routing_jax.models import DecoderConfig
from routing_jax.train.config import TrainConfig
from routing_jax.train.data import batches
from routing_jax.train.experiments.experiment import Run
from routing_jax.train.step import init_state, make_train_step

Part = Literal["step", "forward", "decode", "decode-long"]

# A cache of which reading keys and values takes a GPU longer than launching what reads them.
_LONG = 131_072


def _step_program(config: TrainConfig, batch: Any, calls: int = 10) -> ModelProgram:
    """A training step, with all that it updates."""
    train_step = make_train_step(config)

    def step(state: State) -> State:
        new, metrics = train_step(state["state"], state["batch"])
        kv_cost = state["kv_cost"] + metrics["kv_cost"]
        return state | {"state": new, "y": metrics["loss"], "kv_cost": kv_cost}

    def make() -> State:
        return {
            "state": init_state(config),
            "batch": jax.tree.map(jnp.asarray, batch),
            "y": jnp.float32(0),
            "kv_cost": jnp.float32(0),
        }

    return ModelProgram(step, make, calls)


def _kv_bytes(config: DecoderConfig, length: int) -> int:
    """Bytes of keys and values that MHA reads for a token after so many."""
    each = 2 * config.num_heads * config.head_dim * jnp.dtype(config.dtype).itemsize
    return length * len(config.mixers) * each


def _rows(
    runs: Sequence[Run], parts: Sequence[Part], long: int, clock: Clock
) -> Iterator[dict[str, Any]]:
    """A row for each part and run; the programs of a part are compiled before any is timed."""

    def program(part: str, config: TrainConfig) -> ModelProgram:
        size = config.batch_size(config.data.length)
        batch = next(batches(config.data, split="train", seed=0, batch_size=size))
        if part == "step":
            return _step_program(config, batch)
        if part == "forward":
            return forward_program(config.model, batch.tokens)
        length = config.data.length if part == "decode" else long
        return decode_program(config.model, batch.tokens, length, min(64, config.data.length))

    def compile_in_time(part: str, run: Run) -> Compiled:
        clock.check()
        return compile_program(program(part, run.config))

    for part in parts:
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            found = [pool.submit(compile_in_time, part, run) for run in runs]
        for run, future in zip(runs, found):
            names = ("milliseconds", "spread", "kv_cost", "kv_bytes")
            row: dict[str, Any] = {"part": part, "variant": run.variant, **dict.fromkeys(names)}
            timed, error = measure_in_time(clock, future, time_model)
            if timed is None:
                row["error"] = error
            else:
                timing, kv_cost = timed
                row |= {**timing._asdict(), "kv_cost": kv_cost}
                if part.startswith("decode"):
                    length = run.config.data.length if part == "decode" else long
                    row["kv_bytes"] = round(kv_cost * _kv_bytes(run.config.model, length))
            yield row


def _line(row: dict[str, Any]) -> str:
    start = f"{row['part']:<12} {row['variant']:<24}"
    if row["milliseconds"] is None:
        return f"{start} {row['error']}"
    read = "" if row["kv_bytes"] is None else f", {row['kv_bytes'] / 2**20:.3f} MiB read"
    return (
        f"{start} {row['milliseconds']:9.4f} ms ± {row['spread']:.2g}, kv cost "
        f"{row['kv_cost']:.3f}{read}"
    )


def time_variants(
    runs: Sequence[Run],
    out: Path,
    *,
    parts: Sequence[Part] = get_args(Part),
    long: int = _LONG,
    seconds: float = 0.0,
) -> dict[str, Any]:
    """Times a training step, a forward pass and a decoded token of every variant, untrained.

    Tokens are decoded one sequence at a time, at the end of a context and of a long cache, which
    shows what keys and values cost. A router that was never trained spreads tokens about evenly;
    `kv_cost` says how, of the very tokens that were timed.

    Args:
      runs: of the experiment; of each variant the first is taken.
      out: the JSON file to write after every row; its folder is made.
      parts: what is timed: a step, a forward pass, a token at a context's end, one of a long cache.
      long: tokens of the long cache.
      seconds: begin nothing later than this; 0 for no limit.

    Returns:
      What is written: device, driver, versions, date, the long cache's length, seconds, and rows of
      part, variant, milliseconds and spread (interquartile range) of a call, kv_cost, and kv_bytes
      read for a decoded token; a row that failed or was skipped holds `error` and no numbers.
    """
    first = {run.variant: run for run in reversed(runs)}
    chosen = [first[variant] for variant in dict.fromkeys(run.variant for run in runs)]

    def measure(report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        result = {**environment(), "long": long}
        return collect(result, _rows(chosen, parts, long, Clock(seconds)), report)

    return record(measure, out, describe=_line, table=times_table)
