"""Checkpoints in a Hugging Face folder: `config.json` and one or more safetensors files."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from routing_jax.kernels import llama3_factors
from routing_jax.models.config import DecoderConfig
from routing_jax.models.pretrained.parts import Checkpoint, Tensor, check_size

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_FLOATS = ("F64", "F32", "F16", "BF16")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_REQUIRED = object()


def open_folder(folder: Path) -> Checkpoint:
    """Reads the config and the files' headers.

    Raises:
      ValueError: a file is missing, damaged, or of a model that is not supported.

    >>> import tempfile
    >>> open_folder(Path(tempfile.mkdtemp(prefix="model-")))
    Traceback (most recent call last):
    ValueError: ...model-... holds no config.json; a Hugging Face model has one.
    """
    config = _config(folder / "config.json")
    tensors: dict[str, Tensor] = {}
    for path, placed in _placed(folder).items():
        found = _tensors(path)
        if twice := sorted(found.keys() & tensors.keys()):
            raise ValueError(
                f"{path} holds {twice[0]}, which another file of its folder holds too."
            )
        if absent := sorted(placed - found.keys()):
            raise ValueError(f"{path} holds no {absent[0]}, which {folder / INDEX} places there.")
        tensors |= found
    return Checkpoint(folder, config, "hf", tensors)


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, in the order of their names.

    Raises:
      ValueError: there are none, or the index names one that is not there.

    >>> import tempfile
    >>> weight_files(Path(tempfile.mkdtemp(prefix="model-")))
    Traceback (most recent call last):
    ValueError: ...model-... holds neither model.safetensors nor model.safetensors.index.json.
    """
    return list(_placed(folder))


def _placed(folder: Path) -> dict[Path, set[str]]:
    """The files of `weight_files`, each with the tensors that the folder's index places there."""
    index = folder / INDEX
    if not index.is_file():
        if not (folder / WEIGHTS).is_file():
            raise ValueError(f"{folder} holds neither {WEIGHTS} nor {INDEX}.")
        return {folder / WEIGHTS: set()}
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} has no 'weight_map', which says where each tensor lies.")
    placed: dict[Path, set[str]] = {}
    for file in sorted({str(file) for file in places.values()}):
        if Path(file).name != file or not (folder / file).is_file():
            raise ValueError(f"{index} names {file!r}, which is no file of its folder.")
        placed[folder / file] = {name for name, place in places.items() if str(place) == file}
    return placed


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
      ValueError: it holds something else.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "a.json")
    >>> _ = file.write_text('{"layers": 2}')
    >>> read_json(file)
    {'layers': 2}
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:  # JSON and UTF-8 both
        raise ValueError(f"{path} is not JSON: {e}.") from e
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; it must be a JSON object.")
    return values


def _tensors(path: Path) -> dict[str, Tensor]:
    """The file's tensors; it is mapped into memory, and read where `read` asks."""
    try:
        file = safe_open(path, "numpy")
    except SafetensorError as e:
        raise ValueError(f"{path} is no whole safetensors file: {e}.") from e
    tensors = {}
    for name in file.keys():  # noqa: SIM118
        piece = file.get_slice(name)
        if piece.get_dtype() not in _FLOATS:
            raise ValueError(
                f"{path} stores {name} as {piece.get_dtype()}; accepted: {', '.join(_FLOATS)}."
            )
        tensors[name] = _tensor(piece)
    return tensors


def _tensor(piece: Any) -> Tensor:
    return Tensor(tuple(piece.get_shape()), lambda rows: piece[rows.start : rows.stop])


class _Fields:
    """The fields of a config.json, each checked as it is read."""

    def __init__(self, path: Path, values: dict[str, Any]):
        self.path, self.values = path, values

    def get(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"{self.path} has no {name!r}, which a model of its kind needs.")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(f"{self.path}: {name} is {value!r}; it must be {kind.__name__}.")
        return value

    def refuse_unless(self, name: str, *accepted: Any) -> None:
        value = self.values.get(name)
        if value is not None and value not in accepted:
            raise ValueError(
                f"{self.path}: {name} is {value!r}; supported: "
                f"{', '.join(repr(a) for a in accepted)}."
            )


def _config(path: Path) -> DecoderConfig:
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no config.json; a Hugging Face model has one.")
    fields = _Fields(path, read_json(path))
    kind = fields.get("model_type", str)
    fields.refuse_unless("model_type", *MODEL_TYPES)
    fields.refuse_unless("hidden_act", "silu")
    fields.refuse_unless("mlp_bias", False)
    fields.refuse_unless("attention_bias", kind == "qwen2")
    fields.refuse_unless("partial_rotary_factor", 1.0)
    width = fields.get("hidden_size", int)
    num_heads = check_size(path, "num_attention_heads", fields.get("num_attention_heads", int))
    head_dim = check_size(path, "head_dim", fields.get("head_dim", int, width // num_heads))
    layers = check_size(path, "num_hidden_layers", fields.get("num_hidden_layers", int))
    theta, factors = _rope(fields, head_dim)
    context = fields.get("max_position_embeddings", int)
    # Mistral has a window unless it says null; others have one only when it is switched on.
    unsaid = 4096 if kind == "mistral" and "sliding_window" not in fields.values else context
    windowed = fields.get("use_sliding_window", bool, kind == "mistral")
    window = fields.get("sliding_window", int, unsaid) if windowed else context
    return DecoderConfig(
        vocab_size=fields.get("vocab_size", int),
        width=width,
        layers=f"full*{layers}",
        num_heads=num_heads,
        num_kv_heads=fields.get("num_key_value_heads", int, num_heads),
        head_dim=head_dim,
        mlp_width=fields.get("intermediate_size", int),
        rope_theta=theta,
        rope_factors=factors,
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        context=min(context, window),  # within its window, a windowed model is a full one
        norm_eps=fields.get("rms_norm_eps", float, 1e-6),
        tie_embeddings=fields.get("tie_word_embeddings", bool, False),
        dtype="float32",
    )


def _rope(fields: _Fields, head_dim: int) -> tuple[float, tuple[float, ...]]:
    """The base, and what slows the pairs; old files have them apart, new ones together."""
    together = fields.get("rope_parameters", dict, {})
    scaling = _Fields(fields.path, together or fields.get("rope_scaling", dict, {}))
    theta = (scaling if together else fields).get("rope_theta", float, 10_000.0)
    name = "type" if "rope_type" not in scaling.values else "rope_type"
    scaling.refuse_unless(name, "default", "linear", "llama3")
    match scaling.get(name, str, "default"):
        case "linear":
            return theta, (scaling.get("factor", float),) * (head_dim // 2)
        case "llama3":
            return theta, llama3_factors(
                head_dim,
                theta,
                scaling.get("factor", float),
                scaling.get("low_freq_factor", float),
                scaling.get("high_freq_factor", float),
                scaling.get("original_max_position_embeddings", int),
            )
    return theta, ()
