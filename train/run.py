"""A whole run: check, plan, train, evaluate, and leave a folder that tells the story."""

import itertools
import json
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import routing_jax
from routing_jax.checkpoint import Checkpointer, CheckpointError
from routing_jax.evals.evaluate import Evaluation, evaluate, routed_tokens
from routing_jax.evals.mixing_time import mixing_milliseconds
from routing_jax.evals.plots import plot_heatmap, plot_history
from routing_jax.evals.provenance import all_devices, versions
from routing_jax.evals.results import Result, thin_history, write_result
from routing_jax.files import reached
from routing_jax.models import count_params, init_params
from routing_jax.models.pretrained import check_save_folder, load_pretrained
from routing_jax.sharding import make_mesh, put_batch
from routing_jax.train.base import calibrated_routers, finish_routers, with_base
from routing_jax.train.config import TrainConfig, config_from_dict, config_to_dict
from routing_jax.train.data import (
    CharacterConfig,
    PromptConfig,
    RecallConfig,
    TextConfig,
    TokenConfig,
    batches,
    window_count,
)
from routing_jax.train.finetune import MODEL_FOLDER, save_finetuned, with_published
from routing_jax.train.loop import Trained, abstract_state, load_base, train, train_mesh
from routing_jax.train.metrics import read_metrics
from routing_jax.train.step import init_state

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")  # those that a result depends on
_ROUTER = "['router']"  # in the path of its parameters
_EVAL_SEED_OFFSET = 1_000_003  # evaluation data of no training seed


def least_usage(config: TrainConfig) -> float | None:
    """The least mean usage that solves the task: its queries, each attending in one layer.

    None where usage does not count tokens.
    """
    if not isinstance(config.data, RecallConfig) or "block" in config.model.mixers:
        return None
    return config.data.floor() / (config.data.length * len(config.model.mixers))


def describe(config: TrainConfig) -> str:
    """What a run will do: parameters, mesh, tokens and estimated memory."""
    mesh = train_mesh(config)
    state = abstract_state(config, mesh)
    params = count_params(state.params)
    model = config.model
    split = mesh.shape["fsdp"] * mesh.shape["tensor"]
    tokens = config.batch_tokens // (config.accumulation * mesh.shape["data"] * mesh.shape["fsdp"])
    width_bytes = 2 if model.dtype == "bfloat16" else 4
    # Parameters, gradient and two moments in float32; of activations, what the backward pass
    # keeps: a block's inputs and its projections, or with remat its input and what attention gave
    # (of layer routing, in both branches); and the logits.
    heads = model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
    per_layer = 8 * model.width + heads + 4 * model.mlp_width
    if model.remat:
        per_layer = model.width + 2 * model.head_dim * model.num_heads
    activations = tokens * len(model.mixers) * per_layer * width_bytes
    logits = tokens * 12 * model.vocab_size
    memory = 16 * params / split + activations
    if isinstance(config.data, PromptConfig):  # which reads the answers alone, and freezes the base
        logits *= config.data.answer / config.data.length
        base = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        memory += width_bytes * count_params(base) / split
    most = config.curriculum.max_steps
    lines = [
        f"task        {type(config.data).__name__.removesuffix('Config').lower()}, "
        f"length {config.data.length}"
        + (f", after {', '.join(map(str, config.curriculum.lengths))}" if config.curriculum.lengths
           else ""),
        f"model       {params:,} parameters, layers {model.layers}, width {model.width}"
        + (f"; routers for {config.base}" if config.base else ""),
        "mesh        " + " × ".join(f"{k} {v}" for k, v in mesh.shape.items())
        + f" on {all_devices()}",
        f"tokens      {config.batch_tokens:,} a step, at most {most:,} steps, "
        f"{most * config.batch_tokens / 1e6:,.0f} M in all",
        f"memory      about {(memory + logits) / 2**20:,.0f} MiB a device",
    ]  # fmt: skip
    return "\n".join(lines)


