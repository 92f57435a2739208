"""Associative recall: a sequence tells key-value pairs, then asks for the values of some keys.

Vocabulary, keys below values as in Arora et al. 2023 (Zoology, arXiv:2312.04927):

    [0, keys)                 keys
    [keys, keys + values)     values
    keys + values             MARKER, stands before a query when queries are marked
    keys + values + 1         FILLER, stands where a sequence has a token left over

Two layouts, k and v being tokens of a pair, M the MARKER and n noise:

    pairs    k v k v k v ... M k M k      every pair fits in, the queries stand at the end
    mqar     k v k v n n M k n n n n M k  as many pairs as queries, the queries among noise
"""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np

from routing_jax.train.data.batch import Batch, Split, generator

# The exponent of Zoology's law for the gap between a pair and its query: the i-th place after
# the pairs is drawn in proportion to i^(a - 1).
_GAP_POWER = 0.01


@dataclasses.dataclass(frozen=True)
class RecallConfig:
    """An associative recall task, generated on the fly.

    Raises:
      ValueError: a field out of range, or more queries than a sequence can hold.

    >>> RecallConfig(length=128).vocab_size  # 63 keys, 64 values, MARKER, FILLER
    129
    """

    length: int = 128
    """Tokens a sequence; the vocabulary is sized for it."""
    num_queries: int = 1
    """Keys asked for a sequence, each of another pair."""
    marked: bool = True
    """Whether a MARKER token stands before each query."""
    style: Literal["pairs", "mqar"] = "pairs"
    """pairs: queries at the end; mqar: queries at power-law gaps among noise (Zoology)."""
    num_values: int = 64
    """Values in the vocabulary; an untaught guess is right once in as many times."""
    num_keys: int = 0
    """Keys in the vocabulary; 0: as many as a sequence of this length needs."""
    keys_per_token: int = 0
    """pairs: a shorter sequence of a curriculum of lengths draws from the first so many keys times
    its length; 0: from all keys. Hundreds of keys at length 8 are too rare to start from."""

    def __post_init__(self):
        if self.style not in ("pairs", "mqar"):
            raise ValueError(f"style={self.style!r} must be 'pairs' or 'mqar'.")
        if self.num_queries < 1:
            raise ValueError(f"num_queries={self.num_queries} must be at least 1.")
        if self.num_values < 2:
            raise ValueError(f"num_values={self.num_values} must be at least 2.")
        if self.keys_per_token < 0 or (self.keys_per_token and self.style == "mqar"):
            raise ValueError(
                f"keys_per_token={self.keys_per_token} must be at least 0, and 0 for style='mqar'."
            )
        pairs, queries = _fit(self, self.length)
        if queries < self.num_queries:
            raise ValueError(
                f"num_queries={self.num_queries} must be at most {queries} at "
                f"length={self.length}, so that each query has a pair of its own."
            )
        if self.num_keys and self.num_keys < pairs:
            raise ValueError(
                f"num_keys={self.num_keys} must be 0 or at least {pairs}, the number of pairs "
                f"in a sequence of length={self.length}."
            )

    @property
    def keys(self) -> int:
        """Keys in the vocabulary, with ``num_keys=0`` resolved.

        For ``mqar`` that is half the length, so that noise can hold keys that no pair has told.
        """
        if self.num_keys:
            return self.num_keys
        return self.length // 2 if self.style == "mqar" else _fit(self, self.length).pairs

    @property
    def marker(self) -> int:
        """The token that stands before a query."""
        return self.keys + self.num_values

    @property
    def filler(self) -> int:
        """The token that stands where a sequence has one left over."""
        return self.marker + 1

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary: keys, values, MARKER and FILLER, whether or not used."""
        return self.filler + 1

    def token_name(self, token: int) -> str:
        """What a token is, for people: a key k3, a value v7, MARKER or FILLER.

        >>> RecallConfig(length=128).token_name(63)
        'v0'
        """
        if token < self.keys:
            return f"k{token}"
        if token < self.marker:
            return f"v{token - self.keys}"
        return "MARKER" if token == self.marker else "FILLER"

    def floor(self) -> int:
        """Count the tokens of a sequence that must attend at the least, in one layer: its queries.

        A router that sees only a few tokens back can find marked queries, and no others: without
        marks a key that is asked looks like a key that is told, and every key has to attend.

        >>> RecallConfig(length=256, num_queries=4).floor()
        4
        """
        return self.num_queries


class _Layout(NamedTuple):
    pairs: int
    queries: int


def _fit(config: RecallConfig, length: int) -> _Layout:
    """How many pairs and queries a sequence of this length holds.

    As many queries as configured, or as many as leave a pair to each.

    Raises:
      ValueError: no room for one pair and one query.
    """
    mqar = config.style == "mqar"
    # mqar gives each query a slot of two tokens, (MARKER, key) or (key, noise).
    query_tokens = 2 if config.marked or mqar else 1
    queries = min(config.num_queries, length // (2 + query_tokens))
    if queries < 1:
        raise ValueError(
            f"length={length} must be at least {2 + query_tokens}: one pair and one query."
        )
    return _Layout(queries if mqar else (length - query_tokens * queries) // 2, queries)


def _permutations(rng: np.random.Generator, rows: int, size: int) -> np.ndarray:
    """[rows, size] int32, each row a random order of range(size)."""
    return rng.permuted(np.tile(np.arange(size, dtype=np.int32), (rows, 1)), axis=1)


def _distinct(rng: np.random.Generator, rows: int, size: int, count: int) -> np.ndarray:
    """[rows, count] int32, each row distinct numbers below size in random order."""
    if count * count > size:
        return _permutations(rng, rows, size)[:, :count]
    # Few of many: drawing freely and again where a row repeats itself is far cheaper than
    # permuting all, and every distinct row stays equally likely.
    drawn = rng.integers(0, size, (rows, count), dtype=np.int32)
    while True:
        ordered = np.sort(drawn, axis=1)
        again = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
        if not again.size:
            return drawn
        drawn[again] = rng.integers(0, size, (again.size, count), dtype=np.int32)


def recall_batch(
    config: RecallConfig,
    *,
    split: Split,
    seed: int,
    step: int,
    batch_size: int,
    length: int | None = None,
    place: Literal["random", "first"] = "random",
) -> Batch:
    """Make all sequences of one step, a pure function of the arguments.

    In ``pairs``, an odd token left over is a FILLER at the very end, behind everything read. In
    ``mqar``, noise is values and keys that no pair of the sequence has told, none of them twice,
    and pair r is asked in the r-th place drawn, as in Zoology's released generator.

    Args:
      config: the task.
      split: train and validation draw from streams that never meet.
      seed: 0 to 2^64 - 1.
      step: which batch, 0 to 2^64 - 1.
      batch_size: B.
      length: T, by default ``config.length``; a shorter one keeps the vocabulary and asks only as
        many queries as leave a pair to each.
      place: where the first queried pair stands, anywhere or at positions 0-1 (the published
        task: the answer stands ``length - 2`` before the query). Only ``pairs`` reads it.

    Returns:
      Batch of [B, T]; the target at a query's key is its value, weight 1 there and 0 elsewhere.

    Raises:
      ValueError: a length that holds no pair and query, or more pairs than there are keys.

    >>> config = RecallConfig(length=8)
    >>> batch = recall_batch(config, split="train", seed=0, step=0, batch_size=2)
    >>> batch.tokens.shape, batch.weights[0].tolist()
    ((2, 8), [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    """
    length = config.length if length is None else length
    pairs, queries = _fit(config, length)
    if pairs > config.keys:
        raise ValueError(
            f"length={length} must hold at most {config.keys} pairs, the keys of the vocabulary: "
            f"raise num_keys to {pairs}."
        )
    rng = generator(split, seed, step)
    told = pairs if config.style == "pairs" else config.keys  # mqar's noise wants the others too
    drawn_from = config.keys
    if config.keys_per_token and length < config.length:
        drawn_from = min(config.keys, config.keys_per_token * length)
    keys = _distinct(rng, batch_size, drawn_from, told)
    values = rng.integers(config.keys, config.marker, (batch_size, pairs), dtype=np.int32)

    tokens = np.full((batch_size, length), config.filler, np.int32)
    tokens[:, 0 : 2 * pairs : 2] = keys[:, :pairs]
    tokens[:, 1 : 2 * pairs : 2] = values
    if config.style == "mqar":
        tokens[:, 2 * pairs :] = _noise(config, rng, keys, pairs, length - 2 * pairs)
        asked = np.tile(np.arange(pairs), (batch_size, 1))
        slots = _power_law_slots(rng, batch_size, queries, (length - 2 * pairs) // 2)
        starts = 2 * pairs + 2 * slots
    else:
        asked = _asked_pairs(rng, batch_size, pairs, queries, place)
        query_tokens = 2 if config.marked else 1
        starts = np.tile(2 * pairs + query_tokens * np.arange(queries), (batch_size, 1))

    rows = np.arange(batch_size)[:, None]
    if config.marked:
        tokens[rows, starts] = config.marker
    at = starts + 1 if config.marked else starts
    tokens[rows, at] = keys[rows, asked]
    targets = np.zeros_like(tokens)
    targets[rows, at] = values[rows, asked]
    weights = np.zeros(tokens.shape, np.float32)
    weights[rows, at] = 1
    return Batch(tokens, targets, weights)


def _asked_pairs(
    rng: np.random.Generator, rows: int, pairs: int, queries: int, place: str
) -> np.ndarray:
    """[rows, queries], distinct pairs in a random order; ``first`` puts pair 0 in front."""
    if place == "random":
        return _permutations(rng, rows, pairs)[:, :queries]
    others = 1 + _permutations(rng, rows, pairs - 1)[:, : queries - 1]
    return np.concatenate([np.zeros((rows, 1), np.int32), others], axis=1)


def _noise(
    config: RecallConfig, rng: np.random.Generator, keys: np.ndarray, told: int, size: int
) -> np.ndarray:
    """[B, size] tokens, each a value or one of the keys behind the ``told`` first of each row.

    Without keys among it, or with a FILLER in its stead, a convolution could tell a query from a
    pair by its neighbours, and unmarked queries would be marked after all. No key comes twice, so
    that a key seen before is always a query.
    """
    shape = (len(keys), size)
    spare = config.keys - told
    values = rng.integers(config.keys, config.marker, shape, dtype=np.int32)
    is_key = rng.random(shape) < spare / (spare + config.num_values)
    nth = told + np.cumsum(is_key, axis=1) - 1
    is_key &= nth < config.keys
    return np.where(is_key, np.take_along_axis(keys, nth.clip(0, config.keys - 1), axis=1), values)


def _power_law_slots(rng: np.random.Generator, rows: int, count: int, slots: int) -> np.ndarray:
    """[rows, count] distinct slots, slot i drawn in proportion to (i + 1)^(a - 1).

    Adding Gumbel noise to the logarithms and sorting is drawing one by one without replacement.
    """
    logits = (_GAP_POWER - 1) * np.log(np.arange(1, slots + 1))
    return np.argsort(-(logits + rng.gumbel(size=(rows, slots))), axis=1)[:, :count]
