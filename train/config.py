"""Everything that defines a training run, as frozen dataclasses."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from routing_jax.models import DecoderConfig
from routing_jax.routers import SparseModeConfig
from routing_jax.train.curriculum import CurriculumConfig
from routing_jax.train.data import (
    PROMPT_TASKS,
    CharacterConfig,
    DataConfig,
    NeedleConfig,
    PromptConfig,
    RecallConfig,
    TextConfig,
    TokenConfig,
)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up, then constant until λ ramps, then cosine decay.

    Attributes:
      learning_rate: the peak.
      final_fraction: of the peak, at the end of the decay.
      warmup_steps: linear warm-up.
      beta1: decay of the first moment.
      beta2: decay of the second moment.
      weight_decay: of matrices; vectors and scalars are not decayed.
      clip_norm: largest global gradient norm.
    """

    learning_rate: float = 3e-3
    final_fraction: float = 0.02
    warmup_steps: int = 50
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(
                f"optimizer.learning_rate is {self.learning_rate}; it must be above 0."
            )
        if self.clip_norm <= 0:
            raise ValueError(f"optimizer.clip_norm is {self.clip_norm}; it must be above 0.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"optimizer.{name} is {getattr(self, name)}; it must lie in [0, 1)."
                )
        if self.warmup_steps < 0:
            raise ValueError(
                f"optimizer.warmup_steps is {self.warmup_steps}; at least 0 is needed."
            )
        if self.weight_decay < 0:
            raise ValueError(
                f"optimizer.weight_decay is {self.weight_decay}; at least 0 is needed."
            )


@dataclass(frozen=True)
class BudgetConfig:
    """How sparse layer routing shall be, task by task (Flux Attention, arXiv 2604.07394).

    Attributes:
      retrieval: wanted share of sparse layers where a prompt asks for something in it.
      text: wanted share of sparse layers where it does not.
      rate: by how much the multipliers of a missed budget rise in a step; 0 for no budget, which
        leaves all to λ.
    """

    retrieval: float = 0.6
    text: float = 0.95
    rate: float = 0.02

    def __post_init__(self):
        for name in ("retrieval", "text"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"budget.{name} is {getattr(self, name)}; it must lie in [0, 1].")
        if self.rate < 0:
            raise ValueError(f"budget.rate is {self.rate}; it must be at least 0.")

    @property
    def targets(self) -> tuple[float, ...]:
        """By the places of the tasks in PROMPT_TASKS.

        >>> BudgetConfig(retrieval=0.5, text=0.9).targets
        (0.5, 0.5, 0.5, 0.9, 0.5)
        """
        return tuple(self.text if task == "text" else self.retrieval for task in PROMPT_TASKS)


