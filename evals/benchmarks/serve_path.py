"""A routed model's prefill and decode beside the same model dense with cuDNN's attention.

A composed one beside them is routed alike, and its layers that are not sparse search for blocks.
Layers are routed in a fixed pattern, with the routers' work in the times; weights are random.
Prefill is the whole path from tokens to logits: host loop, routers, tables, pages; before each
sample the last one's pages are given back. Prompts that one program reads, the dense side reads
by one, too. A sample of decoding is several steps, the choice of each token included. The router's
own time stands by itself, per layer.
"""

import concurrent.futures
import dataclasses
import gc
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from routing_jax.evals.benchmarks.environment import environment
from routing_jax.evals.benchmarks.running import Clock, collect, error_text, missing_word, record
from routing_jax.evals.benchmarks.serve_path_cases import (
    Size,
    decisions,
    dense_decode,
    dense_prefill,
    filled_cache,
    filled_memory,
    held_bytes,
    kv_bytes,
    random_model,
    serving,
)
from routing_jax.evals.benchmarks.serve_path_config import (
    PATTERNED,
    Part,
    ServePathConfig,
    Who,
    default_config,
)
from routing_jax.evals.benchmarks.serve_path_floors import FLOORS_OF, least_milliseconds
from routing_jax.evals.benchmarks.serve_path_report import Row, describe, table
from routing_jax.evals.benchmarks.timing import State, Timing, chained, time_program
from routing_jax.generate.layer import Params, layer_params, route_prompts
from routing_jax.generate.paged_decode import decode_tokens, read_tokens
from routing_jax.generate.paged_memory import PagedMemory, empty_memory, forget
from routing_jax.generate.paged_prefill import prefill_prompts, reads_at_once
from routing_jax.kernels import default_implementation
from routing_jax.models import DecoderConfig

__all__ = ["ServePathConfig", "default_config", "main", "run"]

_ROUTER_CALLS = 32  # chained in one program
_ROUTER_LAYERS = 4  # whose queries' weights together exceed a GPU's cache
# Of the device's memory, what a case may want; the rest is for what the estimate leaves out.
_SHARE_OF_MEMORY = 0.97


def _time(
    config: ServePathConfig,
    run: Callable[[], Any],
    calls: int = 1,
    prepare: Callable[[], Any] = lambda: None,
) -> Row:
    """Wall-clock of what `run` computes, by each of its calls; `prepare` comes before each run."""
    begun, samples = time.monotonic(), list[float]()
    while len(samples) < config.repeats:
        jax.block_until_ready(prepare())
        start = time.perf_counter()
        jax.block_until_ready(run())
        samples.append(time.perf_counter() - start)
        if config.row_seconds and time.monotonic() - begun > config.row_seconds:
            break
    low, median, high = (1000 / calls * np.percentile(samples, [25, 50, 75])).tolist()
    timing = Timing(round(median, 6), round(high - low, 6))
    return {**timing._asdict(), "samples": len(samples)}


def _tokens(config: ServePathConfig, batch: int, length: int) -> jax.Array:
    key = jax.random.key(config.seed)
    return jax.random.randint(key, (batch, length), 0, config.decoder.vocab_size)


def _memory(what: str) -> int | None:
    """What the device says of its memory; None where it says nothing."""
    return (jax.local_devices()[0].memory_stats() or {}).get(what)


def _time_router(config: ServePathConfig, size: Size, params: Params) -> Row:
    """One layer's router, from the layer's input to its decision; calls take layers in turn."""
    decoder = config.decoder
    lengths = jnp.full(size.batch, size.length, jnp.int32)

    def step(state: State) -> State:
        return state | {"y": route_prompts(decoder, state["weights"], state["x"], lengths)}

    def state(layer: int) -> State:
        own = layer_params(params, layer)
        return {
            "x": jnp.ones((size.batch, size.length, decoder.width), decoder.dtype),
            # Copies, since a state is given away.
            "weights": jax.tree.map(
                jnp.copy, {name: own[name] for name in ("mixer_norm", "mixer")}
            ),
            "y": jnp.zeros(size.batch, bool),
        }

    states = [state(layer) for layer in range(min(_ROUTER_LAYERS, len(decoder.mixers)))]
    program = chained(step, _ROUTER_CALLS).lower(states).compile()
    timing, _ = time_program(program, states, _ROUTER_CALLS, config.repeats, target_ms=20.0)
    return {**timing._asdict(), "samples": config.repeats, "kv_bytes": 0}


