"""Word problems: each answer, as it follows from the words alone."""

import re

import numpy as np

from routing_jax.train.data.word_problems import word_problem

# By words that only one kind of problem has: what its numbers, in the order in which they are said,
# come to.
SOLVED = {
    r"buys \d+ \w+ of": lambda a, b, c: a * b - c,
    "times as many": lambda a, b, c: a * b + c,
    "do they have together": lambda a, b: a + (a + b),
    r"fills": lambda a, b, c, d: a * b + c * d,
    "notebook": lambda thing, notebook, things, notebooks: thing * things + notebook * notebooks,
    "pages": lambda a, b, c, d: a * b + c * d,
    "an hour": lambda pay, hours, days, spent: pay * hours * days - spent,
    "passengers": lambda a, b, c: a + b + c,
    "finds": lambda had, found, each, given: had + found * each - given,
    "trees": lambda rows, each, died, new: rows * each - died + new,
    "years old": lambda a, b, c: a + b + c,
    "rolls": lambda trays, each, later, left: trays * each + later - left,
}


def drawn(count):
    rng = np.random.default_rng(0)
    return [word_problem(rng) for _ in range(count)]


def test_answers_follow_from_the_words():
    seen = set()
    for question, answer in drawn(500):
        (kind,) = [kind for kind in SOLVED if re.search(kind, question)]
        seen.add(kind)
        assert SOLVED[kind](*map(int, re.findall(r"\d+", question))) == answer > 0
    assert seen == set(SOLVED)


def test_no_answer_is_nothing_or_less():
    assert min(answer for _, answer in drawn(20_000)) > 0


def test_problems_are_complete_and_seldom_the_same():
    problems = drawn(500)
    for problem in problems:
        assert re.fullmatch(r"Question: [^{}]+\?\nAnswer:", problem.question)
    assert len({problem.question for problem in problems}) > 490
    assert len({problem.answer for problem in problems}) > 80


def test_people_are_different_ones():
    for question, _ in drawn(200):
        told = re.search(r"(\w+) has \d+ .*\. (\w+) has .* and (\w+) has", question)
        assert told is None or len(set(told.groups())) == 3
