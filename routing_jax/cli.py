"""The command line: one small function a command."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from routing_jax.evals.benchmarks import (
    attention,
    block_routing,
    mixing,
    serve_path,
    tpu_schedule,
)
from routing_jax.evals.benchmarks.attention import AttentionBenchConfig
from routing_jax.evals.benchmarks.attention_flex import leave_memory_for_torch
from routing_jax.evals.benchmarks.block_routing import BlockRoutingBenchConfig
from routing_jax.evals.benchmarks.mixing import MixingBenchConfig
from routing_jax.evals.benchmarks.serve_path_config import ServePathConfig, take_all_memory
from routing_jax.evals.benchmarks.tpu_schedule import TpuScheduleConfig
from routing_jax.generate import TextModel
from routing_jax.generate.progress import PrefillBar
from routing_jax.sharding import make_mesh
from routing_jax.train.command import EXIT_BAD_INPUT, guarded, parse, step_flag, train_command
from routing_jax.train.config import MeshConfig
from routing_jax.train.presets import PRESETS


@dataclass(frozen=True)
class EvalArgs:
    """Evaluate a trained run on held-out sequences.

    Attributes:
      workdir: the run's folder.
      step: which checkpoint; the newest when not given.
      length: sequence length; the task's own when not given.
      mesh: how the devices here are laid out; not the run's own, which may have had others.
    """

    workdir: Annotated[str, tyro.conf.Positional]
    step: int | None = None
    length: int | None = None
    mesh: MeshConfig = field(default_factory=MeshConfig)


def eval_command(args: Sequence[str]) -> int:
    """Prints what a trained model gets right, and what it spends."""
    parsed = parse(EvalArgs, args, "routing-jax eval")
    from routing_jax.train.base import evaluate_routers
    from routing_jax.train.run import evaluate_run, load_run

    mesh = make_mesh(parsed.mesh.data, parsed.mesh.fsdp, parsed.mesh.tensor)
    with step_flag("--step"):
        config, params, step = load_run(parsed.workdir, parsed.step, mesh)
    if config.base:
        length = parsed.length or config.data.length
        config = config.replace(data__length=length, batch_tokens=max(length, config.batch_tokens))
        print(f"step           {step}")
        for task, scores in evaluate_routers(config, params, mesh).items():
            print(
                f"{task:<14} right {scores.right.mean():.3%}, loss {scores.nll.mean():.4f}, "
                f"sparse layers {scores.sparsity.mean():.2%}"
            )
        return 0
    result = evaluate_run(config, params, mesh, length=parsed.length)
    print(f"step           {step}")
    for name, value in result._asdict().items():
        text = ", ".join(f"{v:.5f}" for v in value) if isinstance(value, tuple) else f"{value:.6g}"
        print(f"{name:<14} {text}")
    return 0


def presets_command(args: Sequence[str]) -> int:
    """Lists the presets."""
    if args:
        raise ValueError(f"presets takes no argument; {args[0]!r} was given.")
    for name, make in PRESETS.items():
        config = make()
        print(
            f"{name:<22} {type(config.data).__name__.removesuffix('Config').lower()}, length "
            f"{config.data.length}, layers {config.model.layers}, width {config.model.width}"
        )
    return 0


@dataclass(frozen=True)
class PrepareArgs:
    """Write a tfds data set (array_record) from text files.

    Attributes:
      source: a file or folder of text, or 'stdlib'.
      out: folder of the new data set; use it as --data.source.
      name: the data set's name.
    """

    source: Annotated[str, tyro.conf.Positional]
    out: Annotated[str, tyro.conf.Positional]
    name: str = "text"


def data_command(args: Sequence[str]) -> int:
    """Runs `data prepare SOURCE OUT`."""
    if not args or args[0] != "prepare":
        raise ValueError(
            f"data takes 'prepare SOURCE OUT'; {' '.join(args) or 'nothing'} was given."
        )
    parsed = parse(PrepareArgs, args[1:], "routing-jax data prepare")
    from routing_jax.train.data.prepare import prepare

    print(f"written to {prepare(parsed.source, parsed.out, parsed.name)}")
    return 0


def reproduce_command(args: Sequence[str]) -> int:
    """Runs `reproduce NAME`."""
    from routing_jax.train.experiments import block_routing, flux, moas, routed_attention
    from routing_jax.train.experiments.block_routing import BlockRoutingArgs
    from routing_jax.train.experiments.flux import FluxArgs
    from routing_jax.train.experiments.moas import MoasArgs
    from routing_jax.train.experiments.routed_attention import RoutedAttentionArgs

    names: dict[str, tuple[type, Callable[..., int]]] = {
        "routed-attention": (RoutedAttentionArgs, routed_attention.reproduce),
        "moas": (MoasArgs, moas.reproduce),
        "block-routing": (BlockRoutingArgs, block_routing.reproduce),
        "flux": (FluxArgs, flux.reproduce),
    }
    if not args or args[0] not in names:
        raise ValueError(
            f"reproduce takes one of {', '.join(names)}; {args[0] if args else 'nothing'!r} was "
            "given."
        )
    kind, reproduce = names[args[0]]
    return reproduce(parse(kind, args[1:], f"routing-jax reproduce {args[0]}"))


@dataclass(frozen=True)
class GenerateArgs:
    """Continue a text with a published model.

    Attributes:
      model: a Hugging Face folder (config.json, safetensors, tokenizer.json) or a GGUF file.
      prompt: the text before.
      prompt_file: a file of it instead.
      router: a file of layer routers trained for this model: each layer then attends fully or
        sparsely, as the prompt decides; without, all layers attend fully.
      max_new_tokens: the most tokens to make.
      temperature: of sampling; 0 takes the most likely token.
      top_k: how many of the most likely tokens can be drawn; 0 for all.
      top_p: the sum of probabilities from which on less likely tokens cannot be drawn.
      seed: of the draws.
      dtype: of the weights and the computation.
      pages: the most pages (of 128 tokens in one layer) that keys and values may take; as many as
        the text takes with every layer dense when not given. With a router, fewer may do.
    """

    model: Annotated[str, tyro.conf.Positional]
    prompt: str | None = None
    prompt_file: str | None = None
    router: str | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    pages: int | None = None

    def __post_init__(self):
        if (self.prompt is None) == (self.prompt_file is None):
            raise ValueError("give either --prompt or --prompt-file.")


def generate_command(args: Sequence[str]) -> int:
    """Prints a text's continuation as it is made."""
    parsed = parse(GenerateArgs, args, "routing-jax generate")
    text = parsed.prompt or ""
    if parsed.prompt_file is not None:
        try:
            text = Path(parsed.prompt_file).read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise ValueError(f"{parsed.prompt_file} is not UTF-8 text: {e}.") from e
    model = TextModel(parsed.model, parsed.router, parsed.dtype, parsed.pages)
    with PrefillBar() as bar:
        pieces = model.stream(
            text,
            parsed.max_new_tokens,
            temperature=parsed.temperature,
            top_k=parsed.top_k,
            top_p=parsed.top_p,
            seed=parsed.seed,
            progress=bar.show,
        )
        for piece in pieces:
            print(piece, end="", flush=True)
    print()
    return 0


