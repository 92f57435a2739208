"""The decoder's parameters as a Hugging Face folder, which this library and others can load."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from safetensors.numpy import save

from routing_jax.files import write_whole
from routing_jax.models.config import DecoderConfig
from routing_jax.models.decoder import unstack_layers
from routing_jax.models.pretrained.hf_folder import INDEX, WEIGHTS, read_json
from routing_jax.models.pretrained.load import open_checkpoint
from routing_jax.models.pretrained.parts import parts, sizes
from routing_jax.models.pretrained.tokenizer import load_tokenizer, stop_tokens

# What other programs read of a folder besides its config, weights and tokenizer.
_KEPT = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")


def published_config(base: str | os.PathLike[str]) -> dict[str, Any]:
    """The config.json of a checkpoint; written anew for a GGUF file, which has none.

    Args:
      base: a Hugging Face folder or a GGUF file.

    Raises:
      ValueError: what `open_checkpoint` refuses, or a GGUF file whose long-context RoPE no
        config.json can tell.

    >>> published_config("nowhere/model")
    Traceback (most recent call last):
    ValueError: nowhere/model is neither a folder with config.json nor a GGUF file.
    """
    config = open_checkpoint(base).config
    if Path(base).is_dir():
        return read_json(Path(base) / "config.json")
    values: dict[str, Any] = {
        "model_type": "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": len(config.mixers),
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "eos_token_id": sorted(stop_tokens(base)),
    }
    if config.rope_factors:
        if len(set(config.rope_factors)) > 1:
            raise ValueError(
                f"{base} slows each pair of RoPE by a factor of its own, which a config.json can't "
                "tell; start from the model's Hugging Face folder instead."
            )
        values["rope_scaling"] = {"rope_type": "linear", "factor": config.rope_factors[0]}
    return values


def check_save_folder(folder: str | os.PathLike[str]) -> None:
    """Refuses a folder whose model lies in several files: its index would be read, not ours.

    Raises:
      ValueError: it holds such a model.

    >>> check_save_folder("nowhere")
    """
    if (epath.Path(folder) / INDEX).exists():
        raise ValueError(
            f"{os.fspath(folder)} holds {INDEX}, of a model in several files, which would be "
            f"loaded in place of a new {WEIGHTS}; save into another folder."
        )


def save_pretrained(
    folder: str | os.PathLike[str],
    params: Mapping[str, Any],
    config: DecoderConfig,
    base: str | os.PathLike[str],
) -> None:
    """Writes a model as a Hugging Face folder: float32 safetensors, config.json, tokenizer.

    The weights come last and whole, so that a folder that was not finished is none to load.

    Args:
      folder: is made, with those above it; a model in one file that it holds is replaced.
      params: of `Decoder(config)`, on devices of this process.
      config: the model; all its layers are 'full'.
      base: the checkpoint that it began as, a Hugging Face folder or a GGUF file.

    Raises:
      ValueError: layers that are not the base's, such as routed ones, or what `published_config`
        or `check_save_folder` refuses.
      OSError: it can't be written; the file is named.

    >>> save_pretrained("out", {}, DecoderConfig(), "nowhere/model")
    Traceback (most recent call last):
    ValueError: nowhere/model is neither a folder with config.json nor a GGUF file.
    """
    values, tokenizer, to = published_config(base), load_tokenizer(base), epath.Path(folder)
    if config.mixers != open_checkpoint(base).config.mixers:
        raise ValueError(
            f"model.layers is {config.layers!r}; a folder like {base} holds "
            f"{open_checkpoint(base).config.layers!r}."
        )
    check_save_folder(folder)
    to.mkdir(parents=True, exist_ok=True)
    for name in _KEPT:
        if (Path(base) / name).is_file():
            write_whole(to / name, (Path(base) / name).read_bytes())
        else:  # what an earlier model left would be read as this one's
            (to / name).unlink(missing_ok=True)
    write_whole(to / "tokenizer.json", tokenizer.to_str())
    values = {**values, "torch_dtype": "float32"}
    write_whole(to / "config.json", json.dumps(values, indent=2) + "\n")
    write_whole(to / WEIGHTS, save(dict(_stored(params, config)), {"format": "pt"}))


def _stored(params: Mapping[str, Any], config: DecoderConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor under its Hugging Face name and as it is laid out there."""
    if config.scan:
        params = unstack_layers(dict(params), config)
    size, known = sizes(config), parts(config)
    for path, leaf in flatten_dict(dict(params)).items():
        layered = path[0].startswith("layers_")
        part = known["/".join(path[2:] if layered else path)]
        stored = "".join(part.stored)
        array = np.asarray(jax.device_get(leaf), np.float32)
        array = array.transpose([part.dims.index(d) for d in stored])
        shape = [int(np.prod([size[d] for d in dims])) for dims in part.stored]
        layer = path[0].removeprefix("layers_")
        yield part.hf.format(layer), np.ascontiguousarray(array.reshape(shape))
