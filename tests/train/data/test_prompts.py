"""Prompts for a published model: what is hidden, what is asked, and what is scored."""

import itertools
import re

import numpy as np
import pytest
from tokenizers import Tokenizer

from routing_jax.train.data import PROMPT_TASKS, PromptConfig, batches
from routing_jax.train.data.prompts import prompt_batch

from ..published_folder import write_model, write_text


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    return PromptConfig(
        length=512,
        answer=16,
        source=str(write_text(folder)),
        validation_fraction=0.2,
        mixture=PROMPT_TASKS,
        tokenizer=str(write_model(folder / "model")),
        vocab_size=256,
    )


def make(config, split="train", seed=0, step=0, size=10):
    return prompt_batch(config, split=split, seed=seed, step=step, batch_size=size)


def texts(config, batch):
    """The prompts and the answers as text."""
    decode = Tokenizer.from_file(f"{config.tokenizer}/tokenizer.json").decode
    rows = range(len(batch.tokens))
    prompts = [decode(batch.tokens[i, : batch.lengths[i]].tolist()) for i in rows]
    answers = [decode(batch.targets[i][batch.weights[i] > 0].tolist()) for i in rows]
    return [PROMPT_TASKS[task] for task in batch.tasks], prompts, answers


def test_each_answer_is_what_its_prompt_says(config):
    tasks, prompts, answers = texts(config, make(config))
    assert tasks == [*PROMPT_TASKS] * 2
    for task, prompt, answer in zip(tasks, prompts, answers):
        if task == "passkey":
            assert prompt.endswith("The pass key is ")
            assert re.findall(r"key is (\d+)\.", prompt) == [answer]
        elif task == "multikey":
            key = re.search(r"What is the number of the (\w+)\?", prompt).group(1)
            said = dict(re.findall(r"The number of the (\w+) is (\d+)\.", prompt))
            assert len(said) == config.keys
            assert said[key] == answer
        elif task == "variables":
            said = dict(re.findall(r"\n(\w+) = (\w+)\n", prompt))
            name = re.search(r"What number is (\w+)\?", prompt).group(1)
            assert said[said[name]] == answer
            assert prompt.index(f"{said[name]} = ") < prompt.index(f"{name} = ")
        elif task == "maths":
            problems = prompt.split("Question: ")[1:]
            assert len(problems) > 2
            assert problems[-1].endswith("?\nAnswer: ")
            assert all(re.search(r"\?\nAnswer: \d+\n\n$", solved) for solved in problems[:-1])
            assert len({solved.split("Answer")[0] for solved in problems}) == len(problems)
            assert answer.isdigit()
        else:
            assert len(answer) == config.answer
        assert ("line" in prompt) == (task != "maths")


def test_maths_alone_reads_no_text_and_fills_its_prompts(config):
    maths = PromptConfig(**(vars(config) | {"mixture": ("maths",), "source": "nowhere"}))
    batch = make(maths, size=6)
    answers = (batch.weights > 0).sum(axis=1)
    assert (batch.lengths + config.answer <= config.length).all()
    # What is left is less than one more problem.
    assert (batch.lengths + config.answer > config.length - 260).all()
    assert 1 <= answers.min() <= answers.max() <= 4
    other = make(maths, split="validation", size=6)
    assert not set(texts(maths, batch)[1]) & set(texts(maths, other)[1])


def test_a_text_that_is_measured_alone_is_held_out_whole(config, tmp_path):
    lines = [f"ligne {i} : « à l’été, {i * i % 97} œufs »\n" for i in range(900)]
    path = tmp_path / "texte.txt"  # so short that it would not be split at all
    path.write_text("".join(lines), encoding="utf-8")
    french = {"source": str(path), "validation_fraction": 1.0, "mixture": ("text",)}
    whole = PromptConfig(**(vars(config) | french))
    batch = make(whole, "validation", size=40)
    decode = Tokenizer.from_file(f"{config.tokenizer}/tokenizer.json").decode
    for row in batch.tokens.tolist():
        # Bytes are tokens here, so a row may begin or end within a letter.
        assert decode(row).strip("\N{REPLACEMENT CHARACTER}") in path.read_text(encoding="utf-8")
    assert len(np.unique(batch.tokens, axis=0)) > 35
    with pytest.raises(ValueError, match="has 0 tokens in its train split, too few"):
        make(whole, "train")


def test_what_is_scored_stands_after_the_prompt(config):
    batch = make(config)
    rows = np.arange(10)[:, None]
    # A place predicts the token behind it; the first one is the prompt's last.
    assert (batch.places[:, 0] == batch.lengths - 1).all()
    behind = batch.tokens[rows, np.minimum(batch.places + 1, config.length - 1)]
    read = batch.weights > 0
    assert (behind[read] == batch.targets[read]).all()
    np.testing.assert_allclose(batch.weights.sum(axis=1), 1, rtol=1e-6)
    for row, length, answer in zip(batch.tokens, batch.lengths, read.sum(axis=1)):
        assert not row[length + answer :].any()
    index = np.arange(config.length)
    ends = batch.lengths + read.sum(axis=1)
    np.testing.assert_array_equal(
        batch.positions, np.where(index < ends[:, None], index, -1), strict=False
    )


def test_batches_follow_from_seed_and_step_alone(config):
    for a, b in zip(make(config, step=3), make(config, step=3)):
        np.testing.assert_array_equal(a, b)
    ways = itertools.product(("train", "validation"), range(2), range(2))
    shown = {make(config, *way).tokens.tobytes() for way in ways}
    assert len(shown) == 8
    part = {"start_step": 2, "process_index": 1, "process_count": 2}
    stream = batches(config, split="train", seed=0, batch_size=4, **part)
    np.testing.assert_array_equal(next(stream).tokens, make(config, step=2, size=4).tokens[2:])


def test_no_text_is_in_both_splits(config):
    lines = {
        split: set(re.findall(r"line (\d+) says", "".join(texts(config, make(config, split))[1])))
        for split in ("train", "validation")
    }
    assert all(len(found) > 50 for found in lines.values())
    assert not lines["train"] & lines["validation"]


def test_lengths_are_drawn_down_to_the_shortest(config):
    drawn = PromptConfig(**(vars(config) | {"shortest": 320, "mixture": ("text",)}))
    ends = make(drawn, size=40).lengths + config.answer
    assert 320 <= ends.min() < 350
    assert 480 < ends.max() <= 512
    assert (make(config).lengths + config.answer).max() == 512


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mixture": ("passkeys",)}, r"mixture=\('passkeys',\) must name tasks out of passkey, "),
        ({"validation_fraction": 1.5}, "validation_fraction=1.5 must lie above 0, up to 1."),
        ({"mixture": ("maths",), "length": 150}, "answer=16 are too short for maths, whose words"),
        ({"keys": 99}, "keys=99 must lie from 1 to 24."),
        ({"shortest": 600}, "shortest=600 must lie from 0 to length=512."),
        ({"tokenizer": ""}, "tokenizer='' must be a model's folder or GGUF file."),
        ({"length": 200}, "length=200 and answer=16 are too short for multikey, whose words take"),
        ({"length": 1 << 20}, "tokens in its train split, too few for length=1048576: give more"),
    ],
)
def test_what_will_not_do_is_refused(config, changes, said):
    with pytest.raises(ValueError, match=said):
        make(PromptConfig(**(vars(config) | changes)))
