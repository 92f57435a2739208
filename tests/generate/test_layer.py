"""A layer's parts: what its router reads of a prompt decides as all queries would; projections."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.attention.projections import AttentionWeights, project_queries
from routing_jax.generate.layer import layer_params, normalise, project, route_prompts
from routing_jax.routers import LayerRouter, LayerRouterConfig, standardised

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


def test_prompts_that_differ_little_are_told_apart_in_sixteen_bits():
    config = MODEL.replace(dtype="bfloat16", width=64, layer_router=LayerRouterConfig(pool=16))
    params, rng = layer_params(make_params(config), 0), np.random.default_rng(0)
    shared, own = rng.normal(size=(1, 1, 64)), 0.01 * rng.normal(size=(64, 1, 64))
    x = jnp.asarray(shared + own + rng.normal(size=(64, 32, 64)) / 32, jnp.bfloat16)
    h = np.float64(normalise(config, params, "mixer_norm", x))
    query = np.float64(jnp.bfloat16(params["mixer"]["query"]))
    pooled = np.einsum("BTD,DNH->BH", h, query) / (32 * config.num_heads)
    scale, shift = map(np.asarray, standardised(jnp.float32(pooled)))
    # A router whose logit is nearly its first input: SiLU of a large number is that number.
    H, large = config.head_dim, 100.0
    router: dict = {"scale": scale, "shift": shift, "bias": np.float32([large, 0])}
    for i, (a, b) in enumerate(itertools.pairwise([H, 8 * H, 2 * H, 4 * H, H])):
        added = large if i == 0 else 0.0
        router[f"hidden_{i}"] = {
            "kernel": np.eye(a, b, dtype=np.float32), "bias": np.full(b, added, np.float32)
        }  # fmt: skip
    router["scores"] = np.outer(np.eye(H)[0], [0, 1]).astype(np.float32)
    params = params | {"mixer": params["mixer"] | {"router": router}}
    found = route_prompts(config, params, x, jnp.full(64, 32))
    logits = (pooled * scale[None] + shift[None])[:, 0]
    clear = np.abs(logits) > 0.05
    assert clear.sum() > 50
    np.testing.assert_array_equal(np.asarray(found)[clear], logits[clear] > 0)


@pytest.mark.parametrize("config", [MODEL, MODEL.replace(qkv_bias=True, qk_norm=True)])
def test_one_token_is_projected_as_it_is_beside_others(config):
    params = layer_params(make_params(config), 0)
    x = np.random.default_rng(0).normal(size=(3, 1, config.width)).astype(np.float32)
    positions = jnp.array([[5], [0], [9]])
    together = project(config, params, x, positions)
    for i in range(3):
        alone = project(config, params, x[i : i + 1], positions[i : i + 1])
        for one, each in zip(alone, together):
            assert one.shape == (1, *each.shape[1:])
            np.testing.assert_allclose(one[0], each[i], rtol=1e-5, atol=1e-6)
