"""`routing-jax train PRESET --workdir DIR --any.field value`; `python -m routing_jax.train` too."""

import contextlib
import io
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

import routing_jax
from routing_jax.checkpoint import CheckpointError
from routing_jax.evals.results import Result
from routing_jax.train.config import TrainConfig
from routing_jax.train.loop import Interrupted
from routing_jax.train.presets import PRESETS, get_preset
from routing_jax.train.run import run

EXIT_BAD_INPUT = 2
EXIT_SIGTERM = 143


@dataclass(frozen=True)
class TrainArgs:
    """Train a preset, with any field changed.

    Attributes:
      config: the run.
      workdir: folder for checkpoints, metrics, plots and the result; may be gs://.
      resume: go on from the newest checkpoint in the folder.
      resume_step: go on from this checkpoint.
      distributed: join the other processes of this run first. On a TPU slice or under Slurm they
        are found by themselves; elsewhere give the next three as well.
      coordinator_address: HOST:PORT of process 0.
      num_processes: of the run.
      process_id: of this process, from 0.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    workdir: str
    resume: bool = False
    resume_step: int | None = None
    distributed: bool = False
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def __post_init__(self):
        given = (self.coordinator_address, self.num_processes, self.process_id)
        if given == (None, None, None):
            return
        if not self.distributed:
            raise ValueError(
                "coordinator_address, num_processes and process_id are given without distributed, "
                "which they need."
            )
        if None in given:
            raise ValueError(
                "coordinator_address, num_processes and process_id are "
                f"{', '.join(map(repr, given))}; give all three or none."
            )


def parse[T](kind: type[T], args: Sequence[str], prog: str, default: T | None = None) -> T:
    """Parses command-line flags into a dataclass; help comes from the fields' docstrings.

    Raises:
      ValueError: what tyro has to say about a bad flag, as one sentence.
    """
    config = (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            if default is None:
                return tyro.cli(kind, args=list(args), prog=prog, config=config)
            return tyro.cli(kind, args=list(args), prog=prog, default=default, config=config)
    except SystemExit as e:
        if not e.code:
            raise
        raise ValueError(_one_sentence(said.getvalue())) from None


def _one_sentence(box: str) -> str:
    """What the first part of tyro's box says, and the flags that it suggests instead."""
    bare = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│╭╮╰╯ ") for line in box.splitlines()]
    # The first line is a title; rules between parts are of hyphens where the terminal is ASCII.
    parts = re.split(r"\s*[─-]{8,}\s*", " ".join(" ".join(line.split()) for line in bare[1:]))
    parts = [part for part in parts if part]
    # Our own sentences name the field; tyro's prefix says where it was built.
    sentence = re.sub(r"^Error parsing (config(\.\w+)*|\w+Args): ", "", parts[0]).rstrip(".")
    for part in parts[1:]:
        if part.startswith("Perhaps you meant"):
            sentence += f"; perhaps you meant {' or '.join(re.findall(r'--[a-z][a-z.-]*', part))}"
    return sentence + "."


def train_command(args: Sequence[str]) -> int:
    """Runs `train PRESET --flags`; returns the exit code."""
    if not args or args[0] in ("-h", "--help"):
        print(
            "usage: routing-jax train PRESET --workdir DIR [--any.field value]\n\n"
            f"presets: {', '.join(PRESETS)}\n\n"
            "`routing-jax train PRESET --help` explains every field with the preset's value."
        )
        return 0 if args else EXIT_BAD_INPUT
    preset = args[0]
    config = get_preset(preset)
    missing: Any = tyro.MISSING
    parsed = parse(
        TrainArgs, args[1:], f"routing-jax train {preset}", TrainArgs(config, workdir=missing)
    )
    if parsed.distributed:
        jax.distributed.initialize(
            parsed.coordinator_address, parsed.num_processes, parsed.process_id
        )
    with step_flag("--resume-step"):
        result = run(
            parsed.config,
            parsed.workdir,
            resume=parsed.resume,
            resume_step=parsed.resume_step,
            labels={"experiment": "train", "task": preset, "variant": "run"},
        )
    if jax.process_index() == 0:
        print(result_table(result, parsed.workdir))
    return 0


@contextlib.contextmanager
def step_flag(flag: str) -> Iterator[None]:
    """Says which of a command's flags takes the step that stands in for a damaged one.

    >>> with step_flag("--step"):
    ...     raise CheckpointError("step 20 is damaged; the one of step 15 is intact", 15)
    Traceback (most recent call last):
    routing_jax.checkpoint.CheckpointError: ...; the one of step 15 is intact: pass --step 15
    """
    try:
        yield
    except CheckpointError as e:
        if e.intact is None:
            raise
        raise CheckpointError(f"{e}: pass {flag} {e.intact}", e.intact) from e


def result_table(result: Result, workdir: str) -> str:
    """The closing table of a run."""
    layers = result.config["model"]["layers"]
    rows = [("accuracy", f"{result.accuracy:.3%} of {result.sequences:,} held-out sequences")]
    if result.accuracy_first_place is not None:
        rows.append(("  pair at 0–1", f"{result.accuracy_first_place:.3%} (proves nothing alone)"))
    for task, told in (result.details or {}).get("tasks", {}).items():
        right = sum(told["right"]) / len(told["right"])
        rows.append((f"  {task}", f"{right:.3%} right, {told['sparsity']:.2%} of layers sparse"))
    if result.bits_per_byte is not None:
        rows.append(("bits per byte", f"{result.bits_per_byte:.4f}"))
    counted = "visible blocks visited" if "block" in layers else "tokens attend"
    counted = "layers attend fully" if "layer" in layers else counted
    usage = f"{result.usage:.4%} of {counted}"
    if result.least_usage:
        usage += f" = {result.usage / result.least_usage:.2f} × the least possible"
    per_layer = ", ".join(f"{u:.3%}" for u in result.usage_per_layer)
    rows += [
        ("usage", usage),
        ("  per layer", per_layer),
        ("cost", f"{result.cost:.4f} of full attention's multiply-adds, router included"),
        ("kv cost", f"{result.kv_cost:.4f} of dense multi-head attention's key/value bytes"),
        ("training", f"{result.steps:,} steps in {result.minutes:.1f} minutes on {result.device}"),
        ("in", workdir),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def guarded(command: Callable[[Sequence[str]], int], args: Sequence[str]) -> int:
    """Runs a command; a mistake in what it was given becomes one sentence and exit code 2.

    An error raised by this package's own checks, or by the operating system, is the user's to
    mend; anything else is a bug and keeps its traceback.
    """
    # A bucket's client logs, with its traceback, the error that it raises and that is told here.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    try:
        return command(args)
    except Interrupted as e:
        print(e, file=sys.stderr)
        return EXIT_SIGTERM
    except OSError as e:
        named = f"{e.filename} can't be used: {e.strerror}." if e.filename and e.strerror else e
        print(f"error: {named}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except (ValueError, ImportError, NotImplementedError) as e:
        if not _raised_here(e):
            raise
        print(f"error: {e}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _raised_here(error: BaseException) -> bool:
    """Whether the innermost frame of the error stands in this package."""
    root = Path(routing_jax.__file__).parent
    homes = {root.resolve()} | {(root / link).resolve() for link in ("kernels", "train", "evals")}
    frames = traceback.extract_tb(error.__traceback__)
    where = Path(frames[-1].filename).resolve()
    return any(where.is_relative_to(home) for home in homes)
