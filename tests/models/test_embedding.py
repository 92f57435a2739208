"""Embedding: table rows forward, their exact gradient backward, however it is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.models import embedding
from routing_jax.models.embedding import embed


@pytest.fixture(params=["one-hot", "scatter"])
def way(request, monkeypatch):
    """The gradient below and above the limit on the vocabulary."""
    if request.param == "scatter":
        monkeypatch.setattr(embedding, "_ONE_HOT_ROWS", 10)


def test_gradient_is_that_of_indexing(way):
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(24, 6)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 20, (4, 50)))  # with repeats, and rows never read
    weights = jnp.asarray(rng.normal(size=(4, 50, 6)), jnp.float32)

    def loss(lookup, table):
        return jnp.sum(jnp.sin(lookup(table, tokens)) * weights)

    ours = jax.value_and_grad(lambda t: loss(embed, t))(table)
    theirs = jax.value_and_grad(lambda t: loss(lambda t, i: t[i], t))(table)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs)
    assert not ours[1][20:].any()


def test_a_row_read_often_adds_up_without_losing_bits(way):
    # In bfloat16 a sum of ones stops at 256.
    tokens = jnp.zeros((1, 4096), jnp.int32)
    table = jnp.zeros((16, 2), jnp.bfloat16)
    gradient = jax.grad(lambda t: embed(t, tokens).astype(jnp.float32).sum())(table)
    assert gradient.dtype == jnp.bfloat16
    assert gradient[0].tolist() == [4096.0, 4096.0]