def read_config(workdir: epath.Path) -> TrainConfig:
    """The configuration of the run in a folder.

    Raises:
      ValueError: there is none, or it is damaged or of another version.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise ValueError(f"{workdir} holds no run: there is no config.json in it.")
    try:
        return config_from_dict(json.loads(path.read_bytes()))
    except ValueError as e:
        raise ValueError(f"{path} cannot be read: {str(e).rstrip('.')}.") from e


def find_start(
    config: TrainConfig, workdir: str | epath.Path, *, resume: bool, resume_step: int | None = None
) -> int | None:
    """Where a run starts in its folder; nothing is written.

    Args:
      config: the run.
      workdir: its folder.
      resume: go on from the newest checkpoint, if there is one.
      resume_step: go on from this checkpoint.

    Returns:
      The checkpoint to restore, or None to start anew.

    Raises:
      ValueError: the folder holds a run and neither resume nor resume_step is given, or it holds
        later steps of another configuration than this, which would be mixed with this one's.
      CheckpointError: resume_step is not there.
    """
    workdir = reached(workdir, "workdir")
    path = workdir / "config.json"
    held = path.read_bytes() if path.exists() else None
    same = held == json.dumps(config_to_dict(config), indent=2).encode()
    with Checkpointer(workdir / "checkpoints") as checkpoints:
        steps = checkpoints.steps()
    if (held is not None or steps) and not resume and resume_step is None:
        raise ValueError(
            f"workdir {workdir} holds {'this' if same else 'a run with another'} "
            f"configuration{' already' if same else ''}; pass --resume to go on with it, or a new "
            "folder."
        )
    if resume_step is not None and resume_step not in steps:
        raise CheckpointError(
            f"resume_step is {resume_step}; {workdir} has checkpoints of steps {steps}."
        )
    later = [step for step in steps if resume_step is not None and step > resume_step]
    if later and not same:
        raise ValueError(
            f"resume_step is {resume_step}; {workdir} has later checkpoints, of steps {later}, "
            "with another configuration: remove them, or copy the folder without them."
        )
    if jax.process_count() > 1:
        # Each process has to look before the first one writes the configuration.
        multihost_utils.sync_global_devices("found where to start")
    if resume_step is not None:
        return resume_step
    return steps[-1] if steps else None


def load_run(
    workdir: str | epath.Path, step: int | None = None, mesh: Mesh | None = None
) -> tuple[TrainConfig, Any, int]:
    """A finished or interrupted run: its configuration, parameters and step.

    Args:
      workdir: the run's folder.
      step: which checkpoint; the newest when None.
      mesh: where the parameters go, whatever mesh they were trained on; copies on all devices here
        when None.

    Raises:
      ValueError: the folder holds no run, or no checkpoint.
    """
    workdir = reached(workdir, "workdir")
    config = read_config(workdir)
    mesh = mesh or make_mesh()
    with Checkpointer(workdir / "checkpoints") as checkpoints, jax.set_mesh(mesh):
        step = checkpoints.latest() if step is None else step
        if step is None:
            raise ValueError(f"{workdir} holds no checkpoint yet; resume the run to make one.")
        state, _ = checkpoints.restore(step, abstract_state(config, mesh))
    return config, state.params, step


def starting_parameters(config: TrainConfig) -> Any:
    """The parameters of the run or published model that `start_from` names, on this run's mesh.

    What the other run's routers lack is drawn from this run's seed, and so is the whole of a router
    that has other sizes there; layer routers of a base, all that such a run holds, are not.

    Raises:
      ValueError: there is no such run, or what is not drawn differs from this model's.
    """
    mesh = train_mesh(config)
    if isinstance(config.data, TokenConfig):
        scan = config.model.scan
        return load_pretrained(config.start_from, dtype="float32", scan=scan, mesh=mesh).params
    reached(config.start_from, "start_from")
    try:
        _, params, _ = load_run(config.start_from, mesh=mesh)
    except CheckpointError as e:  # whose intact step is no step of this run
        raise CheckpointError(f"start_from is {config.start_from!r}: {e}") from e
    like = abstract_state(config, mesh).params
    found, wanted = (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (params, like)
    )
    sizes = [{name: leaf.shape for name, leaf in tree.items()} for tree in (found, wanted)]
    differ = {name.partition(_ROUTER) for name, _ in sizes[0].items() ^ sizes[1].items()}
    if differ and (config.base or not all(router for _, router, _ in differ)):
        aside = "" if config.base else ", its routers aside"
        raise ValueError(
            f"start_from is {config.start_from!r}, whose model has other parameters; it must be a "
            f"run of a model with the same layers and sizes{aside}."
        )
    if not differ:
        return params
    others = tuple(
        "".join(name.partition(_ROUTER)[:2])
        for name in found.keys() & wanted.keys()
        if found[name].shape != wanted[name].shape
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    with jax.set_mesh(mesh):
        drawn = jax.jit(lambda: init_state(config).params, out_shardings=shardings)()

    def first(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        return leaf if name.startswith(others) else found.get(name, leaf)

    return jax.tree.map_with_path(first, drawn)


def evaluate_run(
    config: TrainConfig,
    params: Any,
    mesh: Mesh | None = None,
    *,
    first_place: bool = False,
    length: int | None = None,
) -> Evaluation:
    """Evaluates on held-out sequences of the task.

    Args:
      config: the run.
      params: its parameters.
      mesh: the one that the parameters are on; that of all devices here, as `load_run`'s, when
        None.
      first_place: recall only: the queried pair at positions 0–1, as published.
      length: T; the task's own when None.
    """
    mesh = mesh or make_mesh()
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    length = length or config.data.length
    size = max(1, min(config.eval_sequences, config.batch_tokens // length) // parts) * parts
    stream = batches(
        config.data,
        split="validation",
        seed=config.seed + _EVAL_SEED_OFFSET,
        batch_size=size,
        length=length,
        place="first" if first_place else "random",
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    wanted = config.eval_sequences
    if isinstance(config.data, TextConfig | CharacterConfig | TokenConfig):  # no window twice
        wanted = min(wanted, window_count(config.data, split="validation", length=length))
    count = -(-wanted // size)
    with jax.set_mesh(mesh):
        placed = (put_batch(batch, mesh) for batch in itertools.islice(stream, count))
        return evaluate(config.model, params, placed)


def finish_run(
    config: TrainConfig,
    workdir: str | epath.Path,
    trained: Trained,
    *,
    labels: dict[str, str],
    timed: bool = True,
) -> Result:
    """Evaluates a trained model and writes `result.json` and the plots.

    Args:
      config: the run.
      workdir: its folder.
      trained: the end of training.
      labels: experiment, task and variant names for the result.
      timed: whether mixing is timed, which compiles it once more.
    """
    workdir = epath.Path(workdir)
    params = trained.state.params
    mesh = train_mesh(config)
    held_out = evaluate_run(config, params, mesh)
    first = None
    if isinstance(config.data, RecallConfig) and config.data.style == "pairs":
        first = evaluate_run(config, params, mesh, first_place=True).accuracy
    sample = next(
        batches(config.data, split="validation", seed=config.seed + _EVAL_SEED_OFFSET, batch_size=1)
    )
    heat = None
    if jax.process_count() == 1 and "block" not in config.model.mixers:  # where tokens are routed
        heat = routed_tokens(config.model, params, sample.tokens)[0].astype(int).tolist()
    names = None
    if isinstance(config.data, RecallConfig):
        names = [config.data.token_name(int(token)) for token in sample.tokens[0]]
    result = Result(
        experiment=labels["experiment"],
        task=labels["task"],
        variant=labels["variant"],
        seed=config.seed,
        accuracy=held_out.accuracy,
        accuracy_first_place=first,
        loss=held_out.loss,
        bits_per_byte=held_out.loss / float(np.log(2))
        if isinstance(config.data, TextConfig)
        else None,
        usage=held_out.usage,
        usage_per_layer=list(held_out.usage_per_layer),
        cost=held_out.cost,
        kv_cost=held_out.kv_cost,
        least_usage=least_usage(config),
        sequences=held_out.sequences,
        steps=trained.step,
        tokens=trained.step * config.batch_tokens,
        parameters=count_params(params),
        minutes=trained.seconds / 60,
        mixing_ms=_mixing_ms(config, params) if timed else None,
        device=all_devices(),
        versions={"routing_jax": routing_jax.__version__, **versions(_PACKAGES)},
        config=config_to_dict(config),
        history=thin_history(read_metrics(workdir)),
        heatmap=heat if config.data.length <= 512 else None,
        heatmap_tokens=names if heat is not None and config.data.length <= 512 else None,
    )
    if jax.process_index() == 0:
        try:
            write_result(result, workdir / "result.json")
            if result.history:
                plot_history(
                    {labels["variant"]: result.history},
                    workdir / "history.png",
                    least_usage=result.least_usage,
                )
            if heat is not None:
                title = f"{labels['task']}: who attended"
                plot_heatmap(heat, names, workdir / "heatmap.png", title)
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(workdir)) from e
    return result


def _mixing_ms(config: TrainConfig, params: Any) -> float | None:
    """Mixing time on one evaluation batch; None on several devices, where it is not one number."""
    if jax.device_count() > 1:
        return None
    size = max(1, config.batch_tokens // config.data.length)
    batch = next(batches(config.data, split="validation", seed=0, batch_size=size))
    return mixing_milliseconds(config.model, params, batch.tokens)


def run(
    config: TrainConfig,
    workdir: str | epath.Path,
    *,
    resume: bool = False,
    resume_step: int | None = None,
    quiet: bool = False,
    labels: dict[str, str] | None = None,
    timed: bool = True,
) -> Result:
    """Trains, evaluates and reports one run.

    Args:
      config: the run.
      workdir: its folder: config.json, metrics.jsonl, tensorboard, checkpoints, result.json, plots.
      resume: go on from the newest checkpoint in the folder.
      resume_step: go on from this checkpoint.
      quiet: print nothing.
      labels: experiment, task and variant, as the result names them.
      timed: whether the trained mixing is timed; it says nothing on a device that others share.

    Returns:
      The result, also in `workdir/result.json`.
    """
    labels = labels or {"experiment": "train", "task": "run", "variant": "run"}
    if config.base or isinstance(config.data, PromptConfig):
        config = with_base(config)
    elif isinstance(config.data, TokenConfig):
        config = with_published(config)
        check_save_folder(reached(workdir, "workdir") / MODEL_FOLDER)
    if not quiet and jax.process_index() == 0:
        print(describe(config), flush=True)
    # Refuse a corpus or length that will not do before the folder is made.
    batches(config.data, split="validation", seed=0, batch_size=1)
    for length in config.lengths:
        batches(config.data, split="train", seed=config.seed, batch_size=1, length=length)
    start = find_start(config, workdir, resume=resume, resume_step=resume_step)
    frozen = load_base(config, train_mesh(config)) if config.base else None
    params = None
    if start is None and config.start_from:
        params = starting_parameters(config)
    elif start is None and config.base:
        params = calibrated_routers(config, frozen)
    trained = train(config, workdir, resume_step=start, params=params, frozen=frozen, quiet=quiet)
    if config.base:
        return finish_routers(config, frozen, workdir, trained, labels=labels)
    if isinstance(config.data, TokenConfig):
        save_finetuned(config, workdir, trained.state.params)
    return finish_run(config, workdir, trained, labels=labels, timed=timed)


__all__ = [
    "describe",
    "evaluate_run",
    "find_start",
    "finish_run",
    "least_usage",
    "load_run",
    "read_config",
    "run",
    "starting_parameters",
]
