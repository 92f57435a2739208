"""Where a run's numbers go: `metrics.jsonl`, TensorBoard events, and the terminal."""

import contextlib
import json
import sys
import time
from typing import Any, Self

from etils import epath

from routing_jax.files import write_whole


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
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import directory_check

        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._remote = "://" in str(workdir)
        self._rows = [row for row in read_metrics(workdir) if row["step"] <= resume_step]
        self._write_all()
        # Not tensorboardX's SummaryWriter: on a full disk its thread dies, and adding to its
        # queue then waits for ever.
        folder = str(epath.Path(workdir) / "tensorboard")
        directory_check(folder)
        self._events = EventsWriter(f"{folder}/events", f".{resume_step}")
        # TensorBoard hides what an earlier part of the run wrote from this step on.
        start = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(step=resume_step + 1, session_log=start))
        self._file = None if self._remote else open(self._path, "a", buffering=1)  # noqa: SIM115

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Adds one row; lists go to the file whole and to TensorBoard element by element.

        Raises:
          OSError: it can't be written; the file is named.
        """
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        row = {"step": step, **values}
        scalars: dict[str, float] = {}
        for name, value in values.items():
            if isinstance(value, list):
                scalars |= {f"{name}/{i}": item for i, item in enumerate(value)}
            else:
                scalars[name] = value
        summary = Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in scalars.items()])
        try:
            if self._file is None:
                self._rows.append(row)
            else:
                self._file.write(json.dumps(row) + "\n")
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(self._path)) from e

    def flush(self) -> None:
        """Makes everything written so far visible to readers.

        Raises:
          OSError: it can't be written; the file is named.
        """
        try:
            self._events.flush()
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(self._path.parent / "tensorboard")) from e
        if self._file is None:
            self._write_all()

    def _write_all(self) -> None:
        write_whole(self._path, "".join(json.dumps(row) + "\n" for row in self._rows))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Of two errors the first is the one to tell: closing a file on a full disk fails again.
        unsaid = () if kind is None else (OSError,)
        with contextlib.suppress(*unsaid):
            self.flush()
        for file in (self._events, self._file):
            with contextlib.suppress(*unsaid):
                if file is not None:
                    file.close()


def read_metrics(workdir: str | epath.Path) -> list[dict[str, Any]]:
    """The rows of DIR/metrics.jsonl; none if there is no such file. A torn last line is dropped.

    Raises:
      ValueError: another line is damaged; it is numbered.
    """
    path = epath.Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    # The last part is empty, or was being written when the run was killed.
    *lines, torn = path.read_bytes().split(b"\n")
    rows = [_row(line) for line in lines]
    if None in rows:
        raise ValueError(
            f"{path} is damaged in line {rows.index(None) + 1}, which is no row of a step; mend or "
            "remove that line."
        )
    return [row for row in (*rows, _row(torn)) if row is not None]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # no JSON, or no UTF-8
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


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
