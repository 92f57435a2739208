"""Prompts for a published model: facts hidden in real text and asked for, the text itself, maths.

A row is a prompt and what follows it, which alone is scored: routers read the prompt, so a loss
within it would teach them to look ahead. Tasks, after RULER (arXiv 2404.06654):

    passkey     one number stands somewhere in the text and is asked for
    multikey    several words have a number each, and one is asked for
    variables   x = number, y = x, …: the last variable's value is asked for
    text        the text goes on
    maths       solved word problems fill the prompt, and another one is asked
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from routing_jax.train.data.batch import Split, generator
from routing_jax.train.data.tokens import load_tokens, open_tokenizer
from routing_jax.train.data.word_problems import word_problem

PROMPT_TASKS = ("passkey", "multikey", "variables", "text", "maths")

_KEYS = (
    *("anchor", "basket", "candle", "desert", "engine", "forest", "garden", "hammer", "island"),
    *("jacket", "kettle", "ladder", "meadow", "needle", "orange", "pencil", "quarry", "ribbon"),
    *("saddle", "tunnel", "violin", "window", "yogurt", "zipper"),
)


class PromptBatch(NamedTuple):
    """One step's prompts, and what follows each of them.

    Attributes:
      tokens: [B,T] int32: a prompt, its answer, and 0s.
      targets: [B,A] int32, the answers; 0 where the weight is 0.
      weights: [B,A] float32, those of an answer adding up to 1.
      lengths: [B] int32, tokens of each prompt.
      tasks: [B] int32, by their places in PROMPT_TASKS.

    >>> PromptBatch(*(np.zeros(2),) * 5).tasks.shape
    (2,)
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    lengths: np.ndarray
    tasks: np.ndarray

    @property
    def places(self) -> Any:
        """[B,A], the places in a row whose logits predict the targets."""
        after = np.arange(self.targets.shape[1], dtype=np.int32)[None]
        return self.lengths[:, None] - 1 + after

    @property
    def positions(self) -> Any:
        """[B,T] int32, −1 behind the answers."""
        index = np.arange(self.tokens.shape[1], dtype=np.int32)[None]
        ends = self.lengths + (self.weights > 0).sum(axis=1)
        return ((index + 1) * (index < ends[:, None]) - 1).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """A mixture of prompts, generated on the fly.

    Raises:
      ValueError: a field out of range.

    >>> PromptConfig(length=1024).mixture
    ('passkey', 'text', 'multikey', 'text', 'variables', 'text')
    """

    length: int = 8192
    """Tokens a row, prompt and answer."""
    shortest: int = 0
    """Draw the length of each row from here up to `length`, small ones as often as large ones; 0
    for all the same."""
    answer: int = 64
    """Tokens after the prompt that are scored at most, of text exactly."""
    source: str = "stdlib"
    """The text: as --data.source of other tasks."""
    validation_fraction: float = 0.02
    """Share of the text held out; 1 for a text that nothing is trained on."""
    mixture: tuple[str, ...] = ("passkey", "text", "multikey", "text", "variables", "text")
    """The task of each row in turn."""
    keys: int = 4
    """Words that have a number, for multikey."""
    hops: int = 1
    """How many variables copy another one, for variables."""
    tokenizer: str = ""
    """The model's folder or GGUF file; its tokenizer is used."""
    vocab_size: int = 1
    """Of the model."""

    def __post_init__(self):
        for name in ("length", "answer", "hops", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not self.mixture or not set(self.mixture) <= set(PROMPT_TASKS):
            raise ValueError(
                f"mixture={self.mixture} must name tasks out of {', '.join(PROMPT_TASKS)}."
            )
        if not 1 <= self.keys <= len(_KEYS):
            raise ValueError(f"keys={self.keys} must lie from 1 to {len(_KEYS)}.")
        if self.shortest < 0 or self.shortest > self.length:
            raise ValueError(f"shortest={self.shortest} must lie from 0 to length={self.length}.")
        if not 0 < self.validation_fraction <= 1:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} must lie above 0, up to 1."
            )


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def _long_text(config: PromptConfig, split: Split, length: int) -> np.ndarray:
    """A split's text as tokens, enough of them for a row."""
    text = load_tokens(config.source, config.validation_fraction, split, config.tokenizer)
    if text.size < length:
        raise ValueError(
            f"source={config.source!r} has {text.size} tokens in its {split} split, too few for "
            f"length={length}: give more text, a shorter length or another validation_fraction."
        )
    return text


class _Riddle(NamedTuple):
    """What is said, where it may stand, and the tokens of the question and of its answer."""

    facts: list[list[int]]
    question: list[int]
    answer: list[int]


