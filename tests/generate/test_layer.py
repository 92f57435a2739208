"""A layer's parts: what its router reads of a prompt decides as all queries would."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.attention.projections import AttentionWeights, project_queries
from routing_jax.generate.layer import layer_params, normalise, route_prompts
from routing_jax.routers import LayerRouter, LayerRouterConfig

from ..small_model import MIXED, make_params

MODEL = MIXED.replace(layers="layer", width=16, layer_router=LayerRouterConfig(pool=3))
LENGTHS = jnp.array([1, 2, 5, 6, 7, 20, 31, 32] * 4, jnp.int32)


@pytest.mark.parametrize(
    "config", [MODEL, MODEL.replace(qkv_bias=True), MODEL.replace(qk_norm=True)]
)
def test_the_ends_of_a_prompt_decide_as_all_its_queries(config):
    params = layer_params(make_params(config), 0)
    x = np.random.default_rng(0).normal(size=(len(LENGTHS), 32, config.width)).astype(np.float32)
    mixer = {name: part for name, part in params["mixer"].items() if name != "router"}
    h = normalise(config, params, "mixer_norm", x)
    queries = project_queries(h, None, AttentionWeights(**mixer), config.heads)
    module, router = LayerRouter(config.layer_router), params["mixer"]["router"]
    logits = module.apply({"params": router}, queries, LENGTHS).routing.logits
    # The sparse score's bias, so that half of the prompts are dense.
    router = router | {"bias": np.array([np.median(logits), 0], np.float32)}
    params = params | {"mixer": params["mixer"] | {"router": router}}
    found = jax.jit(route_prompts, static_argnums=0)(config, params, x, LENGTHS)
    np.testing.assert_array_equal(found, logits > np.median(logits))
