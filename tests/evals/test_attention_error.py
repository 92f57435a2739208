"""Output errors are those of the layer itself, 0 for a whole budget, and fall with the budget."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.attention import BlockRouted, FullAttention
from routing_jax.evals.attention_error import attention_errors
from routing_jax.evals.mixing_time import mixer_inputs
from routing_jax.models import DecoderConfig
from routing_jax.routers import BlockRouterConfig

from ..small_model import make_params

pytestmark = pytest.mark.usefixtures("compile_cache")

BLOCKS = BlockRouterConfig(kind="indexer", block_q=4, block_kv=4, fraction=1.0, width=4)
CONFIG = DecoderConfig(
    width=8, layers="(conv,block)*2", head_dim=4, mlp_width=0, blocks=BLOCKS, dtype="float32"
)


@pytest.mark.slow
def test_errors_are_those_of_each_layer_on_what_dense_attention_leads_to():
    params = make_params(CONFIG)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 48))
    routers = {
        "whole": BLOCKS,
        "indexer-50": dataclasses.replace(BLOCKS, fraction=0.5),
        "indexer-25": dataclasses.replace(BLOCKS, fraction=0.25),
        "pooled-25": dataclasses.replace(BLOCKS, kind="pooled", fraction=0.25),
        "random-25": dataclasses.replace(BLOCKS, kind="random", fraction=0.25),
        "window-25": dataclasses.replace(BLOCKS, kind="window", fraction=0.25),
    }
    rows = attention_errors(CONFIG, params, tokens, routers, [48])
    assert [(row["length"], row["router"]) for row in rows] == [(48, name) for name in routers]
    of = {row["router"]: row for row in rows}
    assert of["whole"]["error"] == pytest.approx(0, abs=1e-6)
    assert of["indexer-25"]["error"] > of["indexer-50"]["error"] > 1e-3
    assert of["indexer-50"]["cost"] > of["indexer-25"]["cost"]
    assert len({row["error"] for row in of.values()}) == len(of)

    want = []
    router = routers["indexer-25"]
    for kind, own, x in mixer_inputs(CONFIG, params, tokens):
        if kind == "block":
            at = jnp.arange(48)[None].repeat(2, axis=0)
            run = jax.jit(BlockRouted(CONFIG.heads, router).apply)
            got = np.asarray(run({"params": own}, x, at)[0])
            weights = {name: leaf for name, leaf in own.items() if name != "router"}
            dense = np.asarray(FullAttention(CONFIG.heads).apply({"params": weights}, x, at)[0])
            want.append(np.linalg.norm(got - dense) / np.linalg.norm(dense))
    assert of["indexer-25"]["error"] == pytest.approx(np.mean(want), rel=1e-4)
