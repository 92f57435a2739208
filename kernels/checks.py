"""What every kernel's front door checks: shapes by letter, dtypes, and values where known."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

# Whether traced values are checked; jit traces anew where it differs.
_checks_traced = jax.make_user_context(False)
_FLOATS = ("bfloat16", "float16", "float32")


def match_shape(
    name: str, array: jax.Array, letters: str, sizes: Mapping[str, int]
) -> dict[str, int]:
    """Checks a shape against the sizes that its letters already have, and learns the new ones.

    Args:
      name: what the caller calls the array.
      array: the array.
      letters: one letter a dimension, such as 'BTNH'.
      sizes: the sizes known so far, by letter.

    Returns:
      `sizes` with the letters that this array adds.

    Raises:
      ValueError: another rank, or a dimension that differs from its letter's size or is 0.

    >>> match_shape("k", jnp.ones((2, 8, 1, 4)), "BSKH", {"B": 2, "H": 4})
    {'B': 2, 'H': 4, 'S': 8, 'K': 1}
    """
    shape = jnp.shape(array)
    expected = "(" + ", ".join(str(sizes.get(letter, letter)) for letter in letters) + ")"
    fits = len(shape) == len(letters) and all(
        size > 0 and sizes.get(letter, size) == size for letter, size in zip(letters, shape)
    )
    if not fits:
        dims = ",".join(letters)
        raise ValueError(f"{name} [{dims}] must have shape {expected}; it has shape {shape}.")
    return {**sizes, **dict(zip(letters, shape))}


def check_dtype(name: str, array: jax.Array, accepted: Sequence[str]) -> None:
    """Refuses an array whose dtype is not among those accepted.

    Args:
      name: what the caller calls the array.
      array: the array.
      accepted: dtype names.

    Raises:
      ValueError: the dtype is another.

    >>> check_dtype("counts", jnp.zeros(3, jnp.int32), ("int32",))
    """
    dtype = jnp.result_type(array).name
    if dtype not in accepted:
        raise ValueError(f"{name} must have dtype {' or '.join(accepted)}; it has {dtype}.")


def check_same_floats(arrays: Mapping[str, jax.Array]) -> None:
    """Refuses arrays that are not all bfloat16, all float16 or all float32.

    Args:
      arrays: by the caller's names.

    Raises:
      ValueError: a dtype that is not supported, or two that differ.

    >>> check_same_floats({"q": jnp.ones(3), "k": jnp.ones(3, jnp.bfloat16)})
    Traceback (most recent call last):
    ...
    ValueError: k must have dtype float32; it has bfloat16.
    """
    accepted: tuple[str, ...] = _FLOATS
    for name, array in arrays.items():
        check_dtype(name, array, accepted)
        accepted = (jnp.result_type(array).name,)


def check_head_groups(name: str, q: jax.Array, k: jax.Array, axis: int = -2) -> None:
    """Refuses kv heads that do not divide the query heads.

    Args:
      name: what the caller calls k.
      q: [...,N,H].
      k: [...,K,H].
      axis: where K stands in k, if it stands elsewhere.

    Raises:
      ValueError: N is not a multiple of K.

    >>> check_head_groups("k", jnp.ones((1, 8, 6, 4)), jnp.ones((1, 8, 2, 4)))
    """
    if q.shape[-2] % k.shape[axis]:
        raise ValueError(
            f"q's heads N must be a multiple of {name}'s heads K; q has shape {q.shape}, "
            f"{name} has shape {k.shape}."
        )


def check_bias(bias: jax.Array, letters: str, shape: tuple[int, ...]) -> jax.Array:
    """Checks a block bias and broadcasts it over sequences and heads.

    Args:
      bias: floats.
      letters: one letter a dimension; B and K may be 1.
      shape: the full shape.

    Returns:
      The bias in the full shape.

    Raises:
      ValueError: a dtype or shape that does not fit.

    >>> check_bias(jnp.ones((1, 1, 3)), "BKC", (2, 4, 3)).shape
    (2, 4, 3)
    """
    check_dtype("block_bias", bias, _FLOATS)
    fits = bias.ndim == len(shape) and all(
        have == want or (have == 1 and letter in "BK")
        for have, want, letter in zip(bias.shape, shape, letters)
    )
    if not fits:
        raise ValueError(
            f"block_bias [{','.join(letters)}] must have shape {shape}, or 1 for B or K; "
            f"it has shape {bias.shape}."
        )
    return jnp.broadcast_to(bias, shape)


def resolve_scale(scale: float | None, head_dim: int) -> float:
    """The factor of the logits: what the caller gave, or 1/√H.

    Args:
      scale: a Python number or None.
      head_dim: H.

    Raises:
      ValueError: something else, such as an array, or a number that is not finite.

    >>> resolve_scale(None, 64)
    0.125
    """
    if scale is None:
        return head_dim**-0.5
    if not isinstance(scale, int | float | np.number) or not np.isfinite(scale):
        raise ValueError(f"scale must be a finite Python number; it is {scale!r}.")
    return float(scale)


def values_to_check(*arrays: jax.Array) -> tuple[Any, list[Any]] | None:
    """The arrays, if their values are looked at, and the module to compute with.

    Values are unknown while an array is traced or partly on another host, and are then looked at
    under `checked` only: nothing is computed that nobody asked for.

    Args:
      arrays: any arrays.

    Returns:
      numpy and numpy arrays where all values are known; else under `checked` jax.numpy and the
      arrays as they came, elsewhere None.

    >>> xp, (x,) = values_to_check(jnp.arange(3))
    >>> xp.__name__, type(x).__name__
    ('numpy', 'ndarray')
    """
    known = not any(
        isinstance(x, jax.core.Tracer) or (isinstance(x, jax.Array) and not x.is_fully_addressable)
        for x in arrays
    )
    if known:
        return np, [np.asarray(x) for x in arrays]
    return (jnp, list(arrays)) if _checks_traced.value else None


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its traced values checked too, as `checkify.checkify` has its own checks.

    Elsewhere traced values are not looked at: a check that nobody asked for would leave an effect
    in the program, and JAX dispatches programs with effects in Python, milliseconds a call where
    there are hundreds of arrays.

    Args:
      function: whatever calls kernels or models; what it returns may be jitted.

    Returns:
      a function that returns (checkify's error, what `function` returns); `error.throw()` raises
      what a check found.

    >>> def first(x):
    ...     if found := values_to_check(x):
    ...         refuse_rows(found[1][0] > 3, "x must be at most 3", str)
    ...     return x[0]
    >>> error, _ = jax.jit(checked(first))(jnp.array([1, 4]))
    >>> error.get().splitlines()[0]
    'x must be at most 3; some row breaks this. (`check` failed)'
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> tuple[checkify.Error, Any]:
        with _checks_traced(True):
            return checkify.checkify(function, errors=checkify.user_checks)(*args, **kwargs)

    return run


def refuse_rows(bad: Any, sentence: str, describe: Callable[[tuple[int, ...]], str]) -> None:
    """Refuses the call if a row is marked bad: at once, or by checkify while it is traced.

    Args:
      bad: bool, one a row, made of `values_to_check`: numpy's if known, jax's if traced.
      sentence: what must hold.
      describe: a row's place to what it holds, for known values.

    Raises:
      ValueError: a known row is bad.

    >>> refuse_rows(np.array([False, True]), "rows must be short", lambda row: "is long")
    Traceback (most recent call last):
    ...
    ValueError: rows must be short; row (1,) is long.
    """
    if not isinstance(bad, np.ndarray):
        checkify.debug_check(~bad.any(), f"{sentence}; some row breaks this.")
    elif bad.any():
        row = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"{sentence}; row {row} {describe(row)}.")
