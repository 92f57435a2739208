import jax
import jax.numpy as jnp
import numpy as np

from routing_jax.kernels.batching import fold_vmap


def _weighted_sums(values, weights):
    """[B,3,2] and [B or 1,3] to ([B,2], [B]); counts on weights of B or 1."""
    weights = jnp.broadcast_to(weights, values.shape[:2])
    return jnp.einsum("BPH,BP->BH", values, weights), values.sum(axis=(1, 2))


def test_vmap_joins_the_batch_whatever_is_mapped_or_shared():
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.normal(size=(4, 5, 2, 3, 2)))  # two mapped axes before B
    shared = jnp.asarray(rng.normal(size=(1, 3)))
    own = jnp.asarray(rng.normal(size=(5, 2, 3)))

    def folded(values, weights):
        return fold_vmap(_weighted_sums, 2, values, weights)

    for weights, axis in ((shared, None), (own, 0)):
        inner_folded, inner = (jax.vmap(f, in_axes=(0, axis)) for f in (folded, _weighted_sums))
        got, expected = (
            jax.vmap(f, in_axes=(0, None))(values, weights) for f in (inner_folded, inner)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)


def test_vmap_makes_one_call():
    calls = []

    def once(x):
        calls.append(x.shape)
        return x

    jax.vmap(lambda x: fold_vmap(once, 2, x))(jnp.ones((7, 2, 3)))
    assert (14, 3) in calls