def _warming(model: DecoderConfig, tokens: jax.Array) -> int:
    """How many layers must read [B,T] tokens for all that a prefill runs to be compiled."""
    return len(model.mixers) if reads_at_once(model, tokens.shape[1]) else 1


def _time_prefill(config: ServePathConfig, size: Size, params: Params, who: Who) -> Row:
    """Prompts from tokens to logits; and the bytes of keys and values that they leave."""
    batch, length = size.batch, size.length
    decoder = config.model_of(who)
    sizes, decided = serving(config, size), jnp.array(decisions(config, size), jnp.int32)
    tokens = _tokens(config, batch, sizes.bucket(batch, length))
    if who == "dense":
        chunk = sizes.chunk_of(batch, length)
        if length % chunk:
            raise ValueError(f"length {length} is not a multiple of {chunk}, a chunk of prefill.")
        tokens, held = tokens[:, :length], 0

        def run(layers: int = len(decided)) -> Any:
            nonlocal held
            logits, cache = dense_prefill(decoder, params, tokens, chunk, layers)
            held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
            return logits

        jax.block_until_ready(run(_warming(decoder, tokens)))
        return {**_time(config, run), "kv_bytes": held}

    memory = empty_memory(decoder, sizes)
    rows, everyone = jnp.arange(batch, dtype=jnp.int32), jnp.ones(batch, bool)
    lengths = jnp.full(batch, length, jnp.int32)  # no room for more tokens, as on the dense side

    def run_paged(layers: int = len(decided)) -> Any:
        nonlocal memory
        logits, memory = prefill_prompts(
            decoder,
            sizes,
            params,
            decided[:layers],
            tokens,
            lengths,
            lengths,
            rows,
            memory,
        )
        return logits, memory

    def empty() -> PagedMemory:
        nonlocal memory
        memory = forget(memory, everyone)
        return memory

    jax.block_until_ready(run_paged(_warming(decoder, tokens)))
    return {**_time(config, run_paged, prepare=empty), "kv_bytes": held_bytes(memory)}


def _compile_decoding(config: ServePathConfig, params: Params, clock: Clock) -> None:
    """Compiles the decoding of all rows side by side, into JAX's compilation cache if it is set.

    Each is a program of all layers, and rows that compile their own one after another take most of
    the benchmark's time to do so. What can't be compiled, or has no room, says so in its row.
    """
    if not jax.config.jax_compilation_cache_dir:
        return

    def compile_one(size: Size, who: Who) -> None:
        clock.check()
        _check_room(config, "decode", size, who, params)
        decoder, tokens = config.model_of(who), jax.ShapeDtypeStruct((size.batch,), jnp.int32)
        if who == "dense":
            past = jax.eval_shape(lambda: filled_cache(config, size))
            dense_decode.lower(decoder, params, tokens, past).compile()
        else:
            sizes = serving(config, size)
            memory = jax.eval_shape(lambda: empty_memory(decoder, sizes))
            read_tokens.lower(decoder, sizes, params, tokens, memory).compile()

    rows = [(size, who) for part, size, who in _cases(config) if part == "decode"]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        concurrent.futures.wait([pool.submit(compile_one, *row) for row in rows])


def _time_decode(config: ServePathConfig, size: Size, params: Params, who: Who) -> Row:
    """A step of decoding; and the bytes of keys and values that are held."""
    decoder = config.model_of(who)
    tokens = _tokens(config, size.batch, 1)[:, 0]
    before = _memory("bytes_in_use")
    past: Any
    if who == "dense":
        past = filled_cache(config, size)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(past.layers))

        def step() -> Any:
            return dense_decode(decoder, params, tokens, past)
    else:
        sizes, past = serving(config, size), filled_memory(config, size, who)
        held = held_bytes(past)

        def step() -> Any:
            return decode_tokens(decoder, sizes, params, tokens, None, past)

    def run() -> Any:
        nonlocal tokens, past
        for _ in range(config.steps):
            tokens, past = step()
        return tokens, past

    jax.block_until_ready(run())
    now = _memory("bytes_in_use")
    taken = None if before is None or now is None else now - before
    return {**_time(config, run, config.steps), "kv_bytes": held, "device_bytes": taken}


