"""Needle in a haystack: a few facts hidden in noise, asked for at the end.

Vocabulary:

    [0, keys)                 keys
    [keys, keys + values)     values
    then num_noise tokens     noise
    then NEEDLE and ASK       NEEDLE k v stands somewhere in the noise, ASK k behind it

With several needles the others are distractors of the same form (multi-key needle, as in RULER,
arXiv 2404.06654).
"""

import dataclasses

import numpy as np

from routing_jax.train.data.batch import Batch, Split, generator

_FACT = 3  # NEEDLE k v
_QUESTION = 2  # ASK k


@dataclasses.dataclass(frozen=True)
class NeedleConfig:
    """A needle task, generated on the fly.

    Raises:
      ValueError: a field out of range, or more needles than a sequence can hold.

    >>> NeedleConfig(length=1024).vocab_size  # 64 keys, 64 values, 256 noise tokens, NEEDLE, ASK
    386
    """

    length: int = 4096
    """Tokens a sequence."""
    num_needles: int = 1
    """Facts hidden in a sequence, each of another key."""
    num_queries: int = 1
    """How many of them are asked for, each by a question at the end."""
    num_keys: int = 64
    """Keys in the vocabulary."""
    num_values: int = 64
    """Values in the vocabulary; an untaught guess is right once in as many times."""
    num_noise: int = 256
    """Noise tokens in the vocabulary."""
    after: int = 0
    """Tokens of noise behind the questions, at most half of a sequence: the last question's key may
    so be a tile's first query, by which routers of tiles decide."""

    def __post_init__(self):
        if self.num_values < 2 or self.num_noise < 1:
            raise ValueError(
                f"num_values={self.num_values} and num_noise={self.num_noise} must be at least 2 "
                "and 1."
            )
        if not 1 <= self.num_needles <= self.num_keys:
            raise ValueError(
                f"num_needles={self.num_needles} must lie from 1 to num_keys={self.num_keys}."
            )
        if not 1 <= self.num_queries <= self.num_needles:
            raise ValueError(
                f"num_queries={self.num_queries} must lie from 1 to num_needles={self.num_needles}."
            )
        if self.after < 0:
            raise ValueError(f"after={self.after} must be at least 0.")
        most = _fit(self, self.length - _behind(self, self.length))
        if most < self.num_needles:
            raise ValueError(
                f"num_needles={self.num_needles} must be at most {most} at length={self.length} "
                f"and after={self.after}."
            )

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary."""
        return self.num_keys + self.num_values + self.num_noise + 2


def _behind(config: NeedleConfig, length: int) -> int:
    """Tokens of noise behind the questions of a sequence of this length."""
    return min(config.after, length // 2)


def _fit(config: NeedleConfig, length: int) -> int:
    """How many needles a sequence of this length holds, up to those configured.

    Raises:
      ValueError: no room for one.
    """
    if length < _FACT + _QUESTION:
        raise ValueError(
            f"length={length} must be at least {_FACT + _QUESTION}: one fact, one ask."
        )
    # As many questions as configured, or as there are needles to ask for.
    fits = (length - _QUESTION * config.num_queries) // _FACT
    if fits < config.num_queries:
        fits = length // (_FACT + _QUESTION)
    return min(config.num_needles, fits)


def needle_batch(
    config: NeedleConfig,
    *,
    split: Split,
    seed: int,
    step: int,
    batch_size: int,
    length: int | None = None,
) -> Batch:
    """Make all sequences of one step, a pure function of the arguments.

    Args:
      config: the task.
      split: train and validation draw from streams that never meet.
      seed: 0 to 2^64 - 1.
      step: which batch, 0 to 2^64 - 1.
      batch_size: B.
      length: T, by default ``config.length``; a shorter one hides fewer needles if it must.

    Returns:
      Batch of [B, T]; the target at a question's key is its value, weight 1 there and 0 elsewhere.

    Raises:
      ValueError: a length that holds no needle.

    >>> config = NeedleConfig(length=16)
    >>> batch = needle_batch(config, split="train", seed=0, step=0, batch_size=2)
    >>> batch.tokens.shape, batch.weights.sum(axis=1).tolist()
    ((2, 16), [1.0, 1.0])
    """
    length = config.length if length is None else length
    end = length - _behind(config, length)
    needles = _fit(config, end)
    queries = min(config.num_queries, needles)
    rng = generator(split, seed, step)
    first_noise = config.num_keys + config.num_values
    needle, ask = first_noise + config.num_noise, first_noise + config.num_noise + 1
    tokens = rng.integers(first_noise, needle, (batch_size, length), dtype=np.int32)

    order = np.tile(np.arange(config.num_keys, dtype=np.int32), (batch_size, 1))
    keys = rng.permuted(order, axis=1)[:, :needles]
    values = rng.integers(config.num_keys, first_noise, keys.shape, dtype=np.int32)
    # Distinct places in a haystack without the facts' own tokens, then room made for each.
    free = end - _QUESTION * queries - _FACT * needles
    places = np.sort(rng.integers(0, free + 1, keys.shape), axis=1) + _FACT * np.arange(needles)
    rows = np.arange(batch_size)[:, None]
    tokens[rows, places] = needle
    tokens[rows, places + 1] = keys
    tokens[rows, places + 2] = values

    asked = rng.permuted(np.tile(np.arange(needles), (batch_size, 1)), axis=1)[:, :queries]
    at = end - _QUESTION * queries + _QUESTION * np.arange(queries)[None]
    tokens[rows, at] = ask
    tokens[rows, at + 1] = keys[rows, asked]
    targets, weights = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
    targets[rows, at + 1] = values[rows, asked]
    weights[rows, at + 1] = 1
    return Batch(tokens, targets, weights)