@dataclass(frozen=True)
class BenchArgs:
    """Measure how fast mixing gets as fewer tokens attend.

    Attributes:
      config: what is measured.
      out: the JSON file to write.
    """

    config: Annotated[MixingBenchConfig, tyro.conf.arg(name="")]
    out: str = "runs/bench/mixing.json"


@dataclass(frozen=True)
class BenchAttentionArgs:
    """Measure block-sparse attention beside dense attention and FlexAttention.

    Attributes:
      config: what is measured.
      out: the JSON file to write; a plot goes beside it.
    """

    config: Annotated[AttentionBenchConfig, tyro.conf.arg(name="")]
    out: str = "runs/bench/attention.json"


@dataclass(frozen=True)
class BenchBlockRoutingArgs:
    """Measure block routing, router and table included, beside dense attention.

    Attributes:
      config: what is measured.
      out: the JSON file to write; a plot goes beside it.
    """

    config: Annotated[BlockRoutingBenchConfig, tyro.conf.arg(name="")]
    out: str = "runs/bench/block-routing.json"


@dataclass(frozen=True)
class BenchTpuScheduleArgs:
    """Count what the TPU compiler makes of block-sparse attention, beside splash attention.

    It needs no TPU, and is blind to waiting for main memory: an estimate, not a measurement.

    Attributes:
      config: what is compiled.
      out: the JSON file to write; a plot goes beside it.
    """

    config: Annotated[TpuScheduleConfig, tyro.conf.arg(name="")] = field(
        default_factory=TpuScheduleConfig
    )
    out: str = "runs/bench/tpu-schedule.json"


