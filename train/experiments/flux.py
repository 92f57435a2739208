"""Flux Attention measured: trained layer routers beside controls that know nothing of the prompt.

Command: `routing-jax reproduce flux --base MODEL --text FOLDER`; `--list` names the runs, `--only
REGEX` and `--max-minutes N` cut it to fit; finished runs are skipped and interrupted ones resumed.
`--elsewhere OTHER`, `--lengths 2048`, `--maths` and `--finetuned OTHER_MODEL` measure the same
routers, and the same static ranking, on other prompts or in another model (`train finetune` makes
one). `--composed` measures them, the ranking and no routing at all where layers that are not sparse
search for blocks, in prompts and after them, with the routers that were trained without. A text of
another language: the Debian package debian-reference-de holds a megabyte of German,
debian-reference.de.txt.gz; those for -fr, -it, -es, -pt and -ja are alike.
Hardware and time: one H100; SmolLM2-135M at 8192 tokens an estimated hour in all.
Expect: in mode triangle routers answer as dense attention does with seven layers in eight sparse,
and the text's perplexity rises by half a per cent. A router that does not beat `static` at equal
sparsity, where the same layers are sparse for every prompt, has learned nothing: `static` ranks
them on plain text, `static+tasks` on all tasks, and `static+routed` has those that trained routers
attend fully most often, which shows what deciding anew for every prompt adds. Fixed layers are
chosen on prompts of the training text, of which none is scored.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from routing_jax.evals.prompt_plot import plot_prompts
from routing_jax.evals.prompt_quality import (
    Chooser,
    fixed_layers,
    prompt_scorer,
    random_layers,
    ranked_layers,
    sensitivities,
)
from routing_jax.evals.prompt_tables import flux_table
from routing_jax.evals.report import FLUX as EXPERIMENT
from routing_jax.evals.results import Result
from routing_jax.models import init_routers, merge_routers
from routing_jax.routers import Answers, Retrieval, SparseMode
from routing_jax.routers.block_config import BlockImplementation
from routing_jax.sharding import put_batch
from routing_jax.train.base import (
    held_out_prompts,
    routing_result,
    score_tasks,
    with_base,
)
from routing_jax.train.config import TrainConfig
from routing_jax.train.experiments.experiment import ReproduceArgs, Run, make_missing, train_run
from routing_jax.train.loop import load_base, train_mesh
from routing_jax.train.presets import get_preset
from routing_jax.train.run import starting_parameters

PERCENT = (50, 60, 75, 80, 90)
_TASKS_PERCENT = (75, 90)
_SEEDS = (0, 1, 2)
_SEARCHING = "+composed"  # of variants whose layers that are not sparse search
_CALIBRATION = 24  # prompts of plain text that rank the layers


@dataclass(frozen=True)
class FluxArgs(ReproduceArgs):
    """Run an experiment, or what is missing of it, then render its table and plots.

    Attributes:
      base: the published model, a folder of safetensors or a GGUF file.
      text: the haystack and the plain text, as --data.source takes it.
      elsewhere: other texts on which routers trained on `text` are measured as they are; nothing is
        trained on them, so they may be short.
      lengths: other lengths at which they are.
      maths: measure them on word problems too.
      composed: measure them where layers that are not sparse search for blocks.
      finetuned: other models in which they are measured, `base` with other weights.
      length: tokens a prompt, answer included.
      trials: held-out prompts of each task.
      batch: prompts a step, in training and evaluation.
      steps: of training.
      mode: what sparse attention is.
      retrieval: what full attention is, while a prompt is read.
      answers: what tokens after the prompt do where a layer searches it.
      implementation: of block-sparse attention; the best one here when not given.
    """

    base: str = ""
    text: str = "stdlib"
    elsewhere: tuple[str, ...] = ()
    length: int = 8192
    lengths: tuple[int, ...] = ()
    maths: bool = False
    composed: bool = False
    finetuned: tuple[str, ...] = ()
    trials: int = 1000
    batch: int = 12
    steps: int = 300
    mode: SparseMode = "streaming"
    retrieval: Retrieval = "full"
    answers: Answers = "full"
    implementation: BlockImplementation | None = None


def planned_config(args: FluxArgs, preset: str = "flux") -> TrainConfig:
    """What all runs share.

    Raises:
      ValueError: as `with_base`.
    """
    config = get_preset(preset)
    asked = ("mode", "retrieval", "answers", "implementation")
    ramp = args.steps // 2 if config.curriculum.ramp_steps else 0
    return with_base(
        config.replace(
            base=args.base,
            data__source=args.text,
            data__length=args.length,
            model__sparse=dataclasses.replace(
                config.model.sparse, **{name: vars(args)[name] for name in asked}
            ),
            curriculum__ramp_steps=ramp,
            curriculum__hold_steps=args.steps - ramp,
            batch_tokens=args.batch * args.length,
            eval_sequences=args.trials,
        )
    )


def task_name(args: FluxArgs) -> str:
    """Base, text, mode, retrieval and answers where they are not full, and length.

    >>> args = FluxArgs(base="SmolLM2-135M.gguf", text="texts/linux_rst.txt.gz")
    >>> task_name(args)
    'smollm2-linux-streaming-8192'
    >>> task_name(dataclasses.replace(args, retrieval="topk", answers="topk"))
    'smollm2-linux-streaming-topk-answers-8192'
    """
    names = (re.split(r"[^a-z0-9]", epath.Path(n).name.lower())[0] for n in (args.base, args.text))
    attention = args.mode if args.retrieval == "full" else f"{args.mode}-{args.retrieval}"
    attention += "-answers" if args.answers == "topk" else ""
    return f"{'-'.join(names)}-{attention}-{args.length}"


def _slug(path: str) -> str:
    """A file's or folder's name as a part of a task's, without .txt and .gz."""
    name = re.sub(r"(\.txt)?(\.gz)?$", "", epath.Path(path).name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


_SHAPE = ("layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width")


def _finetuned(args: FluxArgs, model: str) -> TrainConfig:
    """The plan in a model that shall be the base with other weights."""
    ours, theirs = (planned_config(dataclasses.replace(args, base=m)) for m in (args.base, model))
    for name in _SHAPE:
        found, wanted = (getattr(config.model, name) for config in (theirs, ours))
        if found != wanted:
            raise ValueError(
                f"finetuned names {model}, whose {name} is {found!r}; it must be {args.base} with "
                f"other weights, of {name} {wanted!r}."
            )
    return theirs


def _elsewhere(args: FluxArgs) -> Iterator[tuple[str, TrainConfig]]:
    """The tasks on which routers are measured that were trained at home."""
    name, home = task_name(args), planned_config(args)
    for text in args.elsewhere:
        # Held out whole: nothing is trained on it, and it may be short.
        config = home.replace(data__source=text, data__validation_fraction=1.0)
        yield f"{name}-elsewhere-{_slug(text)}", config
    for length in args.lengths:
        there = dataclasses.replace(args, length=length)
        yield task_name(there), planned_config(there)
    if args.maths:
        yield f"{name}-maths", home.replace(data__mixture=("maths",))
    for model in args.finetuned:
        yield f"{name}-finetuned-{_slug(model)}", _finetuned(args, model)


def _composed(args: FluxArgs, routed: Iterable[Run]) -> Iterator[Run]:
    """Runs at home in which layers search for blocks where they would attend fully."""
    if args.retrieval == "topk":
        raise ValueError("composed is true and retrieval 'topk'; give one.")
    task = task_name(args)
    config = planned_config(dataclasses.replace(args, retrieval="topk", answers="topk"))
    for variant in (f"dense{_SEARCHING}", f"static{_SEARCHING}-75"):
        yield Run(task, variant, 0, config)
    for home in routed:
        yield Run(task, f"routed{_SEARCHING}", home.seed, _after(args, home, config))


def runs(args: FluxArgs) -> Iterator[Run]:
    """All runs of the experiment, in the order in which they are made: controls, then routers.

    Elsewhere, routers and the static ranking are those of home.

    Raises:
      ValueError: as `with_base`, a finetuned model of another shape, two texts or models of one
        name, or `composed` where layers search already.
    """
    task = task_name(args)
    base, curriculum = (planned_config(args, p) for p in ("flux", "flux-curriculum"))
    yield from (Run(task, variant, 0, base) for variant in ("dense", "sparse"))
    for percent in PERCENT:
        yield Run(task, f"static-{percent}", 0, base)
        yield Run(task, f"random-{percent}", 0, base)
    yield from (Run(task, f"static+tasks-{percent}", 0, base) for percent in _TASKS_PERCENT)
    routed = [Run(task, "routed", seed, base.replace(seed=seed)) for seed in _SEEDS]
    yield from routed
    for home in routed:
        yield Run(task, "static+routed", home.seed, _after(args, home, home.config))
    for seed in _SEEDS:
        yield Run(task, "routed+curriculum", seed, curriculum.replace(seed=seed))
    if args.composed:
        yield from _composed(args, routed)

    named = {task}
    for task, config in _elsewhere(args):
        if task in named:
            raise ValueError(f"two tasks would be called {task}; give what they read other names.")
        named.add(task)
        yield from (Run(task, v, 0, config) for v in ("dense", "sparse", "static-75", "random-75"))
        for home in routed:
            yield Run(task, "routed", home.seed, _after(args, home, config))


def _after(args: FluxArgs, home: Run, config: TrainConfig) -> TrainConfig:
    """The config of a run that takes its routers from one at home."""
    folder = epath.Path(args.scratch) / EXPERIMENT / home.name
    return config.replace(seed=home.seed, start_from=str(folder))


def _place(config: TrainConfig) -> TrainConfig:
    """What a run is scored by, whichever routers it has."""
    return config.replace(seed=0, start_from="")


class _Scored(NamedTuple):
    """What the runs of one config share: its scorer, and routers that decide nothing."""

    score: Callable[..., Any]
    routers: Any
    frozen: Any


@functools.lru_cache(maxsize=1)
def _scored(config: TrainConfig) -> _Scored:
    mesh = train_mesh(config)
    frozen = load_base(config, mesh)
    routers = init_routers(config.model, jax.random.key(0))
    return _Scored(score_tasks(config, frozen, mesh), routers, frozen)


def _tasks(config: TrainConfig) -> tuple[str, ...]:
    return tuple(dict.fromkeys(config.data.mixture))  # type: ignore[union-attr]


def _calibration(home: TrainConfig, tasks: tuple[str, ...]) -> list[Any]:
    """Prompts by which fixed layers are chosen: of the training split, so that none is scored."""
    mesh = train_mesh(home)
    rows = [row for task in tasks for row in held_out_prompts(home, task, _CALIBRATION, "train")]
    with jax.set_mesh(mesh):
        return [put_batch(batch, mesh) for batch in rows]


@functools.lru_cache(maxsize=2)
def _costs(home: TrainConfig, tasks: tuple[str, ...]) -> np.ndarray:
    """[L], what each layer's sparsity costs on prompts of these tasks."""
    found, rows = _scored(home), _calibration(home, tasks)
    with jax.set_mesh(train_mesh(home)):
        params = merge_routers(found.frozen, found.routers)
        return sensitivities(prompt_scorer(home.model), params, rows, len(home.model.mixers))


def _use(home: TrainConfig, routers: Any) -> np.ndarray:
    """[L], how often trained routers attend fully in each layer, over all tasks."""
    frozen, rows = _scored(home).frozen, _calibration(home, _tasks(home))
    with jax.set_mesh(train_mesh(home)):
        return prompt_scorer(home.model)(merge_routers(frozen, routers), rows).dense.mean(axis=1)


def control(experiment: str, one: Run, home: TrainConfig) -> Result:
    """The result of a control, in which the prompt has no say; nothing is trained.

    Args:
      experiment: the folder of the results.
      one: 'dense', 'sparse', 'static-N', 'static+tasks-N' or 'random-N', N per cent of the layers
        being sparse; '+composed' may follow the name.
      home: where layers are ranked for 'static'.
    """
    layers = len(one.config.model.mixers)
    name = one.variant.replace(_SEARCHING, "")
    kind, _, percent = name.partition("-")
    sparse = {"dense": 0, "sparse": layers}.get(kind, round(layers * int(percent or 0) / 100))
    choose: Chooser = fixed_layers(np.full(layers, kind == "dense"))
    found: dict[str, Any] = {}
    if kind.startswith("static"):
        costs = _costs(home, ("text",) if kind == "static" else _tasks(home))
        choose = fixed_layers(ranked_layers(costs, sparse))
        found = {"sensitivity": costs.astype(float).tolist()}
    elif kind == "random":
        choose = random_layers(layers, sparse, one.seed)
    labels = {"experiment": experiment, "task": one.task, "variant": one.variant}
    score, routers, _ = _scored(_place(one.config))
    result = routing_result(one.config, score(routers, choose), labels)
    return dataclasses.replace(result, details=(result.details or {}) | found)


def transferred(experiment: str, one: Run) -> Result:
    """The result of routers that were trained in another run, or of the layers they favour.

    Args:
      experiment: the folder of the results.
      one: its `start_from` names the run of the training; variant 'static+routed' fixes the layers
        that its routers attend fully most often on the training text, as many as on average.

    Raises:
      ValueError: that run is not there, or its routers are not for this model.
    """
    routers, place = starting_parameters(one.config), _place(one.config)
    choose: Chooser | None = None
    found: dict[str, Any] = {}
    if one.variant == "static+routed":
        use = _use(place, routers)
        choose = fixed_layers(ranked_layers(use, len(use) - round(use.sum())))
        found = {"use": use.astype(float).tolist()}
    labels = {"experiment": experiment, "task": one.task, "variant": one.variant}
    result = routing_result(one.config, _scored(place).score(routers, choose), labels)
    return dataclasses.replace(result, details=(result.details or {}) | found)


def make(experiment: str, one: Run, workdir: epath.Path, *, home: TrainConfig) -> Result:
    """The result of a run: at home routers are trained, controls never are.

    Args:
      experiment: the folder of the results.
      one: the run.
      workdir: where routers are trained.
      home: where all of them are.
    """
    if not one.variant.startswith(("routed", "static+routed")):
        return control(experiment, one, home)
    if one.config.start_from:
        return transferred(experiment, one)
    return train_run(experiment, one, workdir)


def reproduce(args: FluxArgs) -> int:
    """Makes every missing run that `only` names, then renders; returns the exit code."""
    made = functools.partial(make, home=planned_config(args))
    results = make_missing(EXPERIMENT, args, runs(args), make=made)
    if results:
        folder = epath.Path(args.out) / EXPERIMENT
        (folder / "table.md").write_text(flux_table(results) + "\n")
        plot_prompts(results, folder / "tradeoff.png")
    return 0
