"""Fine-tuning: a published model, all of which is trained on a text in its own tokens."""

from typing import Any

import jax
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from routing_jax.models.pretrained import load_tokenizer, published_config, save_pretrained
from routing_jax.train.base import published_model
from routing_jax.train.config import TrainConfig
from routing_jax.train.loop import train_mesh

MODEL_FOLDER = "model"


def with_published(config: TrainConfig) -> TrainConfig:
    """The run with the sizes and the tokenizer of the model that it starts from.

    Raises:
      ValueError: no model, one that `open_checkpoint` refuses or `save_pretrained` would, or a
        length that it was not made for.
    """
    if not config.start_from:
        raise ValueError(
            "start_from is ''; a task in the tokens of a published model starts from it, a folder "
            "or GGUF file."
        )
    published_config(config.start_from)  # what can't be written had better not be trained
    load_tokenizer(config.start_from)
    model = published_model(config, config.start_from)
    return config.replace(
        model=model, data__tokenizer=config.start_from, data__vocab_size=model.vocab_size
    )


def save_finetuned(config: TrainConfig, workdir: epath.PathLike, params: Any) -> None:
    """Writes the trained model as a Hugging Face folder, `model` in the run's folder.

    Args:
      config: the run.
      workdir: its folder.
      params: the trained parameters, wherever they are.
    """
    whole = jax.device_put(params, NamedSharding(train_mesh(config), PartitionSpec()))
    if jax.process_index() == 0:
        folder = epath.Path(workdir) / MODEL_FOLDER
        save_pretrained(folder, whole, config.model, config.start_from)
