"""Block routing measured: routers, controls and budgets on recall, needles and text.

A model learns with attention everywhere ('base'), and from it every variant goes on under its rows:
dense train, then sparse fine-tune, the recipe that is known to work, and a fraction of the time
of training each from the start. 'full' goes on with attention everywhere. All of them take equally
many steps and read the same batches, those that follow their base's, on text half as large. An
indexer is first taught where its base looks ('distil'), which leaves the base's own parameters as
they are, and then taught on, of a quarter of the tiles, while its model learns to do with what it
lists. What cannot go on, the model limited to 1,024 tokens, linear attention and convolutions, is
trained as the base is and compared with it; so, on text, are the routers named '+scratch'. Those
named '+distilled' have gates, which attention teaches, and begin as the indexer does.

Of the seeds of what is compared, the first chooses (which routers are followed up, which router and
which fixed pattern is best) and the others say by how much.

Command: `routing-jax reproduce block-routing --text FOLDER --jobs 5` (a run on text takes an
estimated 8 GiB of the GPU, all others about 2); `--list` names the runs, `--only REGEX` and
`--max-minutes N` cut it to fit; finished runs are skipped and interrupted ones resumed.
`--only 'block-lm_(base|window-1k)_s0'` first: where attention everywhere does not beat the same
model limited to 1,024 tokens by 2 % bits per byte, a text cannot test routing.
Hardware and time: 375 runs, an estimated 110 minutes of one H200 with a dozen jobs; seed 0 is more
than half of all. Jobs side by side compile meanwhile. A base that is made again is another one: of
text, what went on from another than its seed's `full` is scaled by the two bases' losses, and it is
named in any case. Who turns autotuning off (XLA_FLAGS) should turn off XLA's own products of
matrices as well (--xla_gpu_enable_triton_gemm=false), or a step takes seven times as long. In their
order the runs can be cut anywhere. What a run goes on from is made before it, and again where its
folder is lost.
Expect: attention everywhere solves recall and needles. Gates find 99 % in MQAR at an eighth of its
cost, of 2,048 to 8,192 tokens, 90 % of four needles at a quarter and have 0.7 % more bits per byte
of text at a ninth, an indexer finds one needle, and within a quarter nobody the right one of four
as attention does. Gates that begin as an indexer with learned pooling are near the best in all of
them (seed 0). Linear attention finds one needle, and 91 % of four (README).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from routing_jax.attention import HeadsConfig, attention_work
from routing_jax.evals.attention_error import Row, attention_errors
from routing_jax.evals.by_position import head_usage, loss_by_position, position_edges
from routing_jax.evals.report import BLOCK_ROUTING as EXPERIMENT
from routing_jax.evals.report import block_routing_text, made_twice, plot_block_routing
from routing_jax.evals.results import Result, read_result
from routing_jax.routers import BlockRouterConfig, block_router_work
from routing_jax.train.config import TrainConfig
from routing_jax.train.data import NeedleConfig, TextConfig, batches
from routing_jax.train.experiments.experiment import ReproduceArgs, Run, make_missing
from routing_jax.train.experiments.routed_attention import convolution_only
from routing_jax.train.presets import get_preset
from routing_jax.train.run import load_run, read_config

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
    # Each with the learned pooling of a block's tokens instead of their mean.
    "weighed": {"kind": "indexer", "pooling": "learned"},
    "weighed-gates": {"kind": "learned", "budget": "gates", "pooling": "learned"},
    # Distillation says which blocks are worth more than others, gates how many are worth it.
    "indexer-gates": {"kind": "indexer", "budget": "gates"},
    "random": {"kind": "random"},
    "window": {"kind": "window", "sinks": 0, "local": 0},
    "sink-window": {"kind": "window", "local": 0},
    "strided": {"kind": "strided", "local": 0},
    "bigbird": {"kind": "bigbird", "local": 0},
    # Each head learns how much it reads, or how near, and nothing about what.
    "random-gates": {"kind": "random", "budget": "gates"},
    "window-gates": {"kind": "window", "budget": "gates"},
}
# By seed 0; of several needles the latter as well.
STRONGEST = ("gates", "indexer", "gates+distilled")
STRONG_FOR_SEVERAL = ("weighed",)
BASELINES = ("random", "sink-window", "window-gates")  # what a learned router must beat
TASKS = ("block-lm", "block-mqar-2048", "block-needle-4096", "block-multi-needle-4096")
# Recall again, of more tokens: the router that finds most of it, and what it must beat, by seed 0.
LONGER = ("block-mqar-4096", "block-mqar-8192")
_OF_LONGER = ("gates", *BASELINES)
SEEDS = 3  # where a difference is to be judged: one that chooses, two that compare
FROM_THE_START = ("gates", "random")  # routers that are also trained without a base
# Routers that also begin as the indexer that was distilled, of their own pooling.
DISTILLED = ("learned", "gates", "weighed-gates")
TEACHERS = {"distil": "indexer", "distil-weighed": "weighed"}  # runs that distil, and what
_SCREENED = (*ROUTERS, *(f"{router}+distilled" for router in DISTILLED))
_SMALLER = 4  # times, batches that a router alone is trained on
_SMALLER_OF_TEXT = 2  # times, batches of what goes on from a base: each of their tokens teaches
_STILL_DISTILLED = 0.25  # of the tiles, while the model learns to do with what an indexer lists
_COMPARED = ("indexer", "pooled", "random", "sink-window")  # by output error
_NEARLY = 1.5  # times a budget that the least choice may cost
# Whose gates answer λ late, and by how many steps it foresees cost then: by what is, cost fell to
# two thirds of the budget and less. `mass` is helped most.
_LATE = ("mass", "random-gates", "indexer-gates")
_FORESEEN = 30


@dataclass(frozen=True)
class BlockRoutingArgs(ReproduceArgs):
    """Run an experiment, or what is missing of it, then render its table and plots.

    Attributes:
      text: corpus of the language-model runs, as --data.source takes it.
      strongest: the routers that get several seeds at 12 and 25 %, and one at 5 and 50 %. They are
        chosen by seed 0 of all: what is compared are the other seeds.
    """

    text: str = "stdlib"
    strongest: tuple[str, ...] = STRONGEST

    def __post_init__(self):
        super().__post_init__()
        for router in self.strongest:
            if router not in _SCREENED:
                raise ValueError(f"strongest holds {router!r}; accepted: {', '.join(_SCREENED)}.")


def with_router(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The run with some fields of its block router changed."""
    return config.replace(model__blocks=dataclasses.replace(config.model.blocks, **changes))


