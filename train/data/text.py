"""Bytes, characters or tokens of text in windows of one context, addressed by step."""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from routing_jax.train.data.batch import Batch, Split, generator
from routing_jax.train.data.characters import CharacterConfig, load_characters
from routing_jax.train.data.corpus import load_corpus
from routing_jax.train.data.tokens import TokenConfig, load_tokens


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Byte-level language modelling: a token is a byte, 0 stands between pieces of documents.

    Raises:
      ValueError: a field out of range.

    >>> TextConfig(length=512).vocab_size
    256
    """

    length: int = 4096
    """Tokens a sequence, the context."""
    source: str = "stdlib"
    """stdlib (Python's own library here, about 10 MB, the same only for the same Python), a folder
    or file of text (gs:// and .gz too), tfds:NAME[:FEATURE], or what `data prepare` wrote."""
    data_dir: str = ""
    """Where tfds keeps its data sets, for source tfds:NAME; empty: its own default."""
    validation_fraction: float = 0.02
    """Share of the bytes held out; not read when the source has a validation split."""

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"length={self.length} must be at least 1.")
        if not self.source:
            raise ValueError("source='' must be 'stdlib', 'tfds:NAME', or a folder or file.")
        if self.data_dir and not self.source.startswith("tfds:"):
            raise ValueError(
                f"data_dir={self.data_dir!r} must be empty unless source is 'tfds:NAME', not "
                f"{self.source!r}."
            )
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} must lie between 0 and 1."
            )

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary: the 256 bytes."""
        return 256


AnyText = TextConfig | CharacterConfig | TokenConfig


def window_count(config: AnyText, *, split: Split, length: int | None = None) -> int:
    """Count the windows that one pass over a split has.

    ``ceil(window_count / batch_size)`` validation batches read each validation window once.

    Args:
      config: the corpus.
      split: which split of it.
      length: T, by default ``config.length``.

    Raises:
      ValueError: as ``load_corpus``, ``load_characters`` or ``load_tokens``, or a split shorter
        than one window.

    >>> window_count(TextConfig(), split="train", length=1024) > 1000
    True
    """
    length = config.length if length is None else length
    return _count(_data(config, split, length).size, split, length)


def _data(config: AnyText, split: Split, length: int) -> np.ndarray:
    """[tokens] of the split's text, at least one window of it."""
    if isinstance(config, CharacterConfig):
        data, tokens = getattr(load_characters(config), split), "characters"
    elif isinstance(config, TokenConfig):
        fraction, tokens = config.validation_fraction, "tokens"
        data = load_tokens(config.source, fraction, split, config.tokenizer)
    else:
        corpus = load_corpus(config.source, config.data_dir, config.validation_fraction)
        data, tokens = getattr(corpus, split), "bytes"
    if data.size < length + 1:
        raise ValueError(
            f"source={config.source!r} has {data.size} {tokens} in its {split} split, too few for "
            f"one window of length={length}: give more text, a shorter length or another "
            "validation_fraction."
        )
    return data


def _count(size: int, split: Split, length: int) -> int:
    if split == "validation":
        return (size - 1) // length
    # One window fewer than fit, which leaves each epoch room to start somewhere else.
    return max(1, (size - length) // length)


def text_batch(
    config: AnyText,
    *,
    split: Split,
    seed: int,
    step: int,
    batch_size: int,
    length: int | None = None,
) -> Batch:
    """Read all windows of one step, a pure function of the arguments and the corpus.

    Windows do not overlap, but that the last target of one is the first token of the next.
    *train*: every epoch is a new order of the windows, cut from a new offset. *validation*: the
    seed is not read. Every pass has the same windows in the same order, a scattered one, so that
    an evaluation cut short reads all parts of the corpus; a pass begins with a batch of its own,
    and rows of its last batch that no window is left for repeat earlier ones with weight 0.

    Args:
      config: the corpus.
      split: which split of it.
      seed: of the orders and offsets, 0 to 2^64 - 1.
      step: which batch, from 0.
      batch_size: B.
      length: T, by default ``config.length``.

    Returns:
      Batch of [B, T]; targets are the tokens one place later.

    Raises:
      ValueError: as ``window_count``.

    >>> batch = text_batch(TextConfig(), split="train", seed=0, step=0, batch_size=2, length=64)
    >>> bool((batch.tokens[:, 1:] == batch.targets[:, :-1]).all())
    True
    """
    length = config.length if length is None else length
    data = _data(config, split, length)
    count = _count(data.size, split, length)
    if split == "validation":
        steps_a_pass = -(-count // batch_size)
        rows = step % steps_a_pass * batch_size + np.arange(batch_size)
        starts = _epoch(count, 1, split, 0, 0).order[rows % count] * length
        live = rows < count
    else:
        rows = step * batch_size + np.arange(batch_size)
        starts = np.empty(batch_size, np.int64)
        offsets = min(length, data.size - count * length)
        for number in np.unique(rows // count):
            epoch = _epoch(count, offsets, split, seed, int(number))
            here = rows // count == number
            starts[here] = epoch.offset + epoch.order[rows[here] % count] * length
        live = np.ones(batch_size, bool)
    windows = data[starts[:, None] + np.arange(length + 1)].astype(np.int32)
    weights = np.broadcast_to(live[:, None], (batch_size, length)).astype(np.float32)
    return Batch(windows[:, :-1], windows[:, 1:], weights)


class _Epoch(NamedTuple):
    order: np.ndarray  # [windows] int64, which window is read when
    offset: int  # where window 0 begins


@functools.lru_cache(maxsize=4)
def _epoch(count: int, offsets: int, split: Split, seed: int, number: int) -> _Epoch:
    rng = generator(split, seed, number)
    return _Epoch(rng.permutation(count), int(rng.integers(offsets)))
