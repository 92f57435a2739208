"""Grade-school word problems of two or three steps, in the manner of GSM-Symbolic (2410.05229).

Each is a template with names, things and quantities drawn anew; what is asked for is a number.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_NAMES = (
    *("Ada", "Ben", "Carla", "Deepak", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas"),
    *("Kemi", "Liam", "Mei", "Nora", "Omar", "Priya", "Rosa", "Samir", "Tara", "Viktor"),
)
_THINGS = (
    *("apples", "beads", "books", "buttons", "cards", "coins", "cookies", "marbles"),
    *("pears", "pencils", "shells", "stamps", "stickers", "tickets"),
)
_CONTAINERS = ("bags", "baskets", "boxes", "crates", "jars", "packs")


class WordProblem(NamedTuple):
    """A problem and its answer; as text, the problem solved.

    >>> print(WordProblem("Question: How many are 2 and 3? Answer:", 5), end="")
    Question: How many are 2 and 3? Answer: 5
    <BLANKLINE>
    """

    question: str
    answer: int

    def __str__(self) -> str:
        return f"{self.question} {self.answer}\n\n"


class _Template(NamedTuple):
    """Words with places for quantities a, b, c and d, and what follows from these."""

    words: str
    solve: Callable[[int, int, int, int], int]


_TEMPLATES = (
    _Template(
        "{name} buys {a} {containers} of {b} {things} each and gives {c} {things} to {friend}. How "
        "many {things} does {name} have left?",
        lambda a, b, c, d: a * b - c,
    ),
    _Template(
        "{name} has {a} {things}. {friend} has {b} times as many, and {third} has {c} more than "
        "{friend}. How many {things} does {third} have?",
        lambda a, b, c, d: a * b + c,
    ),
    _Template(
        "{name} has {a} {things} and {friend} has {b} {things} more than {name}. How many {things} "
        "do they have together?",
        lambda a, b, c, d: 2 * a + b,
    ),
    _Template(
        "{name} fills {a} {containers} with {b} {things} each, and {friend} fills {c} {containers} "
        "with {d} {things} each. How many {things} are in all of the {containers}?",
        lambda a, b, c, d: a * b + c * d,
    ),
    _Template(
        "One {thing} costs {a} dollars and one notebook costs {b} dollars. {name} buys {c} "
        "{things} and {d} notebooks. How many dollars does {name} pay?",
        lambda a, b, c, d: a * c + b * d,
    ),
    _Template(
        "{name} reads {a} pages a day for {b} days, and {c} pages a day for the next {d} days. How "
        "many pages does {name} read in all?",
        lambda a, b, c, d: a * b + c * d,
    ),
    _Template(
        "{name} earns {a} dollars an hour and works {b} hours a day. After {c} days, {name} spends "
        "{d} dollars. How many dollars are left?",
        lambda a, b, c, d: a * b * c - d,
    ),
    _Template(
        "A bus has {a} passengers. At a stop {b} people get on, and at the next one {c} people get "
        "on. How many passengers are on the bus now?",
        lambda a, b, c, d: a + b + c,
    ),
    _Template(
        "{name} and {friend} have {a} {things} each. {name} finds {b} {containers} of {c} {things} "
        "and then gives {d} {things} to {friend}. How many {things} does {name} have now?",
        lambda a, b, c, d: a + b * c - d,
    ),
    _Template(
        "{name} plants {a} rows of {b} trees. {c} trees die, and {name} plants {d} new ones. How "
        "many trees are there now?",
        lambda a, b, c, d: a * b - c + d,
    ),
    _Template(
        "{name} is {a} years old. {friend} is {b} years older than {name}, and {third} is {c} "
        "years older than {friend}. How old is {third}?",
        lambda a, b, c, d: a + b + c,
    ),
    _Template(
        "A baker makes {a} trays of {b} rolls in the morning and {c} rolls in the afternoon. Of "
        "all rolls, {d} are not sold. How many rolls are sold?",
        lambda a, b, c, d: a * b + c - d,
    ),
)


def word_problem(rng: np.random.Generator) -> WordProblem:
    """Draw a problem with quantities from 2 to 12 and a positive answer.

    Args:
      rng: where the draw comes from.

    >>> problem = word_problem(np.random.default_rng(11))
    >>> problem.question.splitlines()[0]
    'Question: Omar has 4 stamps. Kemi has 10 times as many, and Elena has 5 more than Kemi. ...'
    >>> problem.answer
    45
    """
    words, solve = _TEMPLATES[rng.integers(len(_TEMPLATES))]
    a, b = (int(n) for n in rng.integers(3, 13, 2))
    c, d = (int(n) for n in rng.integers(2, 9, 2))
    name, friend, third = (_NAMES[i] for i in rng.permutation(len(_NAMES))[:3])
    things = _THINGS[rng.integers(len(_THINGS))]
    containers = _CONTAINERS[rng.integers(len(_CONTAINERS))]
    said = words.format(
        name=name, friend=friend, third=third, things=things, thing=things.removesuffix("s"),
        containers=containers, a=a, b=b, c=c, d=d,
    )  # fmt: skip
    return WordProblem(f"Question: {said}\nAnswer:", solve(a, b, c, d))
