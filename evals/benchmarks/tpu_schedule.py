"""Block-sparse attention on TPUs beside jax's splash attention, by the compiler's own schedule.

No TPU is needed: the compiler packs each kernel into bundles, of which a core issues one a cycle,
and the bundles of each part times how often it runs are an estimate of the cycles it takes. The
estimate is blind to stalls, above all to waiting for copies from main memory, so it ranks schedules
and shows what grows with what, and is no substitute for a measurement.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from routing_jax.evals.benchmarks import attention_cases
from routing_jax.evals.benchmarks.environment import environment
from routing_jax.evals.benchmarks.running import collect, record
from routing_jax.evals.benchmarks.tpu_compiler import Report, compile_cases, compiler_refusal
from routing_jax.evals.benchmarks.tpu_programs import (
    CHIPS,
    TpuCase,
    attention_inputs,
    splash_call,
)
from routing_jax.evals.benchmarks.tpu_schedule_config import TpuScheduleConfig
from routing_jax.evals.benchmarks.tpu_schedule_plot import plot
from routing_jax.evals.benchmarks.tpu_schedule_report import Row, describe, table, with_ratios
from routing_jax.kernels import row_lengths
from routing_jax.kernels.block_sparse.mosaic_tpu.call import (
    blocks_together,
    sizes_of,
    tiles_together,
)

__all__ = ["TpuScheduleConfig", "main", "run"]

_MEMORY = ("argument_bytes", "result_bytes", "temporary_bytes", "peak_bytes")


def _listing(case: TpuCase, blocks: int) -> attention_cases.Case:
    """The case of the attention benchmark whose tiles list so many random blocks."""
    T, N, K = case.length, case.num_heads, case.num_kv_heads
    return attention_cases.Case("forward", None, 1, T, T, blocks, case.block, case.head_dim, N, K)


@functools.cache
def row_counts(case: TpuCase, blocks: int, seed: int) -> dict[str, int]:
    """How often each part of the kernels of rows runs, over all sequences and kv heads.

    These are the forward pass and dq. Turns are equally long on all generations.

    Args:
      case: sizes.
      blocks: random blocks that each tile lists, its own among them; 0 for dense rows.
      seed: of the lists.

    >>> row_counts(TpuCase("v5e:2x2", "forward", 512, 64), 2, 0)
    {'program': 4, 'turn_8': 0, 'turn_4': 0, 'turn_2': 3, 'turn_1': 1}
    """
    sizes = blocks_together(sizes_of(*attention_inputs(case)))
    T, K = case.length, case.num_kv_heads
    rows = attention_cases.make_table(_listing(case, blocks), seed)
    lengths = np.asarray(row_lengths(rows, T, T), np.int64)
    return _turns(np.broadcast_to(lengths, (case.batch, K, lengths.shape[2])), sizes)


@functools.cache
def column_counts(case: TpuCase, blocks: int, seed: int) -> dict[str, int]:
    """How often each part of the kernel of key blocks, dk and dv, runs; see `row_counts`.

    >>> column_counts(TpuCase("v5e:2x2", "backward", 512, 64), 2, 0)
    {'program': 4, 'turn_4': 0, 'turn_2': 2, 'turn_1': 3}
    """
    sizes = tiles_together(sizes_of(*attention_inputs(case)))
    T, K = case.length, case.num_kv_heads
    table = attention_cases.make_table(_listing(case, blocks), seed)
    lengths, indices = np.asarray(row_lengths(table, T, T)), np.asarray(table.indices)
    if not blocks:
        indices = np.broadcast_to(np.arange(-(-T // case.block)), (*lengths.shape, lengths.max()))
    J = -(-T // case.block)
    listed = np.arange(indices.shape[-1]) < lengths[..., None]
    tiles = np.stack([np.bincount(i[of], minlength=J) for i, of in zip(indices[0], listed[0])])
    return _turns(np.broadcast_to(tiles, (case.batch, K, J)), sizes)


def _turns(left: np.ndarray, sizes: list[int]) -> dict[str, int]:
    """Programs, and turns of each size, of programs that have so much to take."""
    counts = {"program": left.size}
    for size in sizes:
        taken, left = np.divmod(left, size)
        counts[f"turn_{size}"] = int(taken.sum())
    return counts


def splash_counts(case: TpuCase) -> dict[str, int]:
    """How often each part of splash attention's forward kernel runs, over all heads."""
    visible = np.asarray(splash_call(case).fwd_mask_info.block_mask) > 0
    rows = case.batch * case.num_heads * visible.shape[1]
    return {
        "program": rows * visible.shape[2],
        "run": int(visible.sum()) * case.batch * case.num_heads // visible.shape[0],
        "first": rows,
        "last": rows,
    }


