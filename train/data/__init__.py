"""Training data: recall, needles and prompts made on the fly, and text, by step.

Start at ``pipeline.batches``. Each task has a file of its own; ``prepare`` writes a data set.
"""

from routing_jax.train.data.batch import Batch
from routing_jax.train.data.characters import CharacterConfig, vocabulary
from routing_jax.train.data.needle import NeedleConfig
from routing_jax.train.data.pipeline import DataConfig, batches
from routing_jax.train.data.prompts import PROMPT_TASKS, PromptBatch, PromptConfig
from routing_jax.train.data.recall import RecallConfig
from routing_jax.train.data.text import TextConfig, window_count
from routing_jax.train.data.tokens import TokenConfig

__all__ = [
    "PROMPT_TASKS",
    "Batch",
    "CharacterConfig",
    "DataConfig",
    "NeedleConfig",
    "PromptBatch",
    "PromptConfig",
    "RecallConfig",
    "TextConfig",
    "TokenConfig",
    "batches",
    "vocabulary",
    "window_count",
]