def _check_room(config: ServePathConfig, part: Part, size: Size, who: Who, params: Params) -> None:
    """Refuses what the device has no memory for, before it is tried."""
    limit = _memory("bytes_limit")
    if not limit:
        return
    decoder = config.decoder
    width = 2 * decoder.width + 2 * (decoder.num_heads + decoder.num_kv_heads) * decoder.head_dim
    wanted = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    wanted += kv_bytes(config, size, who)
    if part == "prefill":
        wanted += size.batch * size.length * width * jnp.dtype(decoder.dtype).itemsize
    if wanted > _SHARE_OF_MEMORY * limit:
        raise MemoryError(
            f"skipped: it needs {wanted / 2**30:.1f} GiB, and there are {limit / 2**30:.1f}."
        )


def _cases(config: ServePathConfig) -> Iterator[tuple[Part, Size, Who]]:
    """All rows, those of a control last."""
    for group in ((*PATTERNED, "dense"), ("kernels",)):
        peers = [who for who in config.who if who in group]
        for length, part in itertools.product(config.lengths, config.parts):
            batches = config.decode_batches if part == "decode" else config.prefill_batches
            for batch, who in itertools.product(batches, peers):
                shares: tuple[float, ...] = (0.0,)
                if part == "router":
                    shares *= who == "routed"
                elif who in PATTERNED:
                    shares = config.sparse_shares
                yield from ((part, Size(batch, length, share), who) for share in shares)


def run(config: ServePathConfig, report: Callable[[dict[str, Any]], None] | None = None) -> dict:
    """Measures everything the config asks for.

    Args:
      config: the model's shape, sizes and timing.
      report: called with the result so far after each row.

    Returns:
      A JSON-ready dict: device, driver, versions, date, attention (the dense backend), config,
      seconds taken, and rows. A row holds part, who, length, batch, sparse_share, blocks (that a
      search finds) and channels (by which; both None where no layer searches), least (milliseconds
      that the device would take at least; None where that is not known), milliseconds and spread
      (interquartile range) of a prefill, of a step of decoding or of a layer's router, samples,
      how many were taken, and kv_bytes, of keys and values held, and of what pages are found by; a
      row that failed holds `error`, and None for the rest. device_bytes is by how much the
      device's memory in use grew for a row of decoding; None where it does not say. peak_bytes is
      the most that the device has held since the process began, weights included; None where an
      earlier row's was as much or the device does not say.
    """
    result = {
        **environment(),
        "attention": default_implementation(jnp.dtype(config.decoder.dtype)),
        "config": dataclasses.asdict(config),
    }
    return collect(result, _rows(config, floors=FLOORS_OF in result["device"]), report)


def _rows(config: ServePathConfig, *, floors: bool) -> Iterator[Row]:
    clock, params = Clock(config.seconds), random_model(config)
    _compile_decoding(config, params, clock)
    for part, size, who in _cases(config):
        row: Row = {"part": part, "who": who, **size._asdict(), "device_bytes": None}
        model = config.model_of(who)
        row |= {"blocks": None, "channels": None}
        if model.sparse.searches:
            channels = model.sparse.channels_of(model.head_dim)
            row |= {"blocks": config.blocks, "channels": channels}
        row["least"] = least_milliseconds(config, part, size, who) if floors else None
        before = _memory("peak_bytes_in_use")
        try:
            clock.check()
            _check_room(config, part, size, who, params)
            if part == "router":
                row |= _time_router(config, size, params)
            elif part == "prefill":
                row |= _time_prefill(config, size, params, who)
            else:
                row |= _time_decode(config, size, params, who)
            peak = _memory("peak_bytes_in_use")
            row["peak_bytes"] = peak if peak is not None and peak != before else None
        except Exception as error:  # one size that fails must not cost the others
            row |= dict.fromkeys(("milliseconds", "spread", "samples", "kv_bytes", "peak_bytes"))
            row["error"] = error_text(error)
        if "error" in row and missing_word(row) == "failed":
            gc.collect()  # the traceback may hold the row's arrays in a cycle
        yield row


def main(config: ServePathConfig, out: Path) -> dict[str, Any]:
    """Runs the benchmark, prints each row as it comes and the tables last, and writes JSON.

    Args:
      config: see `run`.
      out: the JSON file to write; its folder is made.

    Returns:
      The result of `run`.
    """

    def heading(result: dict[str, Any]) -> str:
        return f"{result['device']}: {config.model}, dense attention by {result['attention']}"

    return record(
        lambda report: run(config, report), out, describe=describe, table=table, heading=heading
    )
