"""Choosing tokens: top-k and top-p cut what can be drawn, and draws follow what is left."""

import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.generate.sampling import Sampling, choose_tokens

LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2], np.float32))
DRAWS = 4096


def shares(temperature=1.0, top_k=0, top_p=1.0):
    """How often each token is drawn, by seeds and positions that all differ."""
    sampling = Sampling(
        jnp.full(DRAWS, temperature),
        jnp.full(DRAWS, top_k),
        jnp.full(DRAWS, top_p),
        jnp.arange(DRAWS) % 64,
    )
    drawn = choose_tokens(jnp.tile(LOGITS[None], (DRAWS, 1)), sampling, jnp.arange(DRAWS) // 64)
    return np.bincount(drawn, minlength=5) / DRAWS


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, [0.1, 0.4, 0.05, 0.25, 0.2]),
        ({"temperature": 0.5}, np.square([0.1, 0.4, 0.05, 0.25, 0.2])),
        ({"top_k": 2}, [0, 0.4, 0, 0.25, 0]),
        ({"top_p": 0.7}, [0, 0.4, 0, 0.25, 0.2]),
        ({"top_p": 0.01}, [0, 1, 0, 0, 0]),
        # Of the three that top-k leaves, the first holds 0.4 / 0.85 and the first two 0.65 / 0.85.
        ({"top_k": 3, "top_p": 0.7}, [0, 0.4, 0, 0.25, 0]),
        ({"temperature": 0.0, "top_k": 3}, [0, 1, 0, 0, 0]),
    ],
)
def test_draws_follow_the_probabilities_that_are_left(how, expected):
    expected = np.asarray(expected, float) / np.sum(expected)
    deviations = np.sqrt(expected * (1 - expected) / DRAWS)
    assert (np.abs(shares(**how) - expected) <= 5 * deviations).all()
