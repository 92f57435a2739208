"""Block routing measured: routers, controls and budgets on recall, needles and text.

A model learns with attention everywhere ('base'), and from it every variant goes on under its rows:
dense train, then sparse fine-tune, the recipe that is known to work, and a third of the time of
training each from the start. 'full' goes on with attention everywhere. What cannot go on, the model
limited to 1,024 tokens, linear attention and convolutions, is trained from the start for as many
steps; so are the routers named '+scratch' and, for all these to be compared with, 'full+scratch'.
A learning rate that falls once is not one that falls twice, and of a text what goes on reads its
base's first batches again.

Command: `routing-jax reproduce block-routing --text FOLDER --jobs 8`; `--list` names the runs,
`--only REGEX` and `--max-minutes N` cut it to fit; finished runs are skipped and interrupted ones
resumed. `--only 'block-lm_(full|window-1k)'` first: where attention everywhere does not beat
the same model limited to 1,024 tokens by 2 % bits per byte, a text cannot test routing.
Hardware and time: an estimated 1 to 3 minutes a run on an H100, a third of it compilation, and 277
runs in all; in their order they can be cut anywhere. What a run goes on from is made before it, and
again where its folder is lost.
Expect: not measured yet.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from routing_jax.evals.attention_error import Row, attention_errors
from routing_jax.evals.by_position import head_usage, loss_by_position, position_edges
from routing_jax.evals.report import BLOCK_ROUTING as EXPERIMENT
from routing_jax.evals.report import block_routing_text, plot_block_routing
from routing_jax.evals.results import Result
from routing_jax.train.config import TrainConfig
from routing_jax.train.data import TextConfig, batches
from routing_jax.train.experiments.experiment import ReproduceArgs, Run, make_missing
from routing_jax.train.experiments.routed_attention import convolution_only
from routing_jax.train.presets import get_preset
from routing_jax.train.run import load_run

WINDOW = 1024  # tokens that the limited control sees
_SHOWN = 16  # sequences behind the figures by position and by head

# What makes each router of the preset's one. A budget in percent is set beside it.
ROUTERS: dict[str, dict[str, Any]] = {
    "learned": {"kind": "learned"},
    "pooled": {"kind": "pooled"},
    "indexer": {"kind": "indexer"},
    "tree": {"kind": "learned", "fanout": 4},
    "clusters": {"kind": "clusters"},
    "mass": {"kind": "learned", "budget": "mass"},
    "gates": {"kind": "learned", "budget": "gates"},
    "random": {"kind": "random"},
    "window": {"kind": "window", "sinks": 0},
    "sink-window": {"kind": "window"},
    "strided": {"kind": "strided"},
    "bigbird": {"kind": "bigbird"},
}
STRONGEST = ("learned", "pooled", "indexer")
BASELINES = ("random", "sink-window")  # what a learned router must beat
TASKS = ("block-lm", "block-mqar-2048", "block-needle-4096", "block-multi-needle-4096")
SEEDS = 3  # where a difference is to be judged; one seed elsewhere


@dataclass(frozen=True)
class BlockRoutingArgs(ReproduceArgs):
    """Run an experiment, or what is missing of it, then render its table and plots.

    Attributes:
      text: corpus of the language-model runs, as --data.source takes it.
      strongest: the routers that get three seeds at 12 and 25 %, and one at 5 and 50 %; choose them
        by the first seeds of all, and know that those then stand in their means.
    """

    text: str = "stdlib"
    strongest: tuple[str, ...] = STRONGEST

    def __post_init__(self):
        super().__post_init__()
        for router in self.strongest:
            if router not in ROUTERS:
                raise ValueError(f"strongest holds {router!r}; accepted: {', '.join(ROUTERS)}.")


def with_router(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The run with some fields of its block router changed."""
    return config.replace(model__blocks=dataclasses.replace(config.model.blocks, **changes))


