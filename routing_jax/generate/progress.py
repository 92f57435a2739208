"""A bar on the terminal while a prompt is read."""

import sys
from typing import Any, Self


class PrefillBar:
    """Layers done, on the error stream if that is a terminal; gone when all are.

    >>> with PrefillBar() as bar:
    ...     bar.show(1, 2)
    """

    def __init__(self):
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

            self._bar = Progress(
                "reading the prompt",
                BarColumn(),
                MofNCompleteColumn(),
                "layers",
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("")

    def show(self, done: int, layers: int) -> None:
        """Reports so many layers done."""
        if self._bar is None:
            return
        if done < layers:
            self._bar.update(self._task, completed=done, total=layers)
            self._bar.start()
        else:
            self._bar.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
