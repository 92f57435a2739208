"""Rotary embedding: scores know the distance of two tokens and not their places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.kernels import apply_rope, llama3_factors

B, T, N, H = 2, 7, 2, 8
rope = jax.jit(apply_rope, static_argnums=(2, 3))


@pytest.fixture
def q_and_k():
    return jax.random.normal(jax.random.key(0), (2, B, T, N, H))


@pytest.mark.parametrize("theta", [100.0, 10_000.0])
def test_scores_depend_on_the_distance_alone(q_and_k, theta):
    q, k = q_and_k
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))

    def scores(shift):
        turned_q, turned_k = (rope(x, positions + shift, theta) for x in (q, k))
        return np.einsum("BTNH,BSNH->BNTS", turned_q, turned_k)

    near = scores(0)
    for shift in (1, 13, 500):
        np.testing.assert_allclose(scores(shift), near, rtol=1e-3, atol=1e-3)
    unturned = np.einsum("BTNH,BSNH->BNTS", q, k)
    diagonal = np.arange(T)
    np.testing.assert_allclose(
        near[:, :, diagonal, diagonal], unturned[:, :, diagonal, diagonal], rtol=1e-4, atol=1e-5
    )
    assert np.abs(near - unturned).max() > 0.1


def test_each_pair_turns_by_its_own_frequency(q_and_k):
    x, theta = q_and_k[0], 50.0
    positions = np.array([[0, 1, 2, 3, 5, 8, 13], [9, 4, 0, 2, 2, 7, 1]], np.int32)
    turned = np.asarray(rope(x, positions, theta), np.float64)
    half = H // 2
    pair = np.asarray(x)[..., :half] + 1j * np.asarray(x)[..., half:]
    angle = positions[:, :, None, None] * theta ** (-2 * np.arange(half) / H)
    want = pair * np.exp(1j * angle)
    np.testing.assert_allclose(
        turned[..., :half] + 1j * turned[..., half:], want, rtol=1e-4, atol=1e-5
    )


def test_an_odd_head_dim_is_refused():
    with pytest.raises(ValueError, match="RoPE needs an even head dim; it is 7"):
        apply_rope(jnp.zeros((1, 1, 1, 7)), jnp.zeros((1, 1), jnp.int32))


def test_factors_slow_each_pair_as_if_positions_were_nearer(q_and_k):
    x, factors = q_and_k[0], (1.0, 2.0, 5.0, 40.0)
    positions = np.tile(40 * np.arange(T, dtype=np.int32), (B, 1))
    slowed = np.asarray(rope(x, positions, 50.0, factors))
    for i, factor in enumerate(factors):
        nearer = np.asarray(rope(x, positions // int(factor), 50.0))
        pair = [i, i + H // 2]
        np.testing.assert_allclose(slowed[..., pair], nearer[..., pair], rtol=1e-4, atol=1e-4)


def test_llama3_slows_only_what_turned_seldom_within_the_old_context():
    H, theta, factor, low, high, length = 128, 500_000.0, 8.0, 1.0, 4.0, 8192
    factors = np.array(llama3_factors(H, theta, factor, low, high, length))
    wavelength = 2 * np.pi * theta ** (2 * np.arange(H // 2) / H)
    assert (factors[wavelength < length / high] == 1).all()
    np.testing.assert_allclose(factors[wavelength > length / low], factor)
    between = factors[(wavelength > length / high) & (wavelength < length / low)]
    assert between.size > 2
    assert (np.diff(np.concatenate([[1], between, [factor]])) > 0).all()
