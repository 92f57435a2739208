"""Prompts scored: as NumPy scores the model's own logits, whoever decides."""

from typing import NamedTuple

import jax
import numpy as np
import pytest

from routing_jax.attention import Prompts
from routing_jax.evals.prompt_quality import (
    fixed_layers,
    prompt_scorer,
    random_layers,
    ranked_layers,
    sensitivities,
)
from routing_jax.models import Decoder, DecoderConfig
from routing_jax.routers import SparseModeConfig

from ..small_model import make_params

pytestmark = pytest.mark.usefixtures("compile_cache")

CONFIG = DecoderConfig(
    vocab_size=16, width=8, layers="layer*3", num_heads=2, head_dim=4, mlp_width=0,
    dtype="float32", sparse=SparseModeConfig(sink=8, window=8, block_q=8, block_kv=8),
)  # fmt: skip
A = 3


class Rows(NamedTuple):
    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    lengths: np.ndarray
    tasks: np.ndarray
    places: np.ndarray
    positions: np.ndarray


def some_rows(seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 16, (2, 40), dtype=np.int32)
    lengths = rng.integers(30, 36, 2).astype(np.int32)
    places = lengths[:, None] - 1 + np.arange(A)
    targets = tokens[np.arange(2)[:, None], places + 1]
    weights = np.array([[1 / 3] * 3, [0.5, 0.5, 0]], np.float32)
    index = np.arange(40, dtype=np.int32)
    positions = np.where(index < lengths[:, None] + A, index, -1)
    tasks = np.array([0, seed])
    return Rows(tokens, targets * (weights > 0), weights, lengths, tasks, places, positions)


BATCHES = [some_rows(0), some_rows(1)]
PARAMS = make_params(CONFIG)


@pytest.mark.parametrize("choose", [None, random_layers(3, 1, seed=0)])
def test_scores_are_those_of_the_logits(choose):
    scores = prompt_scorer(CONFIG)(PARAMS, BATCHES, choose)
    assert scores.tasks.tolist() == [0, 0, 0, 1]
    apply = jax.jit(Decoder(CONFIG).apply)
    for i, rows in enumerate(BATCHES):
        choice = None if choose is None else choose(2 * i, 2)
        prompts = Prompts(rows.lengths, 1.0, choice)
        out = jax.device_get(apply({"params": PARAMS}, rows.tokens, prompts=prompts))
        assert (scores.dense[:, 2 * i : 2 * i + 2] == out.reports.choice[:, :, 0]).all()
        for b, count in enumerate((3, 2)):
            logits = out.logits[b, rows.places[b, :count]].astype(np.float64)
            targets = rows.targets[b, :count]
            nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(count), targets]
            assert scores.nll[2 * i + b] == pytest.approx(nll.mean(), rel=1e-4)
            right = (logits.argmax(-1) == targets).mean()
            assert scores.right[2 * i + b] == pytest.approx(right, rel=1e-6)
    if choose is not None:
        np.testing.assert_allclose(scores.sparsity, 1 / 3, rtol=1e-6)


def test_a_layer_costs_what_the_text_loses_without_its_full_attention():
    score = prompt_scorer(CONFIG)
    costs = sensitivities(score, PARAMS, BATCHES, 3)
    dense = score(PARAMS, BATCHES, fixed_layers(np.ones(3, bool))).nll.mean()
    for layer in range(3):
        alone = fixed_layers(ranked_layers(np.eye(3)[layer] * -1.0, 1))
        assert costs[layer] == pytest.approx(score(PARAMS, BATCHES, alone).nll.mean() - dense)
    assert np.abs(costs).max() > 1e-4


def test_controls_choose_as_many_layers_as_they_say():
    costs = np.array([0.5, -0.1, 0.2, 0.0])
    assert ranked_layers(costs, 0).all()
    assert ranked_layers(costs, 2).tolist() == [True, False, True, False]
    assert not ranked_layers(costs, 4).any()
    assert fixed_layers(costs > 0.1)(7, 2).tolist() == [
        [True] * 2,
        [False] * 2,
        [True] * 2,
        [False] * 2,
    ]
    choose = random_layers(6, 4, seed=1)
    whole = choose(0, 40)
    assert (whole.sum(axis=0) == 2).all()
    assert (choose(10, 5) == whole[:, 10:15]).all()  # however the prompts are batched
    assert (whole.sum(axis=1) > 3).all()
