"""Generating: the cache and the skipping change nothing, and a key decides every draw."""

import functools

import jax
import numpy as np
import pytest

from routing_jax.generate import generate, prefill
from routing_jax.models import Decoder

from ..small_model import MIXED, make_params

SIMPLE = MIXED.replace(layers="conv", mlp_width=0)
STEPS = 6
LENGTHS = np.array([7, 1, 4])


def prompts(pad):
    tokens = np.full((len(LENGTHS), max(LENGTHS)), pad, np.int32)
    rng = np.random.default_rng(1)
    for row, length in zip(tokens, LENGTHS):
        row[:length] = rng.integers(0, MIXED.vocab_size, length)
    return tokens


@functools.cache
def greedy():
    return jax.jit(lambda params, t, n: generate(MIXED, params, t, n, STEPS))


def test_every_token_is_the_one_a_whole_new_reading_would_choose():
    tokens = prompts(pad=0)
    made = np.asarray(greedy()(make_params(), tokens, LENGTHS))
    whole = np.zeros((len(LENGTHS), max(LENGTHS) + STEPS), np.int32)
    for row, prompt, length, rest in zip(whole, tokens, LENGTHS, made):
        row[: length + STEPS] = [*prompt[:length], *rest]
    # No cache, no padding in front, no skipping: every branch computed for every token.
    out = jax.jit(lambda p, t: Decoder(MIXED).apply({"params": p}, t, mode="masked"))(
        make_params(), whole
    )
    routed = np.asarray(out.reports.choice)[1]
    assert routed.any()
    assert not routed.all()
    best = np.argmax(out.logits, axis=-1)
    for row, length, rest in zip(best, LENGTHS, made):
        assert row[length - 1 : length - 1 + STEPS].tolist() == rest.tolist()
    assert len(np.unique(made)) > 3


def test_what_pads_a_prompt_is_not_read():
    made = [greedy()(make_params(), prompts(pad), LENGTHS) for pad in (0, 23)]
    np.testing.assert_array_equal(*made)


def test_a_key_decides_what_is_drawn_and_draws_follow_the_probabilities():
    rows, temperature = 2048, 2.0
    config, params = SIMPLE, make_params(SIMPLE)
    tokens = np.tile(prompts(0)[:1], (rows, 1))
    lengths = np.full(rows, LENGTHS[0])
    draw = jax.jit(
        lambda rng: generate(config, params, tokens, lengths, 2, temperature=temperature, rng=rng)
    )
    first, again, other = (np.asarray(draw(jax.random.key(k))) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.3
    logits = Decoder(config).apply({"params": params}, tokens[:1], mode="masked").logits
    expected = jax.nn.softmax(logits[0, -1] / temperature)
    seen = np.bincount(first[:, 0], minlength=config.vocab_size) / rows
    deviations = np.sqrt(expected * (1 - expected) / rows)
    assert (np.abs(seen - expected) < 5 * deviations + 1e-3).all()


@pytest.mark.parametrize(("temperature", "rng"), [(-1.0, jax.random.key), (0.5, lambda _: None)])
def test_a_temperature_that_cannot_be_sampled_is_refused(temperature, rng):
    with pytest.raises(ValueError, match=rf"temperature is {temperature}; it must be at least 0"):
        generate(MIXED, {}, prompts(0), LENGTHS, 1, temperature=temperature, rng=rng(0))


@pytest.mark.parametrize("wrong", [0, 8])
def test_a_length_that_the_prompts_do_not_have_is_refused_before_anything_runs(wrong):
    with pytest.raises(
        ValueError, match=rf"^lengths must be from 1 to 7, .*; row \(1,\) is {wrong}\.$"
    ):
        generate(MIXED, {}, prompts(0), np.array([7, wrong, 4]), STEPS)


def test_a_prompt_longer_than_its_cache_is_refused():
    said = r"positions must be below 6, .*; row \(0,\) reaches 6\."
    with pytest.raises(ValueError, match=said):
        prefill(MIXED, make_params(), prompts(0), LENGTHS, 6)