def blocks_listed(config: TrainConfig, percent: int) -> int:
    """How many blocks a row lists for a sequence to cost that percentage; short rows are dense.

    The router's own work is not in it: under 0.1 % of attention's, but in recall, where every query
    is routed, up to 5 %, which a fixed pattern does not spend. `cost` in the results has it.

    A share of what each row sees would cost the same, and leave early rows nothing to choose: a
    query that comes soon after what it asks for could then be answered by no router.

    >>> [blocks_listed(get_preset("block-lm"), percent) for percent in (5, 12, 25, 50)]
    [3, 8, 17, 38]
    """
    blocks = config.model.blocks
    seen = np.arange(1, -(-config.data.length // blocks.block_kv) + 1)
    counts = range(blocks.forced, len(seen) + 1)
    costs = [np.minimum(count, seen).sum() / seen.sum() for count in counts]
    return counts[int(np.argmin(np.abs(np.array(costs) - percent / 100)))]


def routed(config: TrainConfig, router: str, percent: int) -> TrainConfig:
    """The run with a router at a budget: blocks that cost that percentage of attention.

    'mass' adapts within twice the budget; for 'gates' λ rises until cost is down to it.
    """
    fraction = percent / 100
    listed = blocks_listed(config, percent)
    config = with_router(config, **{"budget": "blocks", "blocks": listed} | ROUTERS[router])
    if router == "mass":
        config = with_router(config, fraction=min(1.0, 2 * fraction))
    if router == "gates":
        config = with_router(config, fraction=1.0)
        plan, mixers = config.curriculum, config.model.mixers
        config = config.replace(
            curriculum__peak=1.0,
            curriculum__weighs="cost",
            # λ weighs the mean over layers, most of whose cost is that of the block layers.
            curriculum__target=fraction * mixers.count("block") / len(mixers),
            curriculum__ramp_steps=plan.hold_steps // 2,
            curriculum__hold_steps=plan.hold_steps - plan.hold_steps // 2,
        )
    return config


def control(config: TrainConfig, name: str) -> TrainConfig:
    """A run without routing: 'full', 'linear', 'conv', or 'window-1k', which sees 1,024 tokens.

    The convolution has the parameters of the others, in a wider MLP.
    """
    if name == "conv":
        return convolution_only(config)
    if name == "window-1k":
        blocks = WINDOW // config.model.blocks.block_kv
        return with_router(config, kind="window", sinks=0, budget="blocks", blocks=blocks)
    return config.replace(model__layers=config.model.layers.replace("block", name))


def tuning_steps(config: TrainConfig) -> int:
    """Steps that a variant takes after its base: half of the base's hold.

    >>> tuning_steps(get_preset("block-lm"))
    450
    """
    return config.curriculum.hold_steps // 2


def from_the_start(config: TrainConfig) -> TrainConfig:
    """The run with the steps that a base and what follows it take together."""
    plan = config.curriculum
    return config.replace(curriculum__hold_steps=plan.hold_steps + tuning_steps(config))


def tuned(config: TrainConfig, start_from: str, steps: int) -> TrainConfig:
    """The run as one that goes on from another, at half the learning rate."""
    return config.replace(
        start_from=start_from,
        curriculum__lengths=(),
        curriculum__learn_steps=0,
        curriculum__ramp_steps=0,
        curriculum__hold_steps=steps,
        curriculum__explore_fades=False,  # there is no other phase in which to distil or balance
        optimizer__learning_rate=config.optimizer.learning_rate / 2,
    )


def variant_config(base: TrainConfig, variant: str, folder: Callable[[str], str]) -> TrainConfig:
    """The run of a variant: a control, 'distil', or a router and its budget in percent.

    Args:
      base: the task's preset.
      variant: its name; 'learned+scratch-25' is 'learned-25' trained from the start, as
        'full+scratch' is 'full'.
      folder: from another variant's name to the folder of its run.

    >>> variant_config(get_preset("block-lm"), "pooled-12", str).model.blocks.blocks
    8
    """
    steps = tuning_steps(base)
    if variant == "base":
        return control(base, "full")
    if variant == "full":
        return tuned(control(base, "full"), folder("base"), steps)
    if variant == "distil":  # attention everywhere, while an indexer learns where it looks
        config = with_router(base, kind="indexer", fraction=1.0, distil=True)
        return tuned(config, folder("base"), steps // 2).replace(curriculum__explore=1.0)
    router, _, percent = variant.rpartition("-")
    if not percent.isdigit():
        return from_the_start(control(base, variant.removesuffix("+scratch")))
    name, _, scratch = router.partition("+")
    if scratch:
        return routed(from_the_start(base), name, int(percent))
    if name == "indexer":
        return tuned(routed(base, name, int(percent)), folder("distil"), steps - steps // 2)
    return routed(tuned(base, folder("base"), steps), name, int(percent))


def _variants(strongest: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Variants and seeds by need: cut anywhere, what was made is a comparison that can be read."""
    main = dict.fromkeys((*strongest, *BASELINES))
    yield from itertools.product(("base", "full", "window-1k"), range(SEEDS))
    yield "full+scratch", 0
    yield "distil", 0
    for percent in (25, 12):
        yield from ((f"{router}-{percent}", 0) for router in ROUTERS)
    for seed in range(1, SEEDS):
        if "indexer" in main:
            yield "distil", seed
        for percent in (25, 12):
            yield from ((f"{router}-{percent}", seed) for router in main)
    yield from ((name, 0) for name in ("linear", "conv"))
    yield from ((f"{router}+scratch-25", 0) for router in main if router != "indexer")
    for percent in (5, 50):
        yield from ((f"{router}-{percent}", 0) for router in main)


def runs(
    text: str = "stdlib",
    scratch: str = "runs/reproduce",
    strongest: Sequence[str] = STRONGEST,
) -> Iterator[Run]:
    """All runs of the experiment, in the order in which they are made.

    Where a budget pays for no block besides a row's own and the sinks, no router has a choice and
    none is run: at 5 %, everywhere but on text.

    Args:
      text: corpus of the language-model runs.
      scratch: where the runs stand; one that goes on from another finds it there.
      strongest: routers with several seeds, and all budgets.
    """
    for variant, seed in _variants(strongest):
        for task in TASKS:
            base = get_preset(task)
            if isinstance(base.data, TextConfig):
                base = base.replace(data__source=text)
            percent = variant.rpartition("-")[2]
            if percent.isdigit() and blocks_listed(base, int(percent)) <= base.model.blocks.forced:
                continue

            def folder(other: str, task: str = task, seed: int = seed) -> str:
                return str(epath.Path(scratch) / EXPERIMENT / f"{task}_{other}_s{seed}")

            config = variant_config(base, variant, folder)
            yield Run(task, variant, seed, config.replace(seed=seed))


def output_errors(config: TrainConfig, params: Any, tokens: Any) -> list[Row]:
    """Output error of routers in a distilled model, at several shares of the blocks and lengths.

    Args:
      config: a 'distil' run.
      params: its parameters.
      tokens: [B,T] int32, held out.
    """
    blocks, length = config.model.blocks, config.data.length
    routers = {
        f"{name}-{percent}": dataclasses.replace(
            blocks, distil=False, budget="fraction", fraction=percent / 100, **ROUTERS[name]
        )
        for name in ("indexer", "pooled", "random", "sink-window")
        for percent in (5, 12, 25)
    }
    lengths = [length // share for share in (8, 4, 2, 1)]
    return attention_errors(config.model, params, tokens, routers, lengths)


def with_details(run: Run, result: Result, workdir: epath.Path) -> Result:
    """The result with what only this experiment measures.

    Use by head; of text, bits by position; and of the first distilled model, output errors.
    """
    config, params, _ = load_run(workdir)
    size = max(1, min(_SHOWN, config.batch_tokens // config.data.length))
    stream = batches(config.data, split="validation", seed=config.seed, batch_size=size)
    shown = list(itertools.islice(stream, -(-_SHOWN // size)))
    details: dict[str, object] = {
        "head_usage": head_usage(config.model, params, shown[0].tokens),
    }
    if isinstance(config.data, TextConfig):
        edges = position_edges(config.data.length)
        nats = loss_by_position(config.model, params, shown, edges)
        details |= {"edges": edges, "bits_per_byte": [n / float(np.log(2)) for n in nats]}
        if run.variant == "distil" and run.seed == 0:
            details["attention_error"] = output_errors(config, params, shown[0].tokens[:2])
    return dataclasses.replace(result, details=details)


def reproduce(args: BlockRoutingArgs) -> int:
    """Makes every missing run that `only` names, then renders; returns the exit code."""
    planned = runs(args.text, args.scratch, args.strongest)
    results = make_missing(EXPERIMENT, args, planned, with_details)
    if results:
        folder = epath.Path(args.out) / EXPERIMENT
        (folder / "table.md").write_text(block_routing_text(results) + "\n")
        plot_block_routing(results, folder)
    return 0
