import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.kernels.online_softmax import (
    add_piece,
    empty_softmax,
    finish_softmax,
    merge_splits,
)


@pytest.mark.parametrize("pieces", [1, 3])
def test_pieces_make_the_whole_softmax(pieces):
    rng = np.random.default_rng(pieces)
    logits = 30 * rng.normal(size=(2, 3, 5, 12)).astype(np.float32)
    logits[rng.random(logits.shape) < 0.3] = -np.inf
    logits[0, 0, 0] = -np.inf  # nothing seen at all
    logits[1, 0, 0, :8] = -np.inf  # nothing seen until the last piece
    values = rng.normal(size=(2, 12, 4)).astype(np.float32)
    state = empty_softmax((2, 3, 5), 4)
    for part in np.split(np.arange(12), pieces):
        state = add_piece(state, jnp.asarray(logits[..., part]), jnp.asarray(values[:, part]))
    out, lse = finish_softmax(state)
    some = (logits > -np.inf).any(-1)
    expected = jnp.einsum("rgqp,rph->rgqh", jax.nn.softmax(logits, where=logits > -np.inf), values)
    np.testing.assert_allclose(out[some], expected[some], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        lse[some], jax.nn.logsumexp(jnp.asarray(logits)[some], axis=-1), rtol=1e-6
    )
    assert not some[0, 0, 0]
    assert (np.asarray(out)[~some] == 0).all()
    assert (np.asarray(lse)[~some] == -np.inf).all()


def test_half_precision_values_accumulate_in_float32():
    state = empty_softmax((1, 1, 1), 2)
    ones = jnp.ones((1, 256, 2), jnp.bfloat16)
    for _ in range(4):
        state = add_piece(state, jnp.zeros((1, 1, 1, 256)), ones)
    assert state.values.dtype == jnp.float32
    assert float(state.values[0, 0, 0, 0]) == 1024.0


def test_merged_splits_equal_the_softmax_over_all_keys():
    rng = np.random.default_rng(0)
    B, K, S, R, H, keys = 2, 2, 4, 3, 8, 5
    logits = rng.normal(size=(B, K, S, R, keys)) * 4
    logits[0, :, 1] = -np.inf  # a split without keys
    logits[1, 1, :, 2] = -np.inf  # and a row without any
    values = rng.normal(size=(B, K, S, keys, H))
    weights = np.exp(logits)
    sums = weights.sum(-1)
    outs = np.einsum("bksrp,bksph->bksrh", weights, values) / np.where(sums, sums, 1)[..., None]
    with np.errstate(divide="ignore"):
        lses, expected_lse = np.log(sums), np.log(sums.sum(2))
    expected = np.einsum("bksrp,bksph->bkrh", weights, values)
    expected /= np.where(sums.sum(2), sums.sum(2), 1)[..., None]
    out, lse = merge_splits(jnp.asarray(outs, jnp.float32), jnp.asarray(lses, jnp.float32), axis=2)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=1e-6)
    assert (np.asarray(out[1, 1, 2]) == 0).all()