def _row(chip: str, part: str, case: TpuCase, report: Report) -> Row:
    row: Row = {"part": part, "chip": chip, "peer": "block_sparse", "program": case.program}
    row |= {"length": case.length, "head_dim": case.head_dim, "seconds": report.get("seconds")}
    row |= {name: report.get(name) for name in _MEMORY}
    return row | ({"error": report["error"]} if "error" in report else {})


def _counted(row: Row, kernel: dict[str, Any] | None, counts: dict[str, int]) -> Row:
    """The row with the bundles that the kernel issues; None if it did not compile."""
    row |= {"counts": counts, "parts": None, "slots": None, "bundles": None}
    if kernel is None:
        return row
    parts = kernel["bundles"]
    total = sum(number * counts[name] for name, number in parts.items())
    return row | {"parts": parts, "slots": kernel["slots"], "bundles": total}


_KERNELS = {
    "forward": {"forward": row_counts},
    "backward": {"query_gradients": row_counts, "key_gradients": column_counts},
}


def _schedule_rows(config: TpuScheduleConfig, chip: str) -> Iterator[Row]:
    for program, head_dim in itertools.product(config.passes, config.head_dims):
        dense = TpuCase(
            CHIPS[chip],
            program,
            config.length,
            head_dim,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            block=config.block,
        )
        tiled = [dense._replace(program="splash", tiles=tiles) for tiles in config.tiles]
        tiled = tiled if program == "forward" else []
        lists = dense._replace(length=config.sparse_length, capacity=max(config.blocks, default=0))
        cases = [dense, *tiled, *([lists] if lists.capacity else [])]
        for case, report in zip(cases, compile_cases(cases, schedules=True)):
            row = _row(chip, "schedule", case, report)
            kernels = report.get("schedule", {})
            if case.program == "splash":
                row |= {"peer": "splash", "program": "forward", "tiles": list(case.tiles)}
                yield _counted(row, next(iter(kernels.values()), None), splash_counts(case))
                continue
            for blocks in config.blocks if case is lists else (0,):
                if blocks >= case.length // config.block:
                    continue
                of, every = (
                    attention_cases.listed_blocks(_listing(case, x), config.seed)
                    for x in (blocks, 0)
                )
                row |= {"blocks": blocks, "density": of / every}
                for name, counts in _KERNELS[program].items():
                    kernel = kernels.get(f"block_sparse_{name}")
                    yield _counted(
                        row | {"program": name}, kernel, counts(case, blocks, config.seed)
                    )


def _memory_rows(config: TpuScheduleConfig, chip: str) -> Iterator[Row]:
    cases = [
        TpuCase(
            CHIPS[chip],
            program,
            length,
            head_dim,
            num_heads=config.memory_heads,
            block=config.block,
            capacity=capacity,
        )
        for program in config.memory_programs
        for head_dim in config.memory_head_dims
        for length in config.memory_lengths
        for capacity in (0, config.memory_blocks)
    ]
    for case, report in zip(cases, compile_cases(cases)):
        yield _row(chip, "memory", case, report) | {"blocks": case.capacity}


def run(
    config: TpuScheduleConfig, report: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Compiles everything the config asks for.

    Args:
      config: chips and sizes.
      report: called with the result so far after each row.

    Returns:
      A JSON-ready dict: versions, date, config, seconds taken, and rows. A row holds part, chip,
      peer ('block_sparse' or 'splash'), program, length, head_dim, the bytes of arguments,
      results, temporaries and their peak, and seconds of compiling; of part 'schedule' also blocks
      and density (ours) or tiles (splash), parts (bundles of each part of the kernel), counts (how
      often each runs), bundles (their product, over all heads and cores), slots (the share of each
      unit's slots that the working part fills), and what `with_ratios` adds. A row that failed
      holds `error`, and None for what is missing.

    Raises:
      ImportError: there is no TPU compiler here.
    """
    if refused := compiler_refusal():
        raise ImportError(f"bench tpu-schedule compiles for TPUs: {refused}.")
    where = environment()
    result: dict[str, Any] = {
        "versions": where["versions"],
        "date": where["date"],
        "config": dataclasses.asdict(config),
    }
    of_part = {"schedule": _schedule_rows, "memory": _memory_rows}
    parts = (of_part[part](config, chip) for part in config.parts for chip in config.chips)

    def revise(result: dict[str, Any]) -> None:
        result["rows"] = with_ratios(result["rows"])

    return collect(result, itertools.chain.from_iterable(parts), report, revise)


def main(config: TpuScheduleConfig, out: Path) -> dict[str, Any]:
    """Runs the benchmark, prints each row and the table, and writes JSON and a plot beside it.

    The file is replaced after every row, so a run that is cut off keeps what it has.

    Args:
      config: see `run`.
      out: the JSON file to write; its folder is made. The plot gets its name with '.png'.

    Returns:
      The result of `run`.
    """
    return record(
        functools.partial(run, config), Path(out), describe=describe, table=table, plot=plot
    )