@functools.cache
def _router_share(router: BlockRouterConfig, length: int, heads: HeadsConfig, width: int) -> float:
    """The router's multiply-adds ÷ those of dense attention, of a whole sequence."""
    seen = np.arange(0, length, router.block_q) // router.block_kv + 1
    pairs = float(seen.sum()) * router.block_q * router.block_kv
    work = block_router_work(
        router,
        tokens=length,
        tiles=len(seen),
        blocks=-(-length // router.block_kv),
        width=width,
        kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
    )
    return work / attention_work(pairs, heads.num_heads, heads.head_dim)


def _fields(router: str, percent: int) -> dict[str, Any]:
    """What makes a router at a budget, besides how many blocks it lists."""
    fields = {"budget": "blocks"} | ROUTERS[router]
    if router == "clusters":
        # Nominally twice the budget, as clusters are uneven; what is too much, scores decide.
        fields["clusters"] = max(2, round(50 / percent))
    return fields


def blocks_listed(config: TrainConfig, router: str, percent: int) -> int:
    """How many blocks a row lists for a sequence to cost that percentage; short rows are dense.

    The router's own work is in it: under 0.1 % of attention's, but in recall, where every query is
    routed, up to 4 %, for which fixed patterns list more blocks. A budget that nearly pays for a
    choice pays for one block at least.

    A share of what each row sees would cost the same, and leave early rows nothing to choose: a
    query that comes soon after what it asks for could then be answered by no router.

    >>> [blocks_listed(get_preset("block-lm"), "learned", percent) for percent in (5, 12, 25, 50)]
    [4, 8, 17, 38]
    """
    blocks = config.model.blocks
    seen = np.arange(1, -(-config.data.length // blocks.block_kv) + 1)
    counts = range(blocks.forced, len(seen) + 1)
    costs = np.array([np.minimum(count, seen).sum() / seen.sum() for count in counts])

    def nearest(cost: float) -> int:
        return counts[int(np.argmin(np.abs(costs - cost)))]

    listed = nearest(percent / 100)
    if listed == blocks.forced and costs[1] > _NEARLY * percent / 100:
        return listed
    asked = with_router(config, blocks=listed, **_fields(router, percent)).model
    share = _router_share(asked.blocks, config.data.length, asked.heads, asked.width)
    return max(nearest(percent / 100 - share), blocks.forced + 1)


def routed(config: TrainConfig, router: str, percent: int) -> TrainConfig:
    """The run with a router at a budget: what both cost is that percentage of attention.

    For gates and 'mass' λ rises until cost is down to it; clusters of even size would hold twice
    the budget.
    """
    fraction = percent / 100
    listed = blocks_listed(config, router, percent)
    config = with_router(config, blocks=listed, **_fields(router, percent))
    if config.model.blocks.budget in ("gates", "mass"):
        config = with_router(config, fraction=1.0)
        plan, mixers = config.curriculum, config.model.mixers
        config = config.replace(
            # Up to 1.0, λ grew faster than gates close: cost fell to half the budget, and with it
            # what had been learned.
            curriculum__peak=0.4,
            curriculum__weighs="cost",
            # λ weighs the mean over layers, most of whose cost is that of the block layers.
            curriculum__target=fraction * mixers.count("block") / len(mixers),
            curriculum__ramp_steps=plan.hold_steps // 2,
            curriculum__hold_steps=plan.hold_steps - plan.hold_steps // 2,
            **_price_rule(config, router),
        )
    return config


def _several_needles(config: TrainConfig) -> bool:
    return isinstance(config.data, NeedleConfig) and config.data.num_needles > 1


def _price_rule(config: TrainConfig, router: str) -> dict[str, Any]:
    """How λ comes to a target, by the task and how gates answer.

    Of several needles, gates must know which one is asked for before they close: by what is spent
    alone λ closed them first, down to 0.6 of the budget, and what had closed stayed so.
    """
    if _several_needles(config):
        course = config.curriculum.hold_steps // 2
        rule = {"course": course, "foresight": _FORESEEN, "reward": 1.0}
    else:
        rule = {"foresight": _FORESEEN if router in _LATE else 0}
    return {f"curriculum__{name}": value for name, value in rule.items()}


def control(config: TrainConfig, name: str) -> TrainConfig:
    """A run without routing: 'full', 'linear', 'conv', or 'window-1k', which sees 1,024 tokens.

    The convolution has the parameters of the others, in a wider MLP.
    """
    if name == "conv":
        return convolution_only(config)
    if name == "window-1k":  # whose rows need no small tiles
        size = max(64, config.model.blocks.block_kv)
        tiles = {"block_q": size, "block_kv": size, "blocks": WINDOW // size}
        return with_router(config, kind="window", sinks=0, budget="blocks", **tiles)
    return config.replace(model__layers=config.model.layers.replace("block", name))


def tuning_steps(config: TrainConfig) -> int:
    """Steps that a variant takes after its base: a third of the base's hold.

    >>> tuning_steps(get_preset("block-lm"))
    300
    """
    return config.curriculum.hold_steps // 3


def tuned(base: TrainConfig, config: TrainConfig, start_from: str) -> TrainConfig:
    """The run as one that goes on from a base, at half the learning rate, and reads on.

    Args:
      base: the task's preset.
      config: the run, of the same batches; those of text become half as large.
      start_from: the folder of the base, or of a run with the base's parameters.
    """
    smaller = _SMALLER_OF_TEXT if isinstance(base.data, TextConfig) else 1
    return config.replace(
        start_from=start_from,
        batch_tokens=base.batch_tokens // smaller,
        first_batch=base.curriculum.max_steps * smaller,
        curriculum__lengths=(),
        curriculum__learn_steps=0,
        curriculum__ramp_steps=0,
        curriculum__hold_steps=tuning_steps(base),
        curriculum__explore_fades=False,  # there is no other phase in which to distil or balance
        optimizer__learning_rate=base.optimizer.learning_rate / 2,
    )


def distilled(base: TrainConfig, start_from: str, router: str = "indexer") -> TrainConfig:
    """The run that teaches an indexer where its base looks: routers alone, of smaller batches.

    The base's parameters stay as they are, so that an indexer's model has been trained no longer
    than any other's. It reads what follows all that the base and what goes on from it do.
    """
    config = with_router(base, fraction=1.0, distil=1.0, **ROUTERS[router])
    plan = tuned(base, config, start_from)
    batch_tokens = base.batch_tokens // _SMALLER
    before = plan.first_batch + tuning_steps(base)  # batches of the others' size
    return plan.replace(
        routers_only=True,
        batch_tokens=batch_tokens,
        first_batch=before * plan.batch_tokens // batch_tokens,
        curriculum__explore=1.0,
        optimizer__learning_rate=base.optimizer.learning_rate,
    )


def variant_config(base: TrainConfig, variant: str, folder: Callable[[str], str]) -> TrainConfig:
    """The run of a variant: a control, one that distils, or a router and its budget in percent.

    Args:
      base: the task's preset.
      variant: its name; 'learned+scratch-25' is 'learned-25' trained from the start, and
        'learned+distilled-25' the same with the projections of the indexer that was distilled.
      folder: from another variant's name to the folder of its run.

    >>> variant_config(get_preset("block-lm"), "pooled-12", str).model.blocks.blocks
    8
    """
    if variant == "base":
        return control(base, "full")
    if variant == "full":
        return tuned(base, control(base, "full"), folder("base"))
    if variant in TEACHERS:
        return distilled(base, folder("base"), TEACHERS[variant])
    router, _, percent = variant.rpartition("-")
    if not percent.isdigit():
        return control(base, variant)
    name, _, start = router.partition("+")
    if start == "scratch":
        return routed(base, name, int(percent))
    before = folder(_teacher(router) or "base")
    # λ of 'gates' rises within what is tuned, so the budget is set last.
    config = routed(tuned(base, base, before), name, int(percent))
    if ROUTERS[name]["kind"] != "indexer":
        return config
    # Its projections would stay while what they project moves away: on text, loss grew as it did.
    return with_router(config, distil=_STILL_DISTILLED).replace(curriculum__explore=1.0)


def _teacher(router: str) -> str:
    """The run that distilled what a router begins as; "" where none did."""
    name, _, start = router.partition("+")
    fields = ROUTERS[name]
    if fields["kind"] != "indexer" and start != "distilled":
        return ""
    pooling = fields.get("pooling")
    return next(
        run for run, taught in TEACHERS.items() if ROUTERS[taught].get("pooling") == pooling
    )


def _variants(main: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Variants and seeds by need: cut anywhere, what was made is a comparison that can be read."""

    def compared(seed: int) -> Iterator[tuple[str, int]]:
        # Whether the text tests routing is a question to every seed.
        yield from ((name, seed) for name in ("base", "full", "window-1k"))
        yield from ((name, seed) for name in TEACHERS if name in map(_teacher, main))
        for percent in (25, 12):
            yield from ((f"{router}-{percent}", seed) for router in main)

    yield from ((name, 0) for name in ("base", "full", "window-1k", *TEACHERS))
    for percent in (25, 12):
        yield from ((f"{router}-{percent}", 0) for router in _SCREENED)
    for seed in range(1, SEEDS):
        yield from compared(seed)
    for percent in (50, 5):
        yield from ((f"{router}-{percent}", 0) for router in main)
    yield from ((name, 0) for name in ("linear", "conv"))
    yield from ((f"{router}+scratch-25", 0) for router in FROM_THE_START)


def _longer_variants() -> set[tuple[str, int]]:
    routed = (f"{router}-{percent}" for router in _OF_LONGER for percent in (25, 12))
    return {(name, 0) for name in ("base", "full", *routed)}


def _tests_something(base: TrainConfig, variant: str) -> bool:
    """Whether a task has a choice to offer at a variant's budget, and any use for the variant."""
    router, _, percent = variant.rpartition("-")
    name, _, start = router.partition("+")
    if start == "scratch" and not isinstance(base.data, TextConfig):
        return False
    if not percent.isdigit():
        return True
    return blocks_listed(base, name, int(percent)) > base.model.blocks.forced


def runs(
    text: str = "stdlib",
    scratch: str = "runs/reproduce",
    strongest: Sequence[str] = STRONGEST,
) -> Iterator[Run]:
    """All runs of the experiment, in the order in which they are made.

    Where a budget pays for no block besides a row's own and the sinks, no router can do it and none
    is run: at 5 %, everywhere but on text. Only on text, too, is anything routed trained from the
    start. Longer recall has few runs, whatever `strongest` is.

    Args:
      text: corpus of the language-model runs.
      scratch: where the runs stand; one that goes on from another finds it there.
      strongest: routers with several seeds, and all budgets; of several needles there are more.
    """
    everywhere = set(_variants((*strongest, *BASELINES)))
    several = dict.fromkeys(_variants((*strongest, *STRONG_FOR_SEVERAL, *BASELINES)))
    longer = _longer_variants()
    for variant, seed in several:
        for task in (*TASKS, *LONGER):
            base = get_preset(task)
            if isinstance(base.data, TextConfig):
                base = base.replace(data__source=text)
            planned: Container[tuple[str, int]] = longer
            if task not in LONGER:
                planned = several if _several_needles(base) else everywhere
            if (variant, seed) not in planned or not _tests_something(base, variant):
                continue

            def folder(other: str, task: str = task, seed: int = seed) -> str:
                return str(epath.Path(scratch) / EXPERIMENT / f"{task}_{other}_s{seed}")

            config = variant_config(base, variant, folder)
            yield Run(task, variant, seed, config.replace(seed=seed))


def output_errors(
    config: TrainConfig, params: Any, tokens: Any, compared: Sequence[str]
) -> list[Row]:
    """Output error of routers in a distilled model, at several shares of the blocks and lengths.

    Args:
      config: of a run that distils.
      params: its parameters.
      tokens: [B,T] int32, held out.
      compared: the routers, of its pooling.
    """
    blocks, length = config.model.blocks, config.data.length
    routers = {
        f"{name}-{percent}": dataclasses.replace(
            blocks, distil=0.0, budget="fraction", fraction=percent / 100, **ROUTERS[name]
        )
        for name in compared
        for percent in (5, 12, 25)
    }
    lengths = [length // share for share in (8, 4, 2, 1)]
    return attention_errors(config.model, params, tokens, routers, lengths)


def _base_of(config: TrainConfig) -> epath.Path:
    """The folder of the run that all before a run went on from."""
    folder = epath.Path(config.start_from)
    before = read_config(folder)
    return _base_of(before) if before.start_from else folder


def with_details(run: Run, result: Result, workdir: epath.Path) -> Result:
    """The result with what only this experiment measures.

    Use by head; the loss of the base that it went on from, which tells it from another of the same
    seed; of text, bits by position; and of the first distilled model, output errors.
    """
    config, params, _ = load_run(workdir)
    size = max(1, min(_SHOWN, config.batch_tokens // config.data.length))
    stream = batches(config.data, split="validation", seed=config.seed, batch_size=size)
    shown = list(itertools.islice(stream, -(-_SHOWN // size)))
    details: dict[str, object] = {
        "head_usage": head_usage(config.model, params, shown[0].tokens),
    }
    if run.config.start_from:
        details["start_loss"] = read_result(_base_of(run.config) / "result.json").loss
    if isinstance(config.data, TextConfig):
        edges = position_edges(config.data.length)
        nats = loss_by_position(config.model, params, shown, edges)
        details |= {"edges": edges, "bits_per_byte": [n / float(np.log(2)) for n in nats]}
        if run.variant in TEACHERS and run.seed == 0:
            compared = _COMPARED if run.variant == "distil" else (TEACHERS[run.variant],)
            found = output_errors(config, params, shown[0].tokens[:2], compared)
            details["attention_error"] = found
    return dataclasses.replace(result, details=details)


def reproduce(args: BlockRoutingArgs) -> int:
    """Makes every missing run that `only` names, then renders; returns the exit code."""
    planned = runs(args.text, args.scratch, args.strongest)
    results = make_missing(EXPERIMENT, args, planned, with_details)
    if results:
        folder = epath.Path(args.out) / EXPERIMENT
        text = block_routing_text(results, made_twice(args.out))
        (folder / "table.md").write_text(text + "\n")
        plot_block_routing(results, folder)
    return 0
