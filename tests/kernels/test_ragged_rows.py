import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.kernels import ragged_rows


@pytest.mark.parametrize("width", [1, 4, 7, 64])
def test_rows_come_back_in_order_and_little_is_wasted(width):
    rng = np.random.default_rng(width)
    lengths = rng.integers(0, 20, 50)
    lengths[rng.random(50) < 0.1] = 300  # a few dense rows among sparse ones
    elements = ragged_rows._STEP_ELEMENTS_CPU // width

    def step(rows, row_lengths):
        assert rows.shape == (min(width, 50),)
        steps = jnp.broadcast_to(row_lengths.max(), rows.shape)
        return rows, row_lengths, steps

    rows, same, steps = jax.jit(lambda n: ragged_rows.map_rows(step, n, elements))(
        jnp.asarray(lengths)
    )
    np.testing.assert_array_equal(rows, np.arange(50))
    np.testing.assert_array_equal(same, lengths)
    assert (np.asarray(steps) >= lengths).all()
    # Longest first: each step is bounded by the shortest row of the step before it.
    assert steps.sum() <= lengths.sum() + min(width, 50) * lengths.max()
