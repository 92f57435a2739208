"""The least time of a row: what its layers were counted to do, at the rates of the device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.evals.benchmarks.serve_path_cases import Size, decisions, filled_memory
from routing_jax.evals.benchmarks.serve_path_config import ServePathConfig
from routing_jax.evals.benchmarks.serve_path_floors import Rates, least_milliseconds
from routing_jax.generate import DENSE
from routing_jax.kernels import row_lengths
from routing_jax.models import init_params
from routing_jax.routers import layer_table

CONFIG = ServePathConfig(
    model="tiny",
    sink=8,
    window=16,
    block=8,
    blocks=2,
    channels=4,
    lengths=(256,),
    steps=2,
    repeats=2,
)
SIZE = Size(3, 256, 0.5)
WHO = ("routed", "composed", "kernels", "dense")
NEVER = float("inf")


@pytest.mark.parametrize("mode", ["streaming", "triangle", "topk"])
@pytest.mark.parametrize("who", WHO)
def test_attention_of_a_prompt_is_what_its_rows_list(who, mode):
    config = dataclasses.replace(CONFIG, mode=mode)
    sparse = config.model_of(who).sparse
    starts, lengths = jnp.arange(0, 256, 8)[None], jnp.array([256])
    scores = jnp.zeros((1, 1, 32, 32)) if sparse.searches else None
    keys = 0
    for decision in decisions(config, SIZE):
        dense = jnp.array([decision == DENSE or who in ("kernels", "dense")])
        table = layer_table(sparse, dense, starts, lengths, scores)
        # All blocks that a query lists are its past, but for its own: a half and half a key.
        keys += int(row_lengths(table, 256, 256).sum()) * 8 * 8 - 32 * 8 * 7 // 2
    N, H = 4, 8
    got = least_milliseconds(config, "prefill", SIZE, who, Rates(1e3, NEVER, NEVER))
    assert got == 3 * 4 * N * H * keys


@pytest.mark.parametrize("who", WHO)
def test_products_and_weights_are_those_of_the_model(who):
    shapes = jax.eval_shape(lambda: init_params(CONFIG.model_of("dense"), jax.random.key(0)))
    sizes = {
        jax.tree_util.keystr(path): np.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
        if leaf.ndim > 1 and "embedding" not in jax.tree_util.keystr(path)
    }
    layers = sum(size for name, size in sizes.items() if "layers" in name)
    head = sizes["['head']"]
    flops = least_milliseconds(CONFIG, "prefill", SIZE, who, Rates(NEVER, 1e3, NEVER))
    assert flops == 2 * 3 * (256 * layers + head)
    held = least_milliseconds(CONFIG, "decode", SIZE._replace(batch=0), who, Rates(memory=1e3))
    assert held == 4 * (layers + head)


def test_a_token_reads_what_its_sequences_hold_or_find():
    def past(who, config=CONFIG):
        both = [
            least_milliseconds(config, "decode", SIZE._replace(batch=batch), who, Rates(memory=1e3))
            for batch in (1, 0)
        ]
        return both[0] - both[1]

    page, narrow = 2 * 8 * 2 * 8 * 4, 8 * 2 * 4 * 4
    assert past("dense") == past("kernels") == 4 * 32 * page
    assert past("routed") == 2 * (32 + 3) * page
    # The layers that search read five pages, and what the 29 past the window are found by.
    assert past("composed") == 2 * (5 + 3) * page + 2 * 29 * narrow
    memory = filled_memory(CONFIG, SIZE, "composed")
    assert narrow == memory.narrow[0].nbytes
    assert page == memory.keys[0].nbytes + memory.values[0].nbytes
    # Without a search after the prompt, all that sparse layers keep is read.
    keeping = dataclasses.replace(CONFIG, mode="triangle")
    assert past("routed", keeping) == 4 * 32 * page
