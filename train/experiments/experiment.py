"""What all experiments share: runs by name, made once, in pieces if need be."""

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from etils import epath

from routing_jax.evals.results import Result, load_results, result_path, write_result
from routing_jax.train.config import TrainConfig
from routing_jax.train.experiments.side_by_side import (
    LITTLE_MEMORY,
    Task,
    environment_variables,
    side_by_side,
)
from routing_jax.train.run import read_config, run


@dataclass(frozen=True)
class ReproduceArgs:
    """Run an experiment, or what is missing of it, then render its table and plots.

    Attributes:
      out: results folder; a run's result is OUT/EXPERIMENT/TASK_VARIANT_sSEED.json.
      scratch: folder for checkpoints and logs of the runs.
      only: run only those whose name TASK_VARIANT_sSEED matches this regular expression.
      max_minutes: start no further run after so many minutes; 0 for no limit.
      list: print the runs and stop.
      jobs: runs made side by side, each in a process of its own, spread over the GPUs there are;
        what they print goes into SCRATCH/EXPERIMENT/logs.
    """

    out: str = "evals/results"
    scratch: str = "runs/reproduce"
    only: str = ""
    max_minutes: float = 0.0
    list: bool = False
    jobs: int = 1

    def __post_init__(self):
        if self.jobs < 1:
            raise ValueError(f"jobs is {self.jobs}; it must be at least 1.")
        if self.jobs > 1 and "://" in self.scratch:
            raise ValueError(
                f"scratch is {self.scratch!r}; with several jobs it must be a folder of this "
                "machine."
            )


class Run(NamedTuple):
    """One run of an experiment."""

    task: str
    variant: str
    seed: int
    config: TrainConfig

    @property
    def name(self) -> str:
        """TASK_VARIANT_sSEED, the name of its files."""
        return f"{self.task}_{self.variant}_s{self.seed}"


def train_run(experiment: str, one: Run, workdir: epath.Path, *, timed: bool = True) -> Result:
    """Trains a run, or what an interruption left of it, and evaluates it.

    Args:
      experiment: the folder of its result.
      one: the run.
      workdir: its folder.
      timed: whether its mixing is timed.

    Raises:
      ValueError: the workdir holds a run with another configuration.
    """
    _refuse_another(one, workdir)
    labels = {"experiment": experiment, "task": one.task, "variant": one.variant}
    return run(one.config, workdir, resume=True, labels=labels, timed=timed)


def _refuse_another(one: Run, workdir: epath.Path) -> None:
    if (workdir / "config.json").exists() and read_config(workdir) != one.config:
        raise ValueError(
            f"{workdir} holds a run with another configuration; remove it, or give another "
            "--scratch."
        )


def wanted_runs(args: ReproduceArgs, planned: Iterable[Run]) -> list[Run]:
    """The planned runs that `only` names.

    Args:
      args: see the class.
      planned: all runs of the experiment.

    Raises:
      ValueError: `only` is no regular expression or names no run.
    """
    try:
        pattern = re.compile(args.only)
    except re.error as e:
        raise ValueError(f"only is {args.only!r}, which is no regular expression: {e}.") from e
    wanted = [r for r in planned if pattern.search(r.name)]
    if not wanted:
        raise ValueError(f"only is {args.only!r}, which names no run; --list shows them all.")
    return wanted


def _with_starts(missing: Sequence[Run], planned: Sequence[Run], folder: epath.Path) -> list[Run]:
    """The missing runs and, before them, those they go on from that are not in the folder.

    Raises:
      ValueError: what one goes on from is there, but of another text or other settings.
    """
    plan = {r.name: r for r in planned}
    made = {r.name: r for r in missing}
    todo = list(missing)
    while todo:
        before = plan.get(epath.Path(todo.pop().config.start_from).name)
        if before is None or before.name in made:
            continue
        _refuse_another(before, folder / before.name)
        if not (folder / before.name / "result.json").exists():
            made[before.name] = before
            todo.append(before)
    return [r for name, r in plan.items() if name in made]


def _as_it_is(run: Run, result: Result, workdir: epath.Path) -> Result:
    """The result with nothing added."""
    del run, workdir
    return result


