"""A step that a benchmark times, and how: chained calls on inputs that outgrow the cache."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from routing_jax.evals.benchmarks.timing import State, Timing, chained, time_program

# What a call is expected to reach at best, to choose how many to chain: FLOPs and bytes a ms.
_FLOPS_PER_MS, _BYTES_PER_MS = 5e11, 2.5e9


class TimingConfig(Protocol):
    """The fields of a benchmark's config that say how programs are timed."""

    @property
    def repeats(self) -> int:
        """Samples that a measurement is the median of."""

    @property
    def chain(self) -> int:
        """Most calls in one compiled program."""

    @property
    def target_ms(self) -> float:
        """About how long a sample takes."""

    @property
    def cache_bytes(self) -> int:
        """Inputs are rotated among sets that together exceed this; 0 for one set."""

    @property
    def seed(self) -> int:
        """Of the inputs."""


class Program(NamedTuple):
    """One step of one peer.

    Attributes:
      peer: who does it.
      work: FLOPs or bytes of a call, which say how many to chain, and its rate; 0 where they say
        nothing.
      step: State -> State, with what it writes added or replaced.
      inputs: makes what the step reads from a seed.
      reads: bytes that a call reads; None for all of the inputs.
    """

    peer: str
    work: float
    step: Callable[[State], State]
    inputs: Callable[[int], State]
    reads: int | None = None

    def bytes_read(self) -> int:
        """`reads`, or the size of the inputs."""
        if self.reads is not None:
            return self.reads
        leaves = jax.tree.leaves(jax.eval_shape(self.inputs, 0))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    def state(self, seed: int) -> State:
        """Inputs, and room for the outputs: nan, which shows where a part is never written."""
        inputs = self.inputs(seed)
        written = jax.eval_shape(self.step, inputs)

        def fill(shape: jax.ShapeDtypeStruct) -> jax.Array:
            value = jnp.nan if jnp.issubdtype(shape.dtype, jnp.floating) else 0
            return jnp.full(shape.shape, value, shape.dtype)

        outputs = {name: leaf for name, leaf in written.items() if name not in inputs}
        return inputs | jax.tree.map(fill, outputs)


def differentiated(
    forward: Callable[[State], jax.Array], names: Sequence[str], state: State
) -> State:
    """The state with y and, as 'd' and a name, the gradient of y·dy by each named input it has.

    >>> state = {"x": jnp.float32(3), "dy": jnp.float32(2)}
    >>> float(differentiated(lambda state: state["x"] ** 2, ("x", "bias"), state)["dx"])
    12.0
    """
    inputs = {name: state[name] for name in names if name in state}
    y, vjp = jax.vjp(lambda inputs: forward(state | inputs), inputs)
    (gradients,) = vjp(state["dy"])
    return state | {"y": y} | {f"d{name}": leaf for name, leaf in gradients.items()}


def count_sets(config: TimingConfig, program: Program) -> int:
    """How many input sets together exceed the cache."""
    return 1 + config.cache_bytes // program.bytes_read()


def _calls(config: TimingConfig, program: Program, sets: int) -> int:
    """How many calls one compiled program chains: about `target_ms` of them."""
    expected = max(program.work / _FLOPS_PER_MS, program.bytes_read() / _BYTES_PER_MS)
    return -(-int(max(1, min(config.chain, config.target_ms / expected))) // sets) * sets


def compile_program(config: TimingConfig, program: Program) -> Callable:
    """The chained program, compiled for as many input sets as `measure` will give it."""
    sets = count_sets(config, program)
    shapes = [jax.eval_shape(lambda: program.state(0))] * sets
    return chained(program.step, _calls(config, program, sets)).lower(shapes).compile()


def measure(config: TimingConfig, program: Program, compiled: Callable) -> Timing:
    """Times what `compile_program` made of the program."""
    sets = count_sets(config, program)
    states = [program.state(config.seed + 10 * i) for i in range(sets)]
    calls = _calls(config, program, sets)
    return time_program(compiled, states, calls, config.repeats, config.target_ms)[0]