@dataclass(frozen=True)
class MeshConfig:
    """How devices are laid out; −1 takes all that are left.

    Attributes:
      data: copies of the model, each with a part of the batch.
      fsdp: devices that share parameters and batch.
      tensor: devices that share heads and MLP columns.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size == 0 or size < -1:
                raise ValueError(
                    f"mesh.{name} is {size}; it must be at least 1, or -1 for the rest."
                )
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"mesh is {sizes}; at most one axis may be -1.")


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
      data: the task.
      model: the decoder; its vocabulary size comes from the task.
      curriculum: λ and the length of the run.
      optimizer: AdamW.
      mesh: device layout.
      batch_tokens: tokens of a step; a batch holds batch_tokens / length sequences.
      accumulation: microbatches a step.
      eval_sequences: held-out sequences in the final evaluation.
      log_every: steps between metric lines.
      checkpoint_every: steps between checkpoints.
      seed: of parameters, data and noise.
      base: folder or GGUF file of a published model that stays as it is; only its layer routers
        are trained, and the sizes in `model` are its own. Empty to train a whole model.
      budget: of layer routers.
      start_from: folder of a run of the same parameters, whose newest checkpoint's are the first
        ones here, but for routers that it lacks; empty to draw all from the seed. Of a task in the
        tokens of a published model, this model, a folder or GGUF file: all of it is trained, and
        sizes are its own.
      first_batch: which batch of the data the first step reads, so that a run that goes on from
        another reads what the other has not.
      routers_only: of a run that starts from another, train nothing but routers.
    """

    data: (
        RecallConfig | TextConfig | CharacterConfig | TokenConfig | NeedleConfig | PromptConfig
    ) = field(default_factory=RecallConfig)
    model: DecoderConfig = field(default_factory=DecoderConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    batch_tokens: int = 8192
    accumulation: int = 1
    eval_sequences: int = 2048
    log_every: int = 20
    checkpoint_every: int = 500
    seed: int = 0
    base: str = ""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    start_from: str = ""
    first_batch: int = 0
    routers_only: bool = False

    def __post_init__(self):
        _refuse_unbounded(self)
        for name in (
            "batch_tokens",
            "accumulation",
            "eval_sequences",
            "log_every",
            "checkpoint_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.first_batch < 0:
            raise ValueError(f"first_batch is {self.first_batch}; it must be at least 0.")
        if self.routers_only and not self.start_from:
            raise ValueError("routers_only is True; it needs start_from, which is ''.")
        for length in self.lengths:
            if self.batch_size(length) < 1:
                raise ValueError(
                    f"batch_tokens is {self.batch_tokens}; it must hold at least one microbatch of "
                    f"{self.accumulation} sequences of {length} tokens."
                )
        if self.curriculum.lengths and self.curriculum.lengths[-1] >= self.data.length:
            raise ValueError(
                f"curriculum.lengths ends with {self.curriculum.lengths[-1]}; it must stay below "
                f"data.length = {self.data.length}."
            )
        if 0 < self.model.learned_positions < self.data.length:
            raise ValueError(
                f"data.length is {self.data.length}; it must be at most model.learned_positions = "
                f"{self.model.learned_positions}."
            )
        vocab = self.data.vocab_size
        if self.model.vocab_size != vocab:
            object.__setattr__(self, "model", self.model.replace(vocab_size=vocab))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Every sequence length trained at, the task's own last."""
        return (*self.curriculum.lengths, self.data.length)

    def batch_size(self, length: int) -> int:
        """Sequences in a step at this length; a multiple of `accumulation`, 0 if none fit."""
        return self.batch_tokens // length // self.accumulation * self.accumulation

    def replace(self, **changes: Any) -> "TrainConfig":
        """A copy with some fields changed; `model__width=32` reaches into a part.

        >>> TrainConfig().replace(seed=3, model__width=32).model.width
        32
        """
        flat = {k: v for k, v in changes.items() if "__" not in k}
        parts: dict[str, dict[str, Any]] = {}
        for key, value in changes.items():
            if "__" in key:
                part, name = key.split("__", 1)
                parts.setdefault(part, {})[name] = value
        for part, fields in parts.items():
            flat[part] = dataclasses.replace(getattr(self, part), **fields)
        return dataclasses.replace(self, **flat)


_LARGEST = float(np.finfo(np.float32).max)


def _refuse_unbounded(config: TrainConfig) -> None:
    """Refuses, in every part of a run, numbers that float32 does not hold as finite ones."""
    for path, value in jax.tree_util.tree_leaves_with_path(dataclasses.asdict(config)):
        if isinstance(value, float) and not abs(value) <= _LARGEST:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(f"{name} is {value}; it must be finite, and at most {_LARGEST:.2g}.")


_TASKS: dict[str, type[DataConfig]] = {
    "recall": RecallConfig,
    "text": TextConfig,
    "character": CharacterConfig,
    "tokens": TokenConfig,
    "needle": NeedleConfig,
    "prompts": PromptConfig,
}


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """The run as plain JSON values; `config_from_dict` reads it back."""
    out = dataclasses.asdict(config)
    task = next(name for name, kind in _TASKS.items() if isinstance(config.data, kind))
    out["data"] = {"task": task, **out["data"]}
    return out


def config_from_dict(values: dict[str, Any]) -> TrainConfig:
    """The run that `config_to_dict` wrote.

    Raises:
      ValueError: an unknown or missing field.

    >>> config_from_dict(config_to_dict(TrainConfig())) == TrainConfig()
    True
    """
    try:
        data = dict(values["data"])
        kind = _TASKS[data.pop("task")]
        return _build(TrainConfig, {**values, "data": _build(kind, data)})
    except (KeyError, TypeError) as e:
        raise ValueError(f"this configuration was written by another version: {e}.") from e


def _build(cls: type, values: dict[str, Any]) -> Any:
    """Builds nested frozen dataclasses from JSON values."""
    hints = {f.name: f.type for f in dataclasses.fields(cls)}
    made = {}
    for name, value in values.items():
        kind = hints.get(name)
        if isinstance(value, dict) and dataclasses.is_dataclass(kind):
            value = _build(kind, value)  # type: ignore[arg-type]
        elif isinstance(value, list):
            value = tuple(value)
        made[name] = value
    if cls is SparseModeConfig:
        sparse = SparseModeConfig.from_saved(made)
        if sparse.searches and "means" in made:
            raise TypeError("its layers search by sparse.means, which this version has not")
        return sparse
    return cls(**made)


__all__ = [
    "BudgetConfig",
    "DataConfig",
    "MeshConfig",
    "OptimizerConfig",
    "TrainConfig",
    "config_from_dict",
    "config_to_dict",
]
