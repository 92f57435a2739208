"""From a published checkpoint to the decoder's parameters, one tensor at a time."""

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from routing_jax.models.config import DecoderConfig
from routing_jax.models.decoder import init_params
from routing_jax.models.pretrained.gguf_file import open_gguf
from routing_jax.models.pretrained.hf_folder import open_folder
from routing_jax.models.pretrained.parts import Checkpoint, check_tensors, parts, read_part
from routing_jax.sharding import ShardingRules, tree_shardings


class Pretrained(NamedTuple):
    """A model that somebody else trained.

    Attributes:
      config: what it is; its `context` is the most tokens it was made for.
      params: its parameters, as `Decoder(config)` takes them.
    """

    config: DecoderConfig
    params: dict[str, Any]


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Looks at a checkpoint and checks that it is whole; no weight is read.

    Args:
      path: a Hugging Face folder (config.json and safetensors), or a GGUF file.

    Raises:
      ValueError: it is no checkpoint, is damaged, or is of a model that is not supported; tensors
        that are missing, too many or misshapen are named.

    >>> open_checkpoint("nowhere/model")
    Traceback (most recent call last):
    ValueError: nowhere/model is neither a folder with config.json nor a GGUF file.
    """
    path = Path(path)
    if path.is_dir():
        checkpoint = open_folder(path)
    elif path.is_file() and path.suffix == ".gguf":
        checkpoint = open_gguf(path)
    else:
        raise ValueError(f"{path} is neither a folder with config.json nor a GGUF file.")
    check_tensors(checkpoint)
    return checkpoint


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    scan: bool = True,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> Pretrained:
    """Loads a Llama, Mistral, Qwen2 or Qwen3 model from a folder of safetensors or a GGUF file.

    The files are mapped into memory. Each parameter is read, cast and placed on its devices before
    the next one, and each process reads the rows of its own shards.

    Args:
      path: a Hugging Face folder (config.json and safetensors), or a GGUF file.
      dtype: of the parameters and of the computation.
      scan: run the layers as one loop; parameters are then stacked over layers.
      mesh: devices to spread the parameters over; the first one alone when None.
      rules: how they are spread.

    Raises:
      ValueError: what `open_checkpoint` refuses, before anything is loaded.

    >>> load_pretrained("nowhere/model.gguf")
    Traceback (most recent call last):
    ValueError: nowhere/model.gguf is neither a folder with config.json nor a GGUF file.
    """
    checkpoint = open_checkpoint(path)
    config = checkpoint.config.replace(dtype=dtype, scan=scan)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    if mesh is None:
        alone: Sharding = SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: alone, shapes)
    else:
        shardings = tree_shardings(shapes, mesh, rules)
    known = parts(config)

    def place(path: tuple, shape: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
        first, *rest = (key.key for key in path)
        layered = first.startswith("layers")
        part = known["/".join(rest[1:] if layered else [first, *rest])]
        layer = 0 if not layered or config.scan else int(first.removeprefix("layers_"))

        def read(index: Any) -> np.ndarray:
            stacked = len(index) > len(part.dims)
            layers = range(shape.shape[0])[index[0]] if stacked else (layer,)
            sizes = [len(range(size)[piece]) for size, piece in zip(shape.shape, index)]
            out = np.empty(sizes, jnp.dtype(config.dtype))
            for i, number in enumerate(layers):
                piece = read_part(checkpoint, part, number, index[-len(part.dims) :])
                out[i if stacked else ...] = piece  # casts
            return out

        return jax.make_array_from_callback(shape.shape, sharding, read)

    return Pretrained(config, jax.tree_util.tree_map_with_path(place, shapes, shardings))
