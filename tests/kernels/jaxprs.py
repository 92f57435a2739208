"""What a traced function would hold."""

from collections.abc import Iterator
from typing import Any

import jax


def array_sizes(closed: Any) -> Iterator[int]:
    """Number of elements of every array that a jaxpr computes, inner functions included."""
    todo = [closed.jaxpr]
    while todo:
        for equation in todo.pop().eqns:
            yield from (variable.aval.size for variable in equation.outvars)
            for parameter in jax.tree.leaves(list(equation.params.values())):
                inner = getattr(parameter, "jaxpr", parameter)
                if hasattr(inner, "eqns"):
                    todo.append(inner)
