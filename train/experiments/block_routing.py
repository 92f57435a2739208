"""Block routing measured: routers, controls and budgets on recall, needles and text.

Command: `routing-jax reproduce block-routing --text FOLDER`; `--list` names the runs, `--only
REGEX` and `--max-minutes N` cut it to fit; finished runs are skipped and interrupted ones resumed.
`--only 'full|window-1k'` first: where attention everywhere does not beat the same model limited
to 1,024 tokens by 2 % bits per byte, a text cannot test routing.
Hardware and time: one H100; an estimated 10 to 30 minutes a run, and about 300 runs in all.
Expect: not measured yet.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from routing_jax.evals.by_position import head_usage, loss_by_position, position_edges
from routing_jax.evals.report import BLOCK_ROUTING as EXPERIMENT
from routing_jax.evals.report import plot_routers
from routing_jax.evals.results import Result
from routing_jax.evals.tables import block_routing_table
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
MAIN = ("learned", "pooled", "indexer", "random", "sink-window")
TASKS = ("block-mqar-2048", "block-lm", "block-needle-4096", "block-multi-needle-4096")


@dataclass(frozen=True)
class BlockRoutingArgs(ReproduceArgs):
    """Run an experiment, or what is missing of it, then render its table and plots.

    Attributes:
      text: corpus of the language-model runs, as --data.source takes it.
    """

    text: str = "stdlib"


def with_router(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The run with some fields of its block router changed."""
    return config.replace(model__blocks=dataclasses.replace(config.model.blocks, **changes))


def routed(config: TrainConfig, router: str, percent: int) -> TrainConfig:
    """The run with a router at a budget: that percentage of attention's cost.

    'mass' adapts within twice the budget; for 'gates' λ rises until cost is down to it.
    """
    fraction = percent / 100
    config = with_router(config, **ROUTERS[router], fraction=fraction)
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


def distilled(config: TrainConfig) -> TrainConfig:
    """Attention everywhere while an indexer learns where it looks: phase 1 of 'indexer'."""
    config = with_router(config, kind="indexer", fraction=1.0, distil=True)
    return config.replace(curriculum__explore=1.0)


def fine_tuned(config: TrainConfig, percent: int, start_from: str) -> TrainConfig:
    """Phase 2 of 'indexer': the rows of the distilled indexer, half as long at half the rate."""
    plan = config.curriculum
    return routed(config, "indexer", percent).replace(
        start_from=start_from,
        curriculum__lengths=(),
        curriculum__learn_steps=0,
        curriculum__hold_steps=(plan.learn_steps + plan.hold_steps) // 2,
        optimizer__learning_rate=config.optimizer.learning_rate / 2,
    )


def runs(text: str = "stdlib", scratch: str = "runs/reproduce") -> Iterator[Run]:
    """All runs of the experiment, in the order in which they are made.

    Args:
      text: corpus of the language-model runs.
      scratch: where the runs stand; a fine-tuned one starts from its distilled one there.
    """
    for task in TASKS:
        base = get_preset(task)
        if isinstance(base.data, TextConfig):
            base = base.replace(data__source=text)

        def planned(variant: str, config: TrainConfig, seeds: int, task: str = task):
            return [Run(task, variant, s, config.replace(seed=s)) for s in range(seeds)]

        yield from planned("full", control(base, "full"), 3)
        yield from planned("window-1k", control(base, "window-1k"), 3)
        for name in ("linear", "conv"):
            yield from planned(name, control(base, name), 1)
        yield from planned("distil", distilled(base), 3)
        for router, percent in itertools.product(ROUTERS, (25, 12, 50, 5)):
            variant = f"{router}-{percent}"
            for seed in range(3 if router in MAIN and percent in (12, 25) else 1):
                if router == "indexer":
                    before = epath.Path(scratch) / EXPERIMENT / f"{task}_distil_s{seed}"
                    config = fine_tuned(base, percent, str(before))
                else:
                    config = routed(base, router, percent)
                yield Run(task, variant, seed, config.replace(seed=seed))


def with_details(run: Run, result: Result, workdir: epath.Path) -> Result:
    """The result with what only this experiment measures: use by head, bits by position."""
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
    return dataclasses.replace(result, details=details)


def reproduce(args: BlockRoutingArgs) -> int:
    """Makes every missing run that `only` names, then renders; returns the exit code."""
    results = make_missing(EXPERIMENT, args, runs(args.text, args.scratch), with_details)
    if results:
        folder = epath.Path(args.out) / EXPERIMENT
        (folder / "table.md").write_text(block_routing_table(results) + "\n")
        plot_routers(results, folder)
    return 0
