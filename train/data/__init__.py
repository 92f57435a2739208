"""Training data: recall tasks made on the fly, and bytes or characters of text, addressed by step.

Start at ``pipeline.batches``. Each task has a file of its own; ``prepare`` writes a data set.
"""

from routing_jax.train.data.batch import Batch
from routing_jax.train.data.characters import CharacterConfig, vocabulary
from routing_jax.train.data.pipeline import DataConfig, batches
from routing_jax.train.data.recall import RecallConfig
from routing_jax.train.data.text import TextConfig, window_count

__all__ = [
    "Batch",
    "CharacterConfig",
    "DataConfig",
    "RecallConfig",
    "TextConfig",
    "batches",
    "vocabulary",
    "window_count",
]
