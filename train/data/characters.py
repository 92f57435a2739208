"""Characters of text: files joined in the order given, the last part held out.

The vocabulary is the characters that occur, in the order of their code points.
"""

import dataclasses
import functools

import numpy as np

from routing_jax.train.data.corpus import Corpus, read_documents


@dataclasses.dataclass(frozen=True)
class CharacterConfig:
    """Character-level language modelling: a token is a character of the text.

    Raises:
      ValueError: a field out of range.

    >>> CharacterConfig(length=256).vocab_size
    256
    """

    length: int = 256
    """Tokens a sequence, the context."""
    source: tuple[str, ...] = ("stdlib",)
    """Files or folders of text (UTF-8; gs:// and .gz too), joined in this order, or stdlib."""
    vocab_size: int = 256
    """Of the model; at least the characters that there are."""
    vocabulary_source: tuple[str, ...] = ()
    """Whose characters are the vocabulary; source's own when empty. Others are left out."""
    validation_fraction: float = 0.1
    """Share of the characters held out, the last ones."""

    def __post_init__(self):
        for name in ("length", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not self.source:
            raise ValueError("source=() must name at least one file or folder of text, or stdlib.")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} must lie between 0 and 1."
            )


def vocabulary(config: CharacterConfig) -> str:
    """The characters that tokens stand for, by token.

    Raises:
      ValueError: text that can't be read, is not UTF-8, or is empty.

    >>> "".join(sorted(vocabulary(CharacterConfig()))) == vocabulary(CharacterConfig())
    True
    """
    return _vocabulary(config.vocabulary_source or config.source)


@functools.lru_cache(maxsize=4)
def load_characters(config: CharacterConfig) -> Corpus:
    """Reads a text as tokens, once a process: two arrays, one to train on and one held out.

    Raises:
      ValueError: as `vocabulary`, or more characters than vocab_size.

    >>> load_characters(CharacterConfig()).train.dtype
    dtype('int32')
    """
    known = _code_points(vocabulary(config))
    if known.size > config.vocab_size:
        raise ValueError(
            f"vocab_size={config.vocab_size} must be at least {known.size}, the characters of "
            f"{_named(config.vocabulary_source or config.source)}."
        )
    text = _code_points(_read(config.source))
    tokens = np.minimum(np.searchsorted(known, text), known.size - 1).astype(np.int32)
    tokens = tokens[known[tokens] == text]
    split = int((1 - config.validation_fraction) * tokens.size)
    return Corpus(tokens[:split], tokens[split:])


@functools.lru_cache(maxsize=4)
def _vocabulary(source: tuple[str, ...]) -> str:
    return "".join(map(chr, np.unique(_code_points(_read(source)))))


@functools.lru_cache(maxsize=2)
def _read(source: tuple[str, ...]) -> str:
    parts = []
    for name in source:
        try:
            text = "".join(part.decode() for part in read_documents(name))
        except UnicodeDecodeError as error:
            raise ValueError(f"source={name!r} is not UTF-8: {error.reason}.") from error
        if not text:
            raise ValueError(f"source={name!r} holds no text.")
        parts.append(text)
    return "".join(parts)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _named(source: tuple[str, ...]) -> str:
    return ", ".join(map(repr, source))
