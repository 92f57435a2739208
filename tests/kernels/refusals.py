"""Bad input is refused alike, whichever implementation is named."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest


def check_refused_alike(
    call: Callable[..., Any], implementations: Sequence[Any], sentence: str, **changes: Any
) -> None:
    """`call` with the changes raises one and the same line, which matches `sentence`."""
    said = set()
    for implementation in (None, *(one.name for one in implementations)):
        with pytest.raises(ValueError, match=sentence) as refusal:
            call(**{"implementation": implementation} | changes)
        said.add(str(refusal.value))
    (same,) = said
    assert "\n" not in same
