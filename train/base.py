"""Layer routers for a published model: what the run is to become, and what comes out of it."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

import routing_jax
from routing_jax.attention import Prompts
from routing_jax.evals.prompt_quality import Chooser, PromptScores, prompt_scorer
from routing_jax.evals.provenance import all_devices, versions
from routing_jax.evals.results import Result, thin_history, write_result
from routing_jax.models import (
    Decoder,
    DecoderConfig,
    count_params,
    init_routers,
    merge_routers,
    with_layer_routing,
)
from routing_jax.models.pretrained import open_checkpoint, save_routers
from routing_jax.routers import standardised
from routing_jax.sharding import put_batch, tree_shardings
from routing_jax.train.config import TrainConfig, config_to_dict
from routing_jax.train.data import PROMPT_TASKS, PromptBatch, PromptConfig, batches
from routing_jax.train.data.batch import Split
from routing_jax.train.loop import Trained, load_base, train_mesh
from routing_jax.train.metrics import read_metrics

ROUTER_FILE = "router.safetensors"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "tokenizers")
_EVAL_SEED = 1_000_003  # of no training run
_BY_LIKELIHOOD = ("text", "maths")  # of which few answers would be right


def published_model(config: TrainConfig, path: str) -> DecoderConfig:
    """A published model, to be computed as the run's own model says; no weight is read.

    Args:
      config: the run.
      path: the model's folder or GGUF file.

    Raises:
      ValueError: one that `open_checkpoint` refuses, or a length that it was not made for.
    """
    theirs, ours = open_checkpoint(path).config, config.model
    if theirs.context and config.data.length > theirs.context:
        raise ValueError(
            f"data.length is {config.data.length}; {path} was made for at most {theirs.context} "
            "tokens."
        )
    return theirs.replace(
        dtype=ours.dtype, scan=ours.scan, remat=ours.remat, attention=ours.attention
    )


def with_base(config: TrainConfig) -> TrainConfig:
    """The run with the sizes and the tokenizer of its base; no weight is read.

    Raises:
      ValueError: a base without prompts or prompts without a base, prompts so short that no layer
        would be routed, or what `published_model` refuses.
    """
    if not isinstance(config.data, PromptConfig) or not config.base:
        raise ValueError(
            f"base is {config.base!r} and the task {type(config.data).__name__}; layer routers are "
            "trained on prompts for a base, a model's folder or GGUF file."
        )
    published, ours = published_model(config, config.base), config.model
    if config.data.length - config.data.answer <= ours.sparse.reach:
        raise ValueError(
            f"data.length is {config.data.length}, {config.data.answer} of it the answer; prompts "
            f"of up to {ours.sparse.reach} tokens are attended fully, as sink and window cover "
            "them, so nothing would be routed."
        )
    model = with_layer_routing(published, ours.layer_router, ours.sparse)
    return config.replace(
        model=model, data__tokenizer=config.base, data__vocab_size=model.vocab_size
    )


def calibrated_routers(config: TrainConfig, frozen: Any, prompts: int = 96) -> Any:
    """Untrained routers whose inputs are standardised on prompts of the training text.

    Args:
      config: the run.
      frozen: the base's parameters.
      prompts: how many are read at least, with all layers routed to full attention.

    Returns:
      The routers' parameters, on the run's mesh.
    """
    mesh = train_mesh(config)
    routers = init_routers(config.model, jax.random.fold_in(jax.random.key(config.seed), 0))
    params = merge_routers(frozen, routers)
    size = config.batch_size(config.data.length)
    stream = batches(config.data, split="train", seed=_EVAL_SEED, batch_size=size)
    dense = jnp.ones((len(config.model.mixers), size), bool)

    @jax.jit
    def read(params, batch):
        told = Prompts(batch.lengths, 1.0, dense)
        _, sown = Decoder(config.model).apply(
            {"params": params}, batch.tokens, batch.positions, prompts=told,
            read=batch.places[:, :1], mutable=["intermediates"],
        )  # fmt: skip
        found = flatten_dict(sown["intermediates"])
        return {path[:-1]: pooled[0] for path, pooled in found.items() if path[-1] == "pooled"}

    with jax.set_mesh(mesh):
        rows = [
            read(params, put_batch(batch, mesh))
            for batch in itertools.islice(stream, -(-prompts // size))
        ]
    flat = flatten_dict(routers)
    for path, pooled in jax.device_get(
        jax.tree.map(lambda *p: jnp.concatenate(p, -2), *rows)
    ).items():
        flat[(*path, "scale")], flat[(*path, "shift")] = standardised(pooled)
    routers = unflatten_dict(flat)
    return jax.device_put(routers, tree_shardings(jax.eval_shape(lambda: routers), mesh))


def held_out_prompts(
    config: TrainConfig, task: str, count: int, split: Split = "validation"
) -> list[PromptBatch]:
    """At least so many prompts of one task that no training sees, the same in every call.

    Those of split 'train' share its text, but are not its prompts.
    """
    data = config.replace(data__mixture=(task,)).data
    size = config.batch_size(data.length)
    stream = batches(data, split=split, seed=_EVAL_SEED, batch_size=size)
    return list(itertools.islice(stream, -(-count // size)))


def score_tasks(
    config: TrainConfig, frozen: Any, mesh: Mesh
) -> Callable[[Any, Chooser | None], dict[str, PromptScores]]:
    """A function (routers, choose) that scores `eval_sequences` held-out prompts of each task.

    Args:
      config: the run.
      frozen: the base's parameters.
      mesh: where they are.
    """
    score = prompt_scorer(config.model)
    tasks = [task for task in PROMPT_TASKS if task in config.data.mixture]  # type: ignore[union-attr]
    held_out = {task: held_out_prompts(config, task, config.eval_sequences) for task in tasks}

    def run(routers: Any, choose: Chooser | None) -> dict[str, PromptScores]:
        params = merge_routers(frozen, routers)
        with jax.set_mesh(mesh):
            return {
                task: score(params, (put_batch(batch, mesh) for batch in rows), choose)
                for task, rows in held_out.items()
            }

    return run


def evaluate_routers(config: TrainConfig, routers: Any, mesh: Mesh) -> dict[str, PromptScores]:
    """Scores held-out prompts of each task, routed by trained routers."""
    return score_tasks(config, load_base(config, mesh), mesh)(routers, None)


def routing_result(
    config: TrainConfig,
    scores: Mapping[str, PromptScores],
    labels: Mapping[str, str],
    *,
    workdir: epath.Path | None = None,
    trained: Trained | None = None,
) -> Result:
    """What a way of routing reached and spent; its details hold every prompt's own figures.

    Args:
      config: the run.
      scores: by task.
      labels: experiment, task and variant.
      workdir: of the training, where there was one.
      trained: its end.
    """
    asked = [scores[task].right for task in scores if task not in _BY_LIKELIHOOD]
    asked = asked or [one.right for one in scores.values()]
    told = scores["text"] if "text" in scores else next(iter(scores.values()))
    dense = np.concatenate([one.dense for one in scores.values()], axis=1)
    details = {
        task: {
            "right": one.right.astype(float).round(4).tolist(),
            "nll": one.nll.astype(float).round(5).tolist() if task in _BY_LIKELIHOOD else None,
            "sparsity": float(one.sparsity.mean()),
            "dense_by_layer": one.dense.mean(axis=1).astype(float).tolist(),
        }
        for task, one in scores.items()
    }
    steps = 0 if trained is None else trained.step
    return Result(
        experiment=labels["experiment"],
        task=labels["task"],
        variant=labels["variant"],
        seed=config.seed,
        accuracy=float(np.concatenate(asked).mean()),
        accuracy_first_place=None,
        loss=float(told.nll.mean()),
        bits_per_byte=None,
        usage=float(dense.mean()),
        usage_per_layer=dense.mean(axis=1).astype(float).tolist(),
        cost=float(np.mean([one.cost for one in scores.values()])),
        kv_cost=float(np.mean([one.kv_cost for one in scores.values()])),
        least_usage=None,
        sequences=dense.shape[1],
        steps=steps,
        tokens=steps * config.batch_tokens,
        parameters=0 if trained is None else count_params(trained.state.params),
        minutes=0.0 if trained is None else trained.seconds / 60,
        mixing_ms=None,
        device=all_devices(),
        versions={"routing_jax": routing_jax.__version__, **versions(_PACKAGES)},
        config=config_to_dict(config),
        history=[] if workdir is None else thin_history(read_metrics(workdir)),
        heatmap=None,
        heatmap_tokens=None,
        details={"tasks": details},
    )


def finish_routers(
    config: TrainConfig,
    frozen: Any,
    workdir: str | epath.Path,
    trained: Trained,
    *,
    labels: Mapping[str, str],
) -> Result:
    """Exports trained routers, evaluates them, and writes `router.safetensors` and `result.json`.

    Args:
      config: the run.
      frozen: the base's parameters.
      workdir: its folder.
      trained: the end of training.
      labels: experiment, task and variant names for the result.
    """
    workdir = epath.Path(workdir)
    routers = trained.state.params
    if jax.process_index() == 0:
        save_routers(workdir / ROUTER_FILE, routers, config.base, config.model)
    scores = score_tasks(config, frozen, train_mesh(config))(routers, None)
    result = routing_result(config, scores, labels, workdir=workdir, trained=trained)
    if jax.process_index() == 0:
        write_result(result, workdir / "result.json")
    return result
