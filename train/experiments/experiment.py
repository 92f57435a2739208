"""What all experiments share: runs by name, made once, in pieces if need be."""

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from etils import epath

from routing_jax.evals.results import Result, load_results, result_path, write_result
from routing_jax.train.config import TrainConfig
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
    """

    out: str = "evals/results"
    scratch: str = "runs/reproduce"
    only: str = ""
    max_minutes: float = 0.0
    list: bool = False


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


def train_run(experiment: str, one: Run, workdir: epath.Path) -> Result:
    """Trains a run, or what an interruption left of it, and evaluates it.

    Raises:
      ValueError: the workdir holds an unfinished run with another configuration.
    """
    if (workdir / "config.json").exists() and read_config(workdir) != one.config:
        raise ValueError(
            f"{workdir} holds an unfinished run with another configuration; remove it, or give "
            "another --scratch."
        )
    labels = {"experiment": experiment, "task": one.task, "variant": one.variant}
    return run(one.config, workdir, resume=True, labels=labels)


def make_missing(
    experiment: str,
    args: ReproduceArgs,
    planned: Iterable[Run],
    finish: Callable[[Run, Result, epath.Path], Result] = lambda run, result, workdir: result,
    make: Callable[[str, Run, epath.Path], Result] = train_run,
) -> list[Result]:
    """Makes every missing run that `only` names.

    Args:
      experiment: the folder of the results.
      args: which runs, and where they go.
      planned: all runs of the experiment.
      finish: (run, its result, its workdir) -> the result to write, with what only this experiment
        measures.
      make: (experiment, run, its workdir) -> its result.

    Returns:
      All results there are, to be rendered; none when the runs were only to be listed.

    Raises:
      ValueError: `only` is no regular expression or names no run, or a workdir holds an unfinished
        run with another configuration.
    """
    try:
        pattern = re.compile(args.only)
    except re.error as e:
        raise ValueError(f"only is {args.only!r}, which is no regular expression: {e}.") from e
    wanted = [r for r in planned if pattern.search(r.name)]
    if not wanted:
        raise ValueError(f"only is {args.only!r}, which names no run; --list shows them all.")
    paths = [result_path(args.out, experiment, r.task, r.variant, r.seed) for r in wanted]
    if args.list:
        for r, path in zip(wanted, paths):
            print(f"{r.name:<44} {'done' if path.exists() else ''}")
        return []
    started = time.time()
    for r, path in zip(wanted, paths):
        if path.exists():
            continue
        if args.max_minutes and time.time() - started > 60 * args.max_minutes:
            print(f"stopped before {r.name}: {args.max_minutes} minutes are over")
            break
        print(f"== {r.name}", flush=True)
        workdir = epath.Path(args.scratch) / experiment / r.name
        result = make(experiment, r, workdir)
        result = finish(r, result, workdir)
        write_result(result, path)
        print(
            f"== {r.name}: loss {result.loss:.4f}, accuracy {result.accuracy:.3%}, usage "
            f"{result.usage:.4%}, cost {result.cost:.4f}, kv cost {result.kv_cost:.4f}, "
            f"{result.minutes:.1f} minutes",
            flush=True,
        )
    return load_results(args.out, experiment)
