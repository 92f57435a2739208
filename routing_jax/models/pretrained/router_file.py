"""A trained router in a small safetensors file of its own, bound to the model it was trained for.

The file's header is its manifest: the format, the checksum and name of the base model, what the
router's owner needs to build it, and a checksum of all this and of the numbers.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from routing_jax.files import write_whole
from routing_jax.models.pretrained.hf_folder import weight_files

_FORMAT = "routing_jax router 1"
_SHOWN = 12  # digits of a checksum that tell models apart in a sentence


class SavedRouter(NamedTuple):
    """What a router file holds.

    Attributes:
      params: the router's parameters, as they were saved, in NumPy arrays.
      config: what its owner wrote beside them.
    """

    params: dict[str, Any]
    config: dict[str, Any]


def base_checksum(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a checkpoint's weights, as hexadecimal; reads every byte of them.

    Args:
      path: a Hugging Face folder or a GGUF file.

    Raises:
      ValueError: the folder holds no weights.
      OSError: the file can't be read.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "a.gguf")
    >>> _ = file.write_text("weights")
    >>> base_checksum(file)[:8]
    '9a129038'
    """
    path, digest = Path(path), hashlib.sha256()
    for file in weight_files(path) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


def save_router(
    path: str | os.PathLike[str],
    params: Mapping[str, Any],
    base: str | os.PathLike[str],
    config: Mapping[str, Any],
) -> None:
    """Writes a router's parameters whole or not at all; what stood there stays until then.

    Args:
      path: where to; its folder must be there.
      params: nested dictionaries of arrays.
      base: the checkpoint that the router was trained for.
      config: JSON values that `load_router` gives back.

    Raises:
      ValueError: `base` holds no weights.
      OSError: it can't be written; the file is named.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> base, path = folder / "a.gguf", folder / "router.safetensors"
    >>> _ = base.write_text("weights")
    >>> save_router(path, {"layers_0": {"bias": np.ones(2)}}, base, {"window": 1024})
    >>> load_router(path, base)
    SavedRouter(params={'layers_0': {'bias': array([1., 1.])}}, config={'window': 1024})
    """
    tensors = {
        name: np.asarray(array)
        for name, array in flatten_dict(jax.device_get(dict(params)), sep="/").items()
    }
    manifest = {
        "format": _FORMAT,
        "base": base_checksum(base),
        "base_name": Path(base).resolve().name,
        "config": json.dumps(dict(config)),
    }
    write_whole(path, save(tensors, manifest | {"checksum": _checksum(tensors, manifest)}))


def load_router(path: str | os.PathLike[str], base: str | os.PathLike[str]) -> SavedRouter:
    """Reads a router that was trained for this very model.

    Args:
      path: a file of `save_router`.
      base: the checkpoint that the router shall run in.

    Raises:
      ValueError: the file is damaged or no router, or belongs to another model.

    >>> load_router("nowhere.safetensors", "a.gguf")
    Traceback (most recent call last):
    ValueError: nowhere.safetensors is no whole router file: No such file or directory.
    """
    try:
        with safe_open(path, "numpy") as file:
            manifest = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as e:
        raise ValueError(f"{path} is no whole router file: No such file or directory.") from e
    except SafetensorError as e:
        raise ValueError(f"{path} is no whole router file: {e}.") from e
    if manifest.get("format") != _FORMAT:
        raise ValueError(f"{path} is no router file: its format is {manifest.get('format')!r}.")
    if manifest.pop("checksum", None) != _checksum(tensors, manifest):
        raise ValueError(f"{path} is damaged: what it holds is not what was saved.")
    found = base_checksum(base)
    if manifest["base"] != found:
        raise ValueError(
            f"{path} holds a router for {manifest['base_name']} ({manifest['base'][:_SHOWN]}…); "
            f"{base} is another model ({found[:_SHOWN]}…)."
        )
    return SavedRouter(unflatten_dict(tensors, sep="/"), json.loads(manifest["config"]))


def _checksum(tensors: Mapping[str, np.ndarray], manifest: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name} {array.dtype} {array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
