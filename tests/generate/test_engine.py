"""The engine: what it makes is what reading everything anew makes, whoever shares the batch."""

import functools

import jax
import numpy as np
import pytest

from routing_jax.attention.page_pool import NO_PAGE, SinkWindow
from routing_jax.generate import (
    DENSE,
    ROUTED,
    SPARSE,
    Engine,
    Request,
    Routers,
    ServingConfig,
    generate,
)
from routing_jax.generate.decode import decode_tokens
from routing_jax.generate.prefill import prefill_layer
from routing_jax.routers import LayerRouter, LayerRouterConfig

from ..small_model import MIXED, make_params
from .plain_decoder import greedy

MODEL = MIXED.replace(
    layers="full*3", width=16, num_heads=4, num_kv_heads=2, qk_norm=True, rope_theta=50.0
)
LAYERS = 3
SERVING = ServingConfig(
    pages=64, sequences=3, length=40, page_size=4, sparse=SinkWindow(1, 1), chunk=16
)
PATTERNS = ([DENSE] * 3, [SPARSE] * 3, [DENSE, SPARSE, SPARSE], [SPARSE, DENSE, SPARSE])


@functools.cache
def routers(seed=5):
    config = LayerRouterConfig(pool=3)
    shapes = jax.eval_shape(
        lambda: LayerRouter(config).init(
            jax.random.key(0), np.zeros((1, 8, 4, MODEL.head_dim)), np.array([8])
        )
    )["params"]
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if path[-1].key == "bias":
            return np.zeros(leaf.shape, np.float32)
        return np.float32(rng.normal(size=leaf.shape) * 2 / leaf.shape[0] ** 0.5)

    return Routers(config, [jax.tree_util.tree_map_with_path(fill, shapes) for _ in range(LAYERS)])


def prompt(length, seed=0):
    return np.random.default_rng([seed, length]).integers(0, MODEL.vocab_size, length).tolist()


def serve(requests, serving=SERVING, **who):
    """What each request got, and the engine."""
    engine = Engine(MODEL, make_params(MODEL), serving, **who)
    numbers = [engine.add(request) for request in requests]
    made = {number: [] for number in numbers}
    for one in engine.run():
        assert one.last == (len(made[one.request]) + 1 == requests[one.request].max_new_tokens)
        made[one.request].append(one.token)
    return list(made.values()), engine


def plain(request, decisions, routers=None):
    """The same from the decoder in NumPy."""
    return greedy(
        MODEL,
        make_params(MODEL),
        request.tokens,
        request.max_new_tokens,
        [None if d == ROUTED else d == DENSE for d in decisions],
        SERVING,
        routers,
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_tokens_are_those_of_a_decoder_with_the_same_masks(pattern):
    requests = [Request(prompt(n), max_new_tokens=m) for n, m in [(23, 14), (4, 20), (9, 1)]]
    made, _ = serve(requests, decisions=pattern)
    assert made == [plain(request, pattern)[0] for request in requests]


def test_prompts_decide_each_for_itself_and_decoding_obeys():
    requests = [Request(prompt(n, seed), 6) for seed in range(3) for n in (30, 17, 9, 2)]
    expected = [plain(request, [ROUTED] * LAYERS, routers()) for request in requests]
    decided = np.array([decisions for _, decisions in expected])
    assert (decided.any(0) & ~decided.all(0)).any()  # some layer is dense for some prompts only
    made, _ = serve(requests, routers=routers())
    assert made == [tokens for tokens, _ in expected]


def test_all_dense_is_the_ordinary_generation():
    tokens, lengths = np.array([prompt(7), prompt(7, 1)], np.int32), np.array([7, 5])
    ordinary = jax.jit(lambda p: generate(MODEL, p, tokens, lengths, 5))(make_params(MODEL))
    made, _ = serve([Request(t[:n].tolist(), 5) for t, n in zip(tokens, lengths)])
    assert made == ordinary.tolist()
