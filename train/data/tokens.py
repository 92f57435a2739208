"""Text in the tokens of a published model."""

import dataclasses
import functools

import numpy as np
from tokenizers import Tokenizer

from routing_jax.models.pretrained import load_tokenizer
from routing_jax.train.data.batch import Split
from routing_jax.train.data.corpus import read_pieces


@dataclasses.dataclass(frozen=True)
class TokenConfig:
    """Language modelling in the tokens of a published model.

    Raises:
      ValueError: a field out of range.

    >>> TokenConfig(length=512).source
    'stdlib'
    """

    length: int = 2048
    """Tokens a sequence, the context."""
    source: str = "stdlib"
    """The text: as --data.source of other tasks."""
    validation_fraction: float = 0.02
    """Share of the text held out."""
    tokenizer: str = ""
    """The model's folder or GGUF file; its tokenizer is used."""
    vocab_size: int = 1
    """Of the model."""

    def __post_init__(self):
        for name in ("length", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} must lie between 0 and 1."
            )


@functools.lru_cache(maxsize=2)
def open_tokenizer(path: str) -> Tokenizer:
    """A published model's tokenizer, read once a process.

    Raises:
      ValueError: no path, or what `load_tokenizer` refuses.

    >>> open_tokenizer("")
    Traceback (most recent call last):
    ValueError: tokenizer='' must be a model's folder or GGUF file.
    """
    if not path:
        raise ValueError("tokenizer='' must be a model's folder or GGUF file.")
    return load_tokenizer(path)


@functools.lru_cache(maxsize=4)
def load_tokens(
    source: str, validation_fraction: float, split: Split, tokenizer: str
) -> np.ndarray:
    """A split's text as tokens; megabytes take seconds, so once a process.

    Args:
      source: the text, as ``TextConfig.source``.
      validation_fraction: of the bytes, to hold out.
      split: which part.
      tokenizer: the model's folder or GGUF file.

    Returns:
      [tokens] int32.

    Raises:
      ValueError: as `open_tokenizer` and `read_pieces`.

    >>> load_tokens("stdlib", 0.02, "train", "")
    Traceback (most recent call last):
    ValueError: tokenizer='' must be a model's folder or GGUF file.
    """
    opened = open_tokenizer(tokenizer)
    pieces = getattr(read_pieces(source, "", validation_fraction), split)
    texts = [piece.decode(errors="ignore") for piece in pieces]
    encoded = opened.encode_batch(texts, add_special_tokens=False)
    return np.concatenate([np.array(e.ids, np.int32) for e in encoded] or [np.zeros(0, np.int32)])
