"""What a step reads, and where its randomness comes from."""

from typing import Literal, NamedTuple

import numpy as np

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


class Batch(NamedTuple):
    """One step's sequences.

    Attributes:
      tokens: [B, T] int32, what the model reads.
      targets: [B, T] int32, what it should say at each position; 0 where the weight is 0.
      weights: [B, T] float32, above 0 where the loss and the accuracy are read.

    >>> batch = Batch(*(np.zeros([2, 8]) for _ in range(3)))
    >>> batch.tokens.shape
    (2, 8)
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def generator(split: Split, seed: int, step: int) -> np.random.Generator:
    """Give the random numbers of one step of one split, without drawing those before it.

    Philox is counter-based: the key holds (seed, split) and the step is the counter's highest
    word, so each step has 2^192 blocks of its own and no two streams ever meet.

    Args:
      split: which split the numbers are for.
      seed: 0 to 2^64 - 1.
      step: 0 to 2^64 - 1.

    >>> int(generator("train", 0, 7).integers(1000)) == int(generator("train", 0, 7).integers(1000))
    True
    """
    key = np.array([seed, SPLITS.index(split)], dtype=np.uint64)
    counter = np.array([0, 0, 0, step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
