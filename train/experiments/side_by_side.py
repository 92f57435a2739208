"""Tasks made side by side, each in a process of its own, spread over the GPUs there are."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import jax

# A process takes only the memory of a GPU that it needs, which leaves others theirs.
LITTLE_MEMORY = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class Task(NamedTuple):
    """What a process does.

    Attributes:
      name: names its log, and it to other tasks.
      call: what it calls; can be pickled.
      after: the task that must have ended before it begins; "" for none, and one that is not among
        the tasks counts as ended.
    """

    name: str
    call: Callable[[], Any]
    after: str = ""


def _enter(call: Callable[[], Any], log: str) -> None:
    """The child's work; everything it prints goes into its log."""
    with open(log, "a", buffering=1) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        call()


def _start(task: Task, log: Path) -> BaseProcess:
    """A new process that does the task."""
    process = multiprocessing.get_context("spawn").Process(
        target=_enter, args=(task.call, str(log))
    )
    process.start()
    return process


@contextlib.contextmanager
def environment_variables(**changed: str) -> Iterator[None]:
    """Environment variables as a device or process started inside finds them.

    >>> with environment_variables(SOME_NAME="a value"):
    ...     os.environ["SOME_NAME"]
    'a value'
    """
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """SIGTERM leaves by way of every `finally`; only the main thread may ask for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU; none where JAX runs on something else."""
    if jax.default_backend() != "gpu":
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(jax.local_device_count())]


def side_by_side(
    tasks: Sequence[Task],
    jobs: int,
    logs: Path,
    *,
    told: Callable[[str, int], None],
    seconds: float = 0.0,
) -> list[str]:
    r"""Makes the tasks in order, `jobs` at a time.

    Each new process gets the GPU with the fewest, and takes of its memory only what it needs. Equal
    programs are compiled once: the processes share a compilation cache, in `logs` unless
    JAX_COMPILATION_CACHE_DIR says where. When this is interrupted, they are ended with SIGTERM.

    Args:
      tasks: what to do.
      jobs: processes at a time.
      logs: the folder of what they print, NAME.txt.
      told: called with a task's name and exit status when it has ended.
      seconds: begin none later than this; 0 for no limit.

    Returns:
      The names of the tasks that were not begun.

    >>> import functools, tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> side_by_side([Task("hello", functools.partial(print, "hi"))], 1, folder, told=print)
    hello 0
    []
    >>> (folder / "hello.txt").read_text()
    'hi\n'
    """
    logs.mkdir(parents=True, exist_ok=True)
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(logs / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
    }
    shared = {name: os.environ.get(name, value) for name, value in (cache | LITTLE_MEMORY).items()}
    waiting = list(tasks)
    running: dict[str, tuple[BaseProcess, str]] = {}
    with environment_variables(**shared):
        gpus = _gpus()
    start = time.monotonic()
    with _exit_on_sigterm():
        try:
            while waiting or running:
                for name, (process, _) in list(running.items()):
                    if not process.is_alive():
                        process.join()
                        del running[name]
                        told(name, process.exitcode or 0)
                late = seconds and time.monotonic() - start > seconds
                if late and not running:
                    break
                not_ended = {task.name for task in waiting} | set(running)
                ready = [task for task in waiting if task.after not in not_ended]
                for task in [] if late else ready[: jobs - len(running)]:
                    waiting.remove(task)
                    used = [gpu for _, gpu in running.values()]
                    gpu = min(gpus, key=used.count, default="")
                    own = {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
                    with environment_variables(**shared, **own):
                        running[task.name] = _start(task, logs / f"{task.name}.txt"), gpu
                time.sleep(0.05)
        finally:
            for process, _ in running.values():
                process.terminate()
            for process, _ in running.values():
                process.join()
    return [task.name for task in waiting]