@dataclass(frozen=True)
class BenchServePathArgs:
    """Measure prefill and decode with routed layers beside the same model dense.

    Attributes:
      config: what is measured.
      out: the JSON file to write.
    """

    config: Annotated[ServePathConfig, tyro.conf.arg(name="")]
    out: str = "runs/bench/serve-path.json"


def bench_command(args: Sequence[str]) -> int:
    """Runs one of the benchmarks by its name."""
    name = args[0] if args else "nothing"
    if name == "mixing":
        default = BenchArgs(mixing.default_config())
        parsed = parse(BenchArgs, args[1:], "routing-jax bench mixing", default)
        mixing.main(parsed.config, Path(parsed.out))
    elif name == "attention":
        leave_memory_for_torch()  # before default_config starts the device
        default_attention = BenchAttentionArgs(attention.default_config())
        wanted = parse(
            BenchAttentionArgs, args[1:], "routing-jax bench attention", default_attention
        )
        attention.main(wanted.config, Path(wanted.out))
    elif name == "block-routing":
        block_routing.take_all_memory()  # before default_config starts the device
        default_routing = BenchBlockRoutingArgs(block_routing.default_config())
        title = "routing-jax bench block-routing"
        routing = parse(BenchBlockRoutingArgs, args[1:], title, default_routing)
        block_routing.main(routing.config, Path(routing.out))
    elif name == "serve-path":
        take_all_memory()  # before default_config starts the device
        default_path = BenchServePathArgs(serve_path.default_config())
        path = parse(BenchServePathArgs, args[1:], "routing-jax bench serve-path", default_path)
        serve_path.main(path.config, Path(path.out))
    elif name == "tpu-schedule":
        asked = parse(BenchTpuScheduleArgs, args[1:], "routing-jax bench tpu-schedule")
        tpu_schedule.main(asked.config, Path(asked.out))
    else:
        raise ValueError(
            "bench takes 'mixing', 'attention', 'block-routing', 'serve-path' or 'tpu-schedule'; "
            f"{name!r} was given."
        )
    return 0


@dataclass(frozen=True)
class ReportArgs:
    """Draw the plots of result files and bring the README's tables up to date.

    Attributes:
      results: the results folder.
      readme: the Markdown file with the table blocks; empty to draw only.
    """

    results: str = "evals/results"
    readme: str = "README.md"


def report_command(args: Sequence[str]) -> int:
    """Runs `report`."""
    from routing_jax.evals.report import report

    parsed = parse(ReportArgs, args, "routing-jax report")
    report(parsed.results, parsed.readme or None)
    return 0


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (train_command, "PRESET --workdir DIR: train, with any field changed"),
    "eval": (eval_command, "DIR: evaluate a trained run"),
    "presets": (presets_command, "list the presets"),
    "reproduce": (reproduce_command, "NAME: run an experiment and render its table and plots"),
    "report": (report_command, "plots and README tables from result files"),
    "data": (data_command, "prepare SOURCE OUT: write a data set from text files"),
    "generate": (
        generate_command,
        "MODEL --prompt TEXT: continue a text, with routed layers or not",
    ),
    "bench": (bench_command, "NAME: measure speed"),
}


def _dispatch(args: Sequence[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print("usage: routing-jax COMMAND ...\n")
        for name, (_, text) in COMMANDS.items():
            print(f"  {name:<10} {text}")
        print("\n`routing-jax COMMAND --help` explains the command's flags.")
        return 0 if args else EXIT_BAD_INPUT
    if args[0] not in COMMANDS:
        raise ValueError(f"command {args[0]!r} is unknown; accepted: {', '.join(COMMANDS)}.")
    return COMMANDS[args[0]][0](args[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """The `routing-jax` command; returns the exit code."""
    return guarded(_dispatch, sys.argv[1:] if argv is None else argv)
