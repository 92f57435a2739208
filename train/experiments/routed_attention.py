"""Routed Attention reproduced: recall at many lengths, its controls, and a language model.

Command: `routing-jax reproduce routed-attention`; `--list` names the runs, `--only REGEX` and
`--max-minutes N` cut it to fit; finished runs are skipped and interrupted ones resumed.
Hardware and time: recall up to 512 takes one to four minutes a run on a CPU core; the longer ones
and the language model want a GPU (one H100: under a minute and about three minutes a run).
Expect: the source's claim beaten where the query is marked, and its 25 % found where it is not.
"""

import dataclasses
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
from etils import epath

from routing_jax.evals.report import ROUTED_ATTENTION as EXPERIMENT
from routing_jax.evals.report import plot_routed_attention
from routing_jax.evals.results import load_results, result_path, write_result
from routing_jax.evals.tables import routed_attention_table
from routing_jax.models import count_params, init_params
from routing_jax.routers import TokenRouterConfig
from routing_jax.train.config import TrainConfig
from routing_jax.train.presets import get_preset
from routing_jax.train.run import least_usage, read_config, run


@dataclass(frozen=True)
class ReproduceArgs:
    """Run an experiment, or what is missing of it, then render its table and plots.

    Attributes:
      out: results folder; a run's result is OUT/routed-attention/TASK_VARIANT_sSEED.json.
      scratch: folder for checkpoints and logs of the runs.
      only: run only those whose name TASK_VARIANT_sSEED matches this regular expression.
      max_minutes: start no further run after so many minutes; 0 for no limit.
      text: corpus of the language-model runs, as --data.source takes it.
      list: print the runs and stop.
    """

    out: str = "evals/results"
    scratch: str = "runs/reproduce"
    only: str = ""
    max_minutes: float = 0.0
    text: str = "stdlib"
    list: bool = False


class Run(NamedTuple):
    """One run of the experiment."""

    task: str
    variant: str
    seed: int
    config: TrainConfig

    @property
    def name(self) -> str:
        """TASK_VARIANT_sSEED, the name of its files."""
        return f"{self.task}_{self.variant}_s{self.seed}"


def _layers(config: TrainConfig, kind: str) -> TrainConfig:
    return config.replace(model__layers=f"{kind}*{len(config.model.mixers)}")


def convolution_only(config: TrainConfig) -> TrainConfig:
    """The model without attention, its MLP widened (or added) to the same number of parameters."""
    conv = _layers(config, "conv")
    missing = _parameters(config) - _parameters(conv)
    column = 3 * config.model.width  # SwiGLU has three matrices of width × mlp_width
    wide = config.model.mlp_width + round(missing / len(config.model.mixers) / column)
    return conv.replace(model__mlp_width=wide)


def _parameters(config: TrainConfig) -> int:
    return count_params(jax.eval_shape(lambda: init_params(config.model, jax.random.key(0))))


def random_router(config: TrainConfig) -> TrainConfig:
    """A frozen random router at the usage that the learned one should reach."""
    usage = least_usage(config) or config.curriculum.target
    return config.replace(
        model__router=TokenRouterConfig(kind="random", usage=usage),
        curriculum__peak=0.0,
        curriculum__target=0.0,
    )


VARIANTS: dict[str, Callable[[TrainConfig], TrainConfig]] = {
    "routed": lambda c: c,
    "penalty-from-start": lambda c: c.replace(curriculum__from_start=True),
    "no-penalty": lambda c: c.replace(curriculum__peak=0.0),
    # Without a convolution only positions tell a token what stood before it.
    "full": lambda c: _layers(c, "full").replace(model__rope_theta=10_000.0),
    "conv": convolution_only,
    "random": random_router,
    "routed+pause": lambda c: c.replace(curriculum__reaction="pause"),
    "routed+back": lambda c: c.replace(curriculum__reaction="back"),
    "routed+cost": lambda c: c.replace(curriculum__weighs="cost"),
    "routed+summary": lambda c: c.replace(
        model__router=dataclasses.replace(c.model.router, summary=256)
    ),
}

_MAIN = ("routed", "penalty-from-start", "no-penalty", "full", "conv", "random")
_THREE = (0, 1, 2)


def runs(text: str = "stdlib") -> Iterator[Run]:
    """All runs of the experiment, in the order in which they are made.

    Args:
      text: corpus of the language-model runs.
    """
    plan: list[tuple[str, tuple[str, ...], tuple[int, ...]]] = [
        *((f"recall-{n}", _MAIN, _THREE) for n in (128, 256, 512, 1024, 2048)),
        ("recall-4096", ("routed", "conv"), (0,)),
        ("recall-8192", ("routed", "conv"), (0,)),
        ("recall-128", ("routed+pause", "routed+back", "routed+cost"), _THREE),
        ("multi-query-256", ("routed", "full", "conv"), _THREE),
        ("unmarked-128", ("routed", "routed+summary", "full", "conv"), _THREE),
        ("mqar-256", ("routed", "routed+summary", "full", "conv"), _THREE),
        ("mqar-256-marked", ("routed",), _THREE),
        ("lm", ("routed", "full"), _THREE),
        ("lm", ("conv", "random", "no-penalty"), (0,)),
    ]
    for task, variants, seeds in plan:
        base = get_preset(task)
        if task == "lm":
            base = base.replace(data__source=text)
        for variant in variants:
            config = VARIANTS[variant](base)
            for seed in seeds:
                yield Run(task, variant, seed, config.replace(seed=seed))


def reproduce(args: ReproduceArgs) -> int:
    """Makes every missing run that `only` names, then renders; returns the exit code."""
    try:
        pattern = re.compile(args.only)
    except re.error as e:
        raise ValueError(f"only is {args.only!r}, which is no regular expression: {e}.") from e
    wanted = [r for r in runs(args.text) if pattern.search(r.name)]
    if not wanted:
        raise ValueError(f"only is {args.only!r}, which names no run; --list shows them all.")
    paths = [result_path(args.out, EXPERIMENT, r.task, r.variant, r.seed) for r in wanted]
    if args.list:
        for r, path in zip(wanted, paths):
            print(f"{r.name:<44} {'done' if path.exists() else ''}")
        return 0
    started = time.time()
    for r, path in zip(wanted, paths):
        if path.exists():
            continue
        if args.max_minutes and time.time() - started > 60 * args.max_minutes:
            print(f"stopped before {r.name}: {args.max_minutes} minutes are over")
            break
        print(f"== {r.name}", flush=True)
        workdir = epath.Path(args.scratch) / EXPERIMENT / r.name
        if (workdir / "config.json").exists() and read_config(workdir) != r.config:
            raise ValueError(
                f"{workdir} holds an unfinished run with another configuration; remove it, or give "
                "another --scratch."
            )
        result = run(
            r.config,
            workdir,
            resume=True,
            labels={"experiment": EXPERIMENT, "task": r.task, "variant": r.variant},
        )
        write_result(result, path)
        print(
            f"== {r.name}: accuracy {result.accuracy:.3%}, usage {result.usage:.4%}, "
            f"cost {result.cost:.4f}, {result.minutes:.1f} minutes",
            flush=True,
        )
    results = load_results(args.out, EXPERIMENT)
    if results:
        folder = epath.Path(args.out) / EXPERIMENT
        (folder / "table.md").write_text(routed_attention_table(results) + "\n")
        plot_routed_attention(results, folder)
    return 0
