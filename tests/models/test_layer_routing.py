"""Layer routing added to a model: two parts that make the whole, and routers that start open."""

import jax
import numpy as np
import pytest

from routing_jax.models import (
    DecoderConfig,
    init_params,
    init_routers,
    layer_gates,
    merge_routers,
    split_routers,
    with_layer_routing,
)
from routing_jax.routers import LayerRouterConfig, SparseModeConfig

PLAIN = DecoderConfig(width=8, layers="full*2", head_dim=4, mlp_width=0)
ROUTER, SPARSE = LayerRouterConfig(pool=7), SparseModeConfig(window=256)


@pytest.mark.parametrize("scan", [False, True])
def test_a_model_and_its_routers_are_two_parts_of_one(scan):
    plain = PLAIN.replace(scan=scan)
    config = with_layer_routing(plain, ROUTER, SPARSE)
    assert (config.layer_router, config.sparse) == (ROUTER, SPARSE)
    key = jax.random.key(3)
    shapes = jax.eval_shape(lambda: init_params(config, key))
    routers, frozen = split_routers(shapes)
    assert frozen == jax.eval_shape(lambda: init_params(plain, key))
    assert merge_routers(frozen, routers) == shapes
    assert jax.eval_shape(lambda: init_routers(config, key)) == routers


def test_routers_start_as_open_as_they_are_told_to(compile_cache):
    config = with_layer_routing(PLAIN.replace(scan=True), LayerRouterConfig(full=0.9), SPARSE)
    routers = init_routers(config, jax.random.key(3))
    router = routers["layers"]["block_0"]["mixer"]["router"]
    np.testing.assert_allclose(router["bias"], [[0, np.log(9)]] * 2, rtol=1e-6)
    assert not router["scores"].any()
    assert np.abs(router["hidden_0"]["kernel"][0] - router["hidden_0"]["kernel"][1]).max() > 0.1


def test_gates_are_found_in_every_layer_and_nothing_else():
    layer = {"mixer": {"gate": (np.ones((2, 3)),), "other": (np.zeros(5),)}}
    sown = {"layers": {"block_0": layer, "block_1": {"mixer": {"gate": (np.zeros((2, 3)),)}}}}
    assert layer_gates(sown).tolist() == [[1.0] * 3] * 2 + [[0.0] * 3] * 2


def test_a_model_with_other_layers_is_refused():
    said = "model.layers is 'full,conv'; layer routing needs all 'full'."
    with pytest.raises(ValueError, match=said):
        with_layer_routing(PLAIN.replace(layers="full,conv"), ROUTER, SPARSE)
