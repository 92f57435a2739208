"""Checkpoints in one GGUF file, of any float or quantised type that the gguf package reads."""

import functools
import reprlib
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor, dequantize

from routing_jax.models.config import DecoderConfig
from routing_jax.models.pretrained.parts import Checkpoint, Tensor, check_size

ARCHITECTURES = ("llama", "qwen2", "qwen3")
# These store the rows of q and k so that RoPE's pairs stand side by side.
_INTERLEAVED = ("llama",)
_REQUIRED = object()


@functools.lru_cache(maxsize=2)  # the reader takes seconds for a tokenizer's many words
def _reader(path: Path, *now: int) -> GGUFReader:
    """The file as it is `now` (inode, time, size), mapped into memory."""
    return GGUFReader(path)


class GGUF:
    """A GGUF file, mapped into memory: its fields, each checked as it is read, and its tensors."""

    def __init__(self, path: Path):
        self.path = path
        try:
            # The reader believes what it reads: damage surfaces anywhere, as any error.
            with np.errstate(all="ignore"):
                stat = path.stat()
                now = stat.st_ino, stat.st_mtime_ns, stat.st_size
                self.reader = _reader(path.resolve(), *now)
        except OSError:
            raise
        except Exception as e:
            raise ValueError(f"{path} is no whole GGUF file: {e}.") from e

    def get(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        """A field as int, float, bool, str or list.

        Raises:
          ValueError: it is missing and has no default, or is of another kind.
        """
        field = self.reader.fields.get(name)
        if field is None:
            if default is _REQUIRED:
                raise ValueError(f"{self.path} has no {name!r}, which a model of its kind needs.")
            return default
        try:
            value = field.contents()
        except Exception as e:
            raise ValueError(f"{self.path} is damaged: {name} can't be read: {e}.") from e
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(
                f"{self.path}: {name} is {reprlib.repr(value)}; it must be {kind.__name__}."
            )
        return value


def open_gguf(path: Path) -> Checkpoint:
    """Reads the fields and where the tensors lie.

    Raises:
      ValueError: the file is damaged, or of a model that is not supported.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "a.gguf")
    >>> _ = path.write_text("not a model")
    >>> open_gguf(path)
    Traceback (most recent call last):
    ValueError: ...a.gguf is no whole GGUF file: GGUF magic invalid.
    """
    file = GGUF(path)
    kind = file.get("general.architecture", str)
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"{path}: general.architecture is {kind!r}; supported: {', '.join(ARCHITECTURES)}."
        )
    stored = {tensor.name: tensor for tensor in file.reader.tensors}
    config = _config(file, kind, stored)
    tensors = {}
    for name, tensor in stored.items():
        _check_type(path, tensor)
        turned = kind in _INTERLEAVED and name.endswith((".attn_q.weight", ".attn_k.weight"))
        tensors[name] = _tensor(tensor, config.head_dim if turned else 0)
    return Checkpoint(path, config, "gguf", tensors)


def _check_type(path: Path, tensor: ReaderTensor) -> None:
    try:
        dequantize(tensor.data[:1], tensor.tensor_type)
    except NotImplementedError as e:
        raise ValueError(
            f"{path} stores {tensor.name} as {tensor.tensor_type.name}, which the gguf package "
            "can't dequantise."
        ) from e


def _tensor(tensor: ReaderTensor, head_dim: int) -> Tensor:
    """A tensor whose rows are dequantised as they are read; with a head_dim, also put in order."""

    def read(rows: slice) -> np.ndarray:
        array = dequantize(tensor.data[rows], tensor.tensor_type)
        if not head_dim:
            return array
        pairs = array.reshape(-1, head_dim // 2, 2, *array.shape[1:])
        return pairs.swapaxes(1, 2).reshape(array.shape)

    return Tensor(tuple(int(n) for n in reversed(tensor.shape)), read)


def _config(file: GGUF, kind: str, stored: dict[str, ReaderTensor]) -> DecoderConfig:
    path = file.path

    def get(name: str, of: type, default: Any = _REQUIRED) -> Any:
        return file.get(f"{kind}.{name}", of, default)

    if get("expert_count", int, 0):
        raise ValueError(f"{path} is a mixture of experts; supported: one MLP a layer.")
    if file.get("split.count", int, 1) > 1:
        raise ValueError(f"{path} is one of several parts; join them into one file first.")
    width = get("embedding_length", int)
    num_heads = check_size(path, f"{kind}.attention.head_count", get("attention.head_count", int))
    head_dim = get("attention.key_length", int, width // num_heads)
    check_size(path, f"{kind}.attention.key_length", head_dim)
    layers = check_size(path, f"{kind}.block_count", get("block_count", int))
    for name in ("rope.dimension_count", "attention.value_length"):
        if get(name, int, head_dim) != head_dim:
            raise ValueError(
                f"{path}: {kind}.{name} is {get(name, int)}; supported: the head dim {head_dim}."
            )
    context = get("context_length", int)
    window = get("attention.sliding_window", int, 0) or context
    embedding = stored.get("token_embd.weight")
    return DecoderConfig(
        vocab_size=1 if embedding is None else int(embedding.shape[-1]),
        width=width,
        layers=f"full*{layers}",
        num_heads=num_heads,
        num_kv_heads=get("attention.head_count_kv", int, num_heads),
        head_dim=head_dim,
        mlp_width=get("feed_forward_length", int),
        rope_theta=get("rope.freq_base", float, 10_000.0),
        rope_factors=_rope_factors(file, kind, stored, head_dim),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        context=min(context, window),  # within its window, a windowed model is a full one
        norm_eps=get("attention.layer_norm_rms_epsilon", float),
        tie_embeddings="output.weight" not in stored,
        dtype="float32",
    )


def _rope_factors(
    file: GGUF, kind: str, stored: dict[str, ReaderTensor], head_dim: int
) -> tuple[float, ...]:
    """Llama 3.1's divisors stand in the file as a tensor, linear scaling as a field."""
    scaling = file.get(f"{kind}.rope.scaling.type", str, "none")
    if scaling not in ("none", "linear"):
        raise ValueError(
            f"{file.path}: {kind}.rope.scaling.type is {scaling!r}; supported: 'none', 'linear'."
        )
    factors = np.ones(head_dim // 2)
    if scaling == "linear":
        factors *= file.get(f"{kind}.rope.scaling.factor", float)
    if "rope_freqs.weight" in stored:
        divisors = stored["rope_freqs.weight"].data
        if divisors.shape != factors.shape:
            raise ValueError(
                f"{file.path} holds rope_freqs.weight of shape {divisors.shape}; its configuration "
                f"asks for {factors.shape}."
            )
        factors *= divisors
    return () if (factors == 1).all() else tuple(factors.tolist())