def make_missing(
    experiment: str,
    args: ReproduceArgs,
    planned: Iterable[Run],
    finish: Callable[[Run, Result, epath.Path], Result] = _as_it_is,
    make: Callable[[str, Run, epath.Path], Result] | None = None,
) -> list[Result]:
    """Makes every missing run that `only` names, and first what it goes on from.

    A run that others go on from is made again where its folder is lost; its result stays.

    Args:
      experiment: the folder of the results.
      args: which runs, and where they go; with several jobs their mixing is not timed.
      planned: all runs of the experiment.
      finish: (run, its result, its workdir) -> the result to write, with what only this experiment
        measures; can be pickled.
      make: (experiment, run, its workdir) -> its result, without `mixing_ms` where runs share a
        device; can be pickled. `train_run` when None.

    Returns:
      All results there are, to be rendered; none when the runs were only to be listed.

    Raises:
      ValueError: as `wanted_runs` and `train_run`.
      RuntimeError: with several jobs, some of them failed; they and their logs are named.
    """
    alone = args.jobs == 1
    # Planning counts parameters, which starts the device: its memory is for the runs.
    with environment_variables(**({} if alone else LITTLE_MEMORY)):
        planned = list(planned)
    wanted = wanted_runs(args, planned)
    paths = [result_path(args.out, experiment, r.task, r.variant, r.seed) for r in wanted]
    if args.list:
        for r, path in zip(wanted, paths):
            print(f"{r.name:<44} {'done' if path.exists() else ''}")
        return []
    folder = epath.Path(args.scratch) / experiment
    missing = _with_starts([r for r, p in zip(wanted, paths) if not p.exists()], planned, folder)
    make = make or functools.partial(train_run, timed=alone)
    one = functools.partial(_make_one, experiment, args.out, folder, make, finish)
    (_make_in_turn if alone else _make_side_by_side)(missing, one, args, folder)
    return load_results(args.out, experiment)


def _make_one(
    experiment: str,
    out: str,
    folder: epath.Path,
    make: Callable[[str, Run, epath.Path], Result],
    finish: Callable[[Run, Result, epath.Path], Result],
    r: Run,
) -> None:
    """Makes a run, or the rest of it, and writes its result."""
    print(f"== {r.name}", flush=True)
    workdir = folder / r.name
    result = finish(r, make(experiment, r, workdir), workdir)
    path = result_path(out, experiment, r.task, r.variant, r.seed)
    if not path.exists():  # it was made again for what goes on from it
        write_result(_without_scratch(result, folder), path)
    print(
        f"== {r.name}: loss {result.loss:.4f}, accuracy {result.accuracy:.3%}, usage "
        f"{result.usage:.4%}, cost {result.cost:.4f}, kv cost {result.kv_cost:.4f}, "
        f"{result.minutes:.1f} minutes",
        flush=True,
    )


def _without_scratch(result: Result, folder: epath.Path) -> Result:
    """The result, naming the run that it went on from and not where that once stood."""
    before = epath.Path(result.config.get("start_from", ""))
    if before.parent != folder:
        return result
    return dataclasses.replace(result, config=result.config | {"start_from": before.name})


def _make_in_turn(
    missing: Sequence[Run], one: Callable[[Run], None], args: ReproduceArgs, folder: epath.Path
) -> None:
    del folder
    started = time.time()
    for r in missing:
        if args.max_minutes and time.time() - started > 60 * args.max_minutes:
            print(f"stopped before {r.name}: {args.max_minutes} minutes are over")
            break
        one(r)


def _make_side_by_side(
    missing: Sequence[Run], one: Callable[[Run], None], args: ReproduceArgs, folder: epath.Path
) -> None:
    logs, failed = Path(folder / "logs"), []

    def told(name: str, status: int) -> None:
        text = (logs / f"{name}.txt").read_text().strip()
        print(text.split("\n")[-1] if text else f"== {name}", flush=True)
        if status:
            failed.append(name)

    tasks = [
        Task(r.name, functools.partial(one, r), epath.Path(r.config.start_from).name)
        for r in missing
    ]
    left = side_by_side(tasks, args.jobs, logs, told=told, seconds=60 * args.max_minutes)
    if left:
        print(f"stopped before {', '.join(left)}: {args.max_minutes} minutes are over")
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(missing)} runs failed: {', '.join(failed)}; what they printed "
            f"is in {logs}."
        )
