"""Mixture of Attention Schemes (arXiv 2512.20650) reproduced, and made worth having.

Command: `routing-jax reproduce moas --text valid.txt test.txt --elsewhere a.txt b.txt`; `--list`
names the runs, `--only REGEX` and `--max-minutes N` cut it to fit; finished runs are skipped and
interrupted ones resumed. The text is joined in the order given, its last tenth held out.
`--jobs 32` makes 32 runs side by side; `--times FILE`, which times the variants instead of training
them, wants the device alone.
Hardware and time: seconds of training a run; 38 of a seed's 41 took 80 seconds on four H200s once
their programs were compiled, which took three minutes on 64 cores. Not meant for a CPU.
Expect: as published, the soft mixture is no better than its static average, nor than MHA with as
many parameters. Nested and hard, with λ on `kv_cost`, it reads under half of MHA's keys and values.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from routing_jax.evals.report import MOAS as EXPERIMENT
from routing_jax.evals.report import plot_moas
from routing_jax.evals.results import Result
from routing_jax.evals.scheme_tables import moas_table
from routing_jax.evals.scheme_use import scheme_use
from routing_jax.models import DecoderConfig, count_params, init_cache, init_params
from routing_jax.train.config import TrainConfig
from routing_jax.train.data import CharacterConfig, batches, vocabulary, window_count
from routing_jax.train.experiments.experiment import (
    ReproduceArgs,
    Run,
    make_missing,
    wanted_runs,
)
from routing_jax.train.experiments.moas_times import Part, time_variants
from routing_jax.train.metrics import read_metrics
from routing_jax.train.presets import get_preset
from routing_jax.train.run import evaluate_run, load_run

_MOST_HISTORY = 50  # rows


@dataclass(frozen=True)
class MoasArgs(ReproduceArgs):
    """Run an experiment, or what is missing of it, then render its table and plots.

    Attributes:
      text: files of text, joined in this order; or stdlib.
      elsewhere: other texts on which the trained models are evaluated as they are.
      times: a JSON file: time the variants that `only` names, untrained, and write it after each
        measurement, none begun after `max_minutes`.
      timed: what `times` measures: a training step, a batch in evaluation, a token at the end of a
        context, one of a long cache.
    """

    text: tuple[str, ...] = ("stdlib",)
    elsewhere: tuple[str, ...] = ()
    times: str = ""
    timed: tuple[Part, ...] = get_args(Part)


def _alone(kv_heads: int) -> Callable[[TrainConfig], TrainConfig]:
    """The model with one scheme, and no router."""
    return lambda c: c.replace(
        model__layers=c.model.layers.replace("schemes", "full"),
        model__num_kv_heads=kv_heads,
        curriculum__explore=0.0,
    )


def _schemes(**fields: Any) -> Callable[[TrainConfig], TrainConfig]:
    """The model with other schemes, or another router."""

    def change(config: TrainConfig) -> TrainConfig:
        schemes = {**vars(config.model.schemes), **fields}
        return config.replace(model__schemes=type(config.model.schemes)(**schemes))

    return change


@functools.cache
def _parameters(model: DecoderConfig) -> int:
    return count_params(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))


def matched(config: TrainConfig) -> TrainConfig:
    """MHA alone, its MLP widened to the parameters of the mixture.

    >>> mixture = get_preset("moas")
    >>> matched(mixture).model.mlp_width > mixture.model.mlp_width
    True
    """
    mha = _alone(config.model.num_heads)(config)
    missing = _parameters(config.model) - _parameters(mha.model)
    column = 2 * config.model.width  # of a GELU MLP
    wide = config.model.mlp_width + round(missing / len(config.model.mixers) / column)
    return mha.replace(model__mlp_width=wide)


def _balance(weight: float) -> Callable[[TrainConfig], TrainConfig]:
    return lambda c: c.replace(curriculum__explore=weight)


def _priced(target: float = 0.45, **fields: Any) -> Callable[[TrainConfig], TrainConfig]:
    """λ on `kv_cost` instead of the balance loss: schemes earn their use."""
    return lambda c: _schemes(kind="hard", gate_dropout=0.0, **fields)(c).replace(
        curriculum__explore=0.0, curriculum__peak=0.2, curriculum__target=target
    )


VARIANTS: dict[str, Callable[[TrainConfig], TrainConfig]] = {
    "mha": _alone(6),
    "mha+matched": matched,
    "mha+matched-nested": lambda c: matched(_schemes(nested=True)(c)),
    "gqa2": _alone(2),
    "mqa": _alone(1),
    "average": _schemes(kind="average"),
    "soft": lambda c: c,
    "soft+no-gate-dropout": _schemes(gate_dropout=0.0),
    "soft+balance-0": _balance(0.0),
    "soft+balance-0.1": _balance(0.1),
    "soft+balance-1": _balance(1.0),
    "soft+balance-10": _balance(10.0),
    "hard": _schemes(kind="hard", gate_dropout=0.0),
    "hard+kv-cost": _priced(),
    "random": _schemes(kind="random", gate_dropout=0.0),
    "nested-soft": _schemes(nested=True),
    "nested-average": _schemes(nested=True, kind="average"),
    "nested-hard": _schemes(nested=True, kind="hard", gate_dropout=0.0),
    "nested-hard+kv-cost": _priced(nested=True),
    "nested-hard+kv-cost+no-noise": _priced(nested=True, gate_noise=False),
    "nested-hard+kv-cost+detached": _priced(nested=True, gate_noise=False, detached=True),
    # λ's target is what may be read; what is read in the end lies a tenth below it, or more.
    "nested-hard+kv-cost+half": _priced(0.5, nested=True, gate_noise=False, detached=True),
    "nested-random": _schemes(nested=True, kind="random", gate_dropout=0.0),
}

_SEEDS = (0, 1, 2, 3, 4)
# λ needs time to rise, so its variants are trained for 2,000 steps only.
TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "steps-500": ("moas", tuple(v for v in VARIANTS if "kv-cost" not in v)),
    "steps-2000": ("moas-2000", tuple(VARIANTS)),
}


def runs(text: tuple[str, ...] = ("stdlib",)) -> Iterator[Run]:
    """All runs of the experiment in the order in which they are made, seed after seed.

    Args:
      text: as `MoasArgs.text`.

    Raises:
      ValueError: as `vocabulary`.
    """
    size = len(vocabulary(CharacterConfig(source=text)))
    for seed in _SEEDS:
        for task, (preset, variants) in TASKS.items():
            base = get_preset(preset).replace(data__source=text, data__vocab_size=size, seed=seed)
            for variant in variants:
                yield Run(task, variant, seed, VARIANTS[variant](base))


def character_classes(config: CharacterConfig) -> dict[str, np.ndarray]:
    """Which tokens are letters, digits, spaces and the rest: name -> [V] bool.

    Args:
      config: the text.

    >>> [name for name in character_classes(CharacterConfig())]
    ['letter', 'digit', 'space', 'other']
    """
    letters = vocabulary(config)
    kinds = {"letter": str.isalpha, "digit": str.isdigit, "space": str.isspace}
    found = {name: np.zeros(config.vocab_size, bool) for name in (*kinds, "other")}
    for token, letter in enumerate(letters):
        name = next((name for name, is_one in kinds.items() if is_one(letter)), "other")
        found[name][token] = True
    return found


def measure(run: Run, workdir: epath.Path, elsewhere: tuple[str, ...]) -> dict[str, Any]:
    """What only this experiment reports of a trained run.

    Args:
      run: the run.
      workdir: where it was trained.
      elsewhere: other texts, on which it is evaluated as it is.

    Returns:
      JSON values: `kv_bytes_stored` a token; `kv_bytes_dense`, which MHA reads for a decoded
      token, mean over the context's positions; `history`, rows of step, kv_cost, aux and
      usage_per_layer; `elsewhere`, name -> loss and kv_cost; and of mixed schemes what
      `scheme_use` gives.
    """
    config, params, _ = load_run(workdir)
    model, data = config.model, config.data
    assert isinstance(data, CharacterConfig)
    size = config.batch_size(data.length)
    cache = jax.eval_shape(lambda: init_cache(model, 1, 1)).layers
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    dense = (
        len(model.mixers) * 2 * model.num_heads * model.head_dim * jnp.dtype(model.dtype).itemsize
    )
    rows = read_metrics(workdir)
    rows = rows[:: max(1, -(-len(rows) // _MOST_HISTORY))]
    kept = ("step", "kv_cost", "aux", "usage_per_layer")
    found: dict[str, Any] = {
        "kv_bytes_stored": stored,
        "kv_bytes_dense": dense * (data.length + 1) / 2,
        "history": [{name: row[name] for name in kept} for row in rows],
        "elsewhere": {},
    }
    own = data.vocabulary_source or data.source
    for source in elsewhere:
        other = config.replace(data__source=(source,), data__vocabulary_source=own)
        held_out = evaluate_run(other, params)
        name = epath.Path(source).name.split(".")[0]
        found["elsewhere"][name] = {"loss": held_out.loss, "kv_cost": held_out.kv_cost}
    if set(model.mixers) == {"schemes"}:
        count = -(-window_count(data, split="validation") // size)
        stream = batches(data, split="validation", seed=0, batch_size=size)
        held = (next(stream) for _ in range(count))
        found |= scheme_use(model, params, held, character_classes(data))
    return found


def with_details(
    elsewhere: tuple[str, ...], run: Run, result: Result, workdir: epath.Path
) -> Result:
    """The result with what `measure` gives."""
    return dataclasses.replace(result, details=measure(run, workdir, elsewhere))


def reproduce(args: MoasArgs) -> int:
    """Makes every missing run that `only` names, then renders; returns the exit code.

    Raises:
      ValueError: a text that can't be read, or has a validation part shorter than a context.
    """
    for source in (args.text, *((name,) for name in args.elsewhere)):
        window_count(CharacterConfig(source=source, vocab_size=1 << 20), split="validation")

    if args.times:
        wanted = wanted_runs(args, runs(args.text))
        seconds = 60 * args.max_minutes
        time_variants(wanted, Path(args.times), parts=args.timed, seconds=seconds)
        return 0

    finish = functools.partial(with_details, args.elsewhere)
    results = make_missing(EXPERIMENT, args, runs(args.text), finish)
    if results:
        folder = epath.Path(args.out) / EXPERIMENT
        (folder / "table.md").write_text(moas_table(results) + "\n")
        plot_moas(results, folder)
    return 0