def _asked(tokenizer: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """The tokens of both, cut before the first that holds a part of the answer."""
    encoded = tokenizer.encode(f"{question} {answer}", add_special_tokens=False)
    start = len(question) + 1
    cut = next(i for i, (_, end) in enumerate(encoded.offsets) if end > start)
    return encoded.ids[:cut], encoded.ids[cut:]


def _riddle(config: PromptConfig, task: str, tokenizer: Any, rng: np.random.Generator) -> _Riddle:
    def number() -> str:
        return str(rng.integers(10_000, 100_000))

    if task == "passkey":
        answer = number()
        facts = [f"\nThe pass key is {answer}. Remember it. {answer} is the pass key.\n"]
        question = "\nWhat is the pass key? The pass key is"
    elif task == "multikey":
        words = rng.permutation(_KEYS)[: config.keys]
        numbers = [number() for _ in words]
        facts = [f"\nThe number of the {w} is {n}. Remember it.\n" for w, n in zip(words, numbers)]
        at = rng.integers(len(words))
        answer = numbers[at]
        question = f"\nWhat is the number of the {words[at]}? The number of the {words[at]} is"
    else:
        names = [chr(65 + i) for i in rng.permutation(26)[: config.hops + 1]]
        answer = number()
        values = [answer, *(f"VAR_{name}" for name in names)]
        facts = [f"\nVAR_{n} = {v}\n" for n, v in zip(names, values)]
        question = f"\nWhat number is VAR_{names[-1]}? VAR_{names[-1]} ="
    return _Riddle([_encode(tokenizer, fact) for fact in facts], *_asked(
        tokenizer, question, answer))  # fmt: skip


def _passage(
    text: np.ndarray, size: int, answer: int, rng: np.random.Generator
) -> tuple[np.ndarray, list[int]]:
    """`size` tokens of a text from anywhere in it, one at least, and the `answer` that follow."""
    size = max(size, 1)
    start = rng.integers(max(1, text.size - size - answer + 1))
    return text[start : start + size], text[start + size : start + size + answer].tolist()


def _hidden(
    config: PromptConfig, task: str, tokenizer: Any, text: np.ndarray, room: int, rng: Any
) -> tuple[np.ndarray, list[int]]:
    """A text with facts at random places and a question, `room` tokens in all; and its answer."""
    riddle = _riddle(config, task, tokenizer, rng)
    said = sum(map(len, riddle.facts)) + len(riddle.question)
    text, _ = _passage(text, room - said, config.answer, rng)
    places = np.sort(rng.integers(0, len(text) + 1, len(riddle.facts)))
    # In order where one fact builds on another.
    order = np.arange(len(places)) if task == "variables" else rng.permutation(len(places))
    parts, before = [], 0
    for place, i in zip(places, order):
        parts += [text[before:place], np.array(riddle.facts[i], np.int32)]
        before = place
    return np.concatenate([*parts, text[before:], riddle.question]), riddle.answer


def _solved(tokenizer: Any, room: int, rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """Solved word problems and another one, at most `room` tokens if they fit; and its answer."""
    problem = word_problem(rng)
    question, answer = _asked(tokenizer, problem.question, str(problem.answer))
    solved: list[int] = []
    while True:
        shot = word_problem(rng)
        if shot.question == problem.question:
            continue
        words = _encode(tokenizer, str(shot))
        if solved and len(solved) + len(words) + len(question) > room:
            return np.array(solved + question, np.int32), answer
        solved += words


def prompt_batch(
    config: PromptConfig,
    *,
    split: Split,
    seed: int,
    step: int,
    batch_size: int,
    length: int | None = None,
) -> PromptBatch:
    """Make all rows of one step, a pure function of the arguments and the corpus.

    Args:
      config: the mixture.
      split: train and validation draw from different text and from streams that never meet.
      seed: 0 to 2^64 - 1.
      step: which batch, 0 to 2^64 - 1.
      batch_size: B.
      length: T, by default ``config.length``.

    Raises:
      ValueError: a tokenizer or corpus that can't be read, text too short for a row, or a length
        too short for a task.

    >>> prompt_batch(PromptConfig(), split="train", seed=0, step=0, batch_size=2)
    Traceback (most recent call last):
    ValueError: tokenizer='' must be a model's folder or GGUF file.
    """
    length = config.length if length is None else length
    tokenizer = open_tokenizer(config.tokenizer)
    text = np.zeros(0, np.int32)
    if set(config.mixture) != {"maths"}:
        text = _long_text(config, split, length)
    first = tokenizer.encode("", add_special_tokens=True).ids  # what every text begins with
    rng = generator(split, seed, step)
    tokens = np.zeros((batch_size, length), np.int32)
    targets = np.zeros((batch_size, config.answer), np.int32)
    weights = np.zeros((batch_size, config.answer), np.float32)
    lengths, tasks = np.zeros(batch_size, np.int32), np.zeros(batch_size, np.int32)
    for row in range(batch_size):
        task = config.mixture[(step * batch_size + row) % len(config.mixture)]
        size = length
        if config.shortest:
            size = int(np.exp(rng.uniform(np.log(config.shortest), np.log(length))))
        room = size - config.answer - len(first)
        if task == "maths":
            prompt, answer = _solved(tokenizer, room, rng)
        elif task == "text":
            prompt, answer = _passage(text, room, config.answer, rng)
        else:
            prompt, answer = _hidden(config, task, tokenizer, text, room, rng)
        if prompt.size > room or len(answer) > config.answer:
            raise ValueError(
                f"length={size} and answer={config.answer} are too short for {task}, whose words "
                f"take {prompt.size + len(first)} and {len(answer)} tokens."
            )
        whole = np.concatenate([first, prompt, answer]).astype(np.int32)
        tokens[row, : whole.size] = whole
        lengths[row], tasks[row] = whole.size - len(answer), PROMPT_TASKS.index(task)
        targets[row, : len(answer)] = answer
        weights[row, : len(answer)] = 1 / len(answer)
    return PromptBatch(tokens, targets, weights, lengths, tasks)
