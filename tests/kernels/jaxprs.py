"""What a traced function would hold and run."""

import math
from collections.abc import Iterator
from typing import Any

import jax


def _equations(closed: Any) -> Iterator[Any]:
    """Every equation of a jaxpr, inner functions included."""
    todo = [closed.jaxpr]
    while todo:
        for equation in todo.pop().eqns:
            yield equation
            for parameter in jax.tree.leaves(list(equation.params.values())):
                inner = getattr(parameter, "jaxpr", parameter)
                if hasattr(inner, "eqns"):
                    todo.append(inner)


def array_sizes(closed: Any) -> Iterator[int]:
    """Number of elements of every array that a jaxpr computes, inner functions included."""
    for equation in _equations(closed):
        yield from (variable.aval.size for variable in equation.outvars)


def _kernels(closed: Any) -> list[dict[str, Any]]:
    return [e.params for e in _equations(closed) if e.primitive.name == "pallas_call"]


def kernel_costs(closed: Any) -> list[Any]:
    """What each Pallas kernel of a jaxpr tells the compiler of its cost, None if nothing."""
    return [kernel["cost_estimate"] for kernel in _kernels(closed)]


def scalar_memory(closed: Any) -> list[int]:
    """Bytes of a TPU's scalar memory that each kernel of a jaxpr holds, two programs' at once."""
    of_kernels = ([v.aval for v in kernel["jaxpr"].invars] for kernel in _kernels(closed))
    return [
        sum(2 * 4 * math.prod(ref.shape) for ref in refs if str(ref.memory_space) == "smem")
        for refs in of_kernels
    ]
