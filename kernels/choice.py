"""Which implementation of a kernel runs a call."""

from collections.abc import Callable, Sequence
from typing import Protocol


class Named(Protocol):
    """Anything with a name that callers can ask for."""

    @property
    def name(self) -> str:
        """What callers name it by."""


def choose[Candidate: Named](
    wanted: str | None,
    candidates: Sequence[Candidate],
    refusal: Callable[[Candidate], str | None],
) -> Candidate:
    """The candidate that is named, or the first that supports the call.

    Args:
      wanted: a candidate's name, or None for the first that can.
      candidates: in the order in which they are tried; at least one supports every call.
      refusal: a candidate to None, or to why it does not support this call.

    Raises:
      ValueError: no candidate has that name.
      NotImplementedError: the named one does not support this call; says why, and which do.

    >>> from collections import namedtuple
    >>> Kernel = namedtuple("Kernel", ["name", "limit"])
    >>> kernels = Kernel("fast", 8), Kernel("plain", 999)
    >>> choose(None, kernels, lambda one: "it is large" if one.limit < 64 else None).name
    'plain'
    """
    refusals = {one.name: refusal(one) for one in candidates}
    able = [one for one in candidates if refusals[one.name] is None]
    if wanted is None:
        return able[0]
    named = [one for one in candidates if one.name == wanted]
    if not named:
        raise ValueError(f"implementation must be None or one of {[*refusals]}; it is {wanted!r}.")
    if refusals[wanted] is not None:
        raise NotImplementedError(
            f"implementation={wanted!r} cannot run this call: {refusals[wanted]}; "
            f"{' and '.join(one.name for one in able)} can."
        )
    return named[0]
