"""Routed Attention reproduced: recall at many lengths, its controls, and a language model.

Command: `routing-jax reproduce routed-attention`; `--list` names the runs, `--only REGEX` and
`--max-minutes N` cut it to fit; finished runs are skipped and interrupted ones resumed.
Hardware and time: recall up to 512 takes one to four minutes a run on a CPU core; the longer ones
and the language model want a GPU (one H100: under a minute and about three minutes a run).
Expect: the source's claim beaten where the query is marked, and its 25 % found where it is not.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
from etils import epath

from routing_jax.evals.report import ROUTED_ATTENTION as EXPERIMENT
from routing_jax.evals.report import plot_routed_attention
from routing_jax.evals.tables import routed_attention_table
from routing_jax.models import count_params, init_params
from routing_jax.routers import TokenRouterConfig
from routing_jax.train.config import TrainConfig
from routing_jax.train.experiments.experiment import ReproduceArgs, Run, make_missing
from routing_jax.train.presets import get_preset
from routing_jax.train.run import least_usage


@dataclass(frozen=True)
class RoutedAttentionArgs(ReproduceArgs):
    """Run an experiment, or what is missing of it, then render its table and plots.

    Attributes:
      text: corpus of the language-model runs, as --data.source takes it.
    """

    text: str = "stdlib"


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
        ("recall-128-steep", ("routed", "routed+pause", "routed+back"), _THREE),
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


def reproduce(args: RoutedAttentionArgs) -> int:
    """Makes every missing run that `only` names, then renders; returns the exit code."""
    results = make_missing(EXPERIMENT, args, runs(args.text))
    if results:
        folder = epath.Path(args.out) / EXPERIMENT
        (folder / "table.md").write_text(routed_attention_table(results) + "\n")
        plot_routed_attention(results, folder)
    return 0
