"""What every benchmark's run needs: a time limit, errors as text, results written whole."""

import json
import time
from pathlib import Path
from typing import Any

from routing_jax.files import write_whole


class Clock:
    """The time left of a budget; 0 seconds for no limit."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds if seconds else float("inf")
        self._seconds = seconds

    def check(self) -> None:
        """Raises TimeoutError, which says that something was skipped, once the time is spent."""
        if time.monotonic() > self._end:
            raise TimeoutError(f"skipped: the {self._seconds:g} s allowed were spent.")


def error_text(error: Exception) -> str:
    r"""A failure in one line, for a row.

    >>> error_text(MemoryError("too\nbig"))
    'MemoryError: too big'
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def write_json(result: dict[str, Any], out: Path) -> None:
    """Replaces `out` at once: a reader sees the old file or the new one, whole.

    Raises:
      OSError: it can't be written; the file is named.
    """
    write_whole(out, json.dumps(result, indent=1, allow_nan=False) + "\n")
