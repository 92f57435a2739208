"""Wall-clock of a whole model on the device: a pass over a batch, and decoding token by token."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from routing_jax.evals.benchmarks.timing import State, Timing, chained, time_program
from routing_jax.models import Decoder, DecoderConfig, init_cache, init_params

_REPEATS = 5
_TARGET_MS = 40.0  # of a sample


class ModelProgram(NamedTuple):
    """What is timed of a model.

    Attributes:
      step: State -> State; 'kv_cost' of what is returned adds that of the call to what was there,
        and 'y' holds its output.
      make: the first state, traceable.
      calls: of the step, chained in one program, so that neither dispatch nor what the compiler
        could hoist out of a call or drop of it counts.
    """

    step: Callable[[State], State]
    make: Callable[[], State]
    calls: int


class Compiled(NamedTuple):
    """A program's loop of calls, and what makes its first state."""

    program: ModelProgram
    run: Callable[[list[State]], list[State]]
    make: Callable[[], State]


def forward_program(config: DecoderConfig, tokens: Any, calls: int = 20) -> ModelProgram:
    """A pass in mode 'eval', which skips what is not routed, by a model as initialised.

    Args:
      config: the model.
      tokens: [B,T] int32.
      calls: chained.
    """
    model = Decoder(config)

    def step(state: State) -> State:
        out: Any = model.apply({"params": state["params"]}, state["tokens"], mode="eval")
        return state | {"y": out.logits, "kv_cost": state["kv_cost"] + out.reports.kv_cost.mean()}

    def make() -> State:
        return {
            "params": init_params(config, jax.random.key(0)),
            "tokens": jnp.asarray(tokens),
            "y": jnp.zeros((*tokens.shape, config.vocab_size)),
            "kv_cost": jnp.float32(0),
        }

    return ModelProgram(step, make, calls)


def decode_program(
    config: DecoderConfig, tokens: Any, length: int, calls: int = 64
) -> ModelProgram:
    """Decoding the last tokens of a sequence one by one, by a model as initialised.

    What came before them is a cache of zeros, which takes as long to read as any other. Weights
    are in the compute dtype, so that casting them does not count.

    Args:
      config: the model.
      tokens: [·] int32, those that are read; taken in turn.
      length: S, what the cache holds at the end.
      calls: tokens decoded, chained; then the cache is what it was at first.
    """
    if config.learned_positions:
        config = config.replace(learned_positions=max(config.learned_positions, length))
    model, start = Decoder(config), length - calls

    def step(state: State) -> State:
        at = state["cache"].lengths
        token = state["tokens"][(at - start) % tokens.size]
        out: Any = model.apply(
            {"params": state["params"]}, token[:, None], cache=state["cache"], mode="decode"
        )
        ended = out.cache.lengths == length
        cache = out.cache._replace(lengths=jnp.where(ended, start, out.cache.lengths))
        kv_cost = state["kv_cost"] + out.reports.kv_cost.mean()
        return state | {"cache": cache, "y": out.logits, "kv_cost": kv_cost}

    def make() -> State:
        params = init_params(config, jax.random.key(0))
        return {
            "params": jax.tree.map(lambda x: x.astype(config.dtype), params),
            "tokens": jnp.asarray(tokens).ravel(),
            "cache": init_cache(config, 1, length)._replace(lengths=jnp.array([start])),
            "y": jnp.zeros((1, 1, config.vocab_size)),
            "kv_cost": jnp.float32(0),
        }

    return ModelProgram(step, make, calls)


def compile_program(program: ModelProgram) -> Compiled:
    """The program's loop, and the making of its first state, compiled."""
    shapes = jax.eval_shape(program.make)
    return Compiled(
        program,
        chained(program.step, program.calls).lower([shapes]).compile(),
        jax.jit(program.make).lower().compile(),
    )


def time_model(compiled: Compiled) -> tuple[Timing, float]:
    """Milliseconds of one call, and the mean `kv_cost` of all.

    Args:
      compiled: from `compile_program`.

    >>> config = DecoderConfig(width=8, head_dim=8, mlp_width=0, layers="full")
    >>> program = forward_program(config, jnp.zeros((1, 4), jnp.int32), calls=2)
    >>> timing, kv_cost = time_model(compile_program(program))
    >>> timing.milliseconds > 0, kv_cost
    (True, 1.0)
    """
    program, runs = compiled.program, 0

    def run(sets: list[State]) -> list[State]:
        nonlocal runs
        runs += 1
        return compiled.run(sets)

    timing, (state,) = time_program(run, [compiled.make()], program.calls, _REPEATS, _TARGET_MS)
    return timing, float(state["kv_cost"]) / (runs * program.calls)
