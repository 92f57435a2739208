"""Mixed schemes on a mesh: devices that hold other rows and other heads give the same numbers."""

from ..processes import finish, start_python

ON_FOUR = """
import jax, jax.numpy as jnp, numpy as np
from routing_jax.attention import HeadsConfig, LayerCache, MixtureOfSchemes, mixture_of_schemes
from routing_jax.routers import SchemesConfig
from routing_jax.sharding import make_mesh, put_batch, tree_shardings

mixture_of_schemes._SKIPS_FROM = 0  # for so few tokens it would compute all schemes
rng = np.random.default_rng(0)
x = rng.normal(size=(4, 16, 8)).astype(np.float32)
x[:2] += 2  # rows of one device lean elsewhere than those of the other
positions = np.tile(np.arange(16, dtype=np.int32), (4, 1))
mesh = make_mesh(2, 1, 2)
for nested in (False, True):
    schemes = SchemesConfig(names="mha,mqa", kind="hard", nested=nested, hidden=4)
    mixer = MixtureOfSchemes(HeadsConfig(4, 4, 4), schemes)
    shapes = jax.eval_shape(mixer.init, jax.random.key(0), x, positions)["params"]
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)
    def run(params, x, positions):
        y, _, report = mixer.apply({"params": params}, x, positions, mode="eval")
        empty = jnp.zeros((4, 16, 4 if nested else 5, 4))
        _, cache, _ = mixer.apply(
            {"params": params}, x, positions, cache=LayerCache(empty, empty), mode="prefill")
        last = x[:, -1:], positions[:, -1:]  # read again, in its own place
        again, _, _ = mixer.apply({"params": params}, *last, cache=cache, mode="decode")
        return y, again, report.kv_cost
    want, again, cost = jax.jit(run)(params, x, positions)
    np.testing.assert_allclose(again[:, 0], want[:, -1], rtol=1e-3, atol=1e-4)
    with jax.set_mesh(mesh):
        named = {"mixer": params}
        split = jax.device_put(named, tree_shardings(named, mesh))["mixer"]
        assert not split["query"].sharding.is_fully_replicated
        got, token, same = jax.jit(run)(split, *put_batch((x, positions), mesh))
    np.testing.assert_allclose(token, again, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(same, cost, rtol=1e-5)
    assert 0.3 < float(cost) < 0.95
print("same")
"""


def test_one_scheme_a_token_on_four_devices_equals_one():
    ((out, _),) = finish(start_python(ON_FOUR, devices=4))
    assert out == "same\n"
