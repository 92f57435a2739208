"""How tests compile."""

import jax


def compiled(function):
    """`jax.jit`; on a CPU it skips what takes the compiler longest, as each program runs once."""
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
    return jax.jit(function, compiler_options=quick)
