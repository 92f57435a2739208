"""Where a run's numbers go: `metrics.jsonl`, TensorBoard events, and the terminal."""

import json
import sys
from typing import Any, Self

from etils import epath


class MetricsWriter:
    """Appends rows of scalars to DIR/metrics.jsonl and to TensorBoard events.

    A resumed run drops the rows after the step it resumes from, so that the file reads as if it
    had never stopped. Object stores cannot append: there, rows are written at every `flush`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, MetricsWriter(folder) as writer:
    ...     writer.write(1, {"loss": 0.5})
    ...     read_metrics(folder)
    [{'step': 1, 'loss': 0.5}]
    """

    def __init__(self, workdir: str | epath.Path, resume_step: int = 0):
        # Takes a second to import, which a command that writes no metrics should not spend.
        from tensorboardX import SummaryWriter

        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._remote = "://" in str(workdir)
        self._rows = [row for row in read_metrics(workdir) if row["step"] <= resume_step]
        self._path.write_text("".join(json.dumps(row) + "\n" for row in self._rows))
        self._file = None if self._remote else open(self._path, "a", buffering=1)  # noqa: SIM115
        self._events = SummaryWriter(
            str(epath.Path(workdir) / "tensorboard"), purge_step=resume_step + 1
        )

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Adds one row; lists go to the file whole and to TensorBoard element by element."""
        row = {"step": step, **values}
        if self._file is None:
            self._rows.append(row)
        else:
            self._file.write(json.dumps(row) + "\n")
        for name, value in values.items():
            if isinstance(value, list):
                for i, item in enumerate(value):
                    self._events.add_scalar(f"{name}/{i}", item, step)
            elif isinstance(value, (int, float)):
                self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Makes everything written so far visible to readers."""
        self._events.flush()
        if self._file is None:
            self._path.write_text("".join(json.dumps(row) + "\n" for row in self._rows))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        self._events.close()
        if self._file is not None:
            self._file.close()


def read_metrics(workdir: str | epath.Path) -> list[dict[str, Any]]:
    """The rows of DIR/metrics.jsonl; none if there is no such file. A torn last line is dropped."""
    path = epath.Path(workdir) / "metrics.jsonl"
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


class Progress:
    """A bar on a terminal, plain lines elsewhere; silent on all processes but the first.

    The bar's total is the most steps there can be: a run whose phase 1 ends early ends early.
    """

    def __init__(self, max_steps: int, start: int = 0, quiet: bool = False):
        self._bar: Any = None
        self._quiet = quiet
        if not quiet and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
            )
            self._task = self._bar.add_task("", total=max_steps, completed=start)

    def show(self, step: int, values: dict[str, Any], seconds: float) -> None:
        """Reports one logged step."""
        text = (
            f"length {values['length']:5d}  loss {values['loss']:.4f}  "
            f"accuracy {values['accuracy']:7.2%}  λ {values['lambda']:.3f}  "
            f"usage {values['usage']:8.3%}  cost {values['cost']:.4f}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif not self._quiet:
            print(f"step {step:6d}  {text}  {seconds:6.1f} s", flush=True)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
