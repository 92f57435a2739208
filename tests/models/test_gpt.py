"""The decoder as GPT-2 has it: its options, its spread of weights, and where it refuses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.models import Decoder, count_params, init_cache, init_params
from routing_jax.routers import SchemesConfig

from ..small_model import MIXED, make_params

pytestmark = pytest.mark.usefixtures("compile_cache")
GPT = MIXED.replace(
    layers="full*2",
    norm="layer",
    mlp="gelu",
    rope_theta=0.0,
    learned_positions=16,
    tie_embeddings=True,
    init_std=0.02,
)
TOKENS = np.random.default_rng(0).integers(0, 24, (2, 16), dtype=np.int32)


def logits(config, params, tokens, **more):
    return Decoder(config).apply({"params": params}, tokens, **more).logits


def test_the_model_is_that_of_the_formula():
    """One layer of one head, in numpy."""
    config = GPT.replace(layers="full", num_heads=1, num_kv_heads=1)
    params = make_params(config)
    block = params["layers_0"]["block_0"]

    def norm(x, scale):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * scale

    x = params["embedding"][TOKENS] + params["positions"][None]
    h = norm(x, block["mixer_norm"]["scale"])
    q, k, v = (h @ block["mixer"][name][:, 0] for name in ("query", "key", "value"))
    scores = q @ k.swapaxes(1, 2) / config.head_dim**0.5
    scores = np.where(np.tri(16, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    x = x + weights @ v @ block["mixer"]["out"][0]
    h = norm(x, block["mlp_norm"]["scale"]) @ block["mlp"]["up"]
    h = h * 0.5 * (1 + np.vectorize(math.erf)(h / 2**0.5))
    x = x + h @ block["mlp"]["down"]
    want = norm(x, params["final_norm"]["scale"]) @ params["embedding"].T
    np.testing.assert_allclose(logits(config, params, TOKENS), want, rtol=1e-3, atol=1e-3)


SCHEMES = GPT.replace(
    layers="schemes*2",
    schemes=SchemesConfig(names="mha,mqa", kind="hard", nested=True, hidden=4),
)


@pytest.mark.parametrize("config", [GPT, SCHEMES], ids=["full", "schemes"])
def test_decode_sees_learned_positions_and_what_prefill_stored(config):
    params = make_params(config)
    model = Decoder(config)
    apply = jax.jit(model.apply, static_argnames="mode")
    masked = apply({"params": params}, TOKENS, mode="masked")
    want = masked.logits
    if config is SCHEMES:
        assert 0 < masked.reports.choice.mean() < 1
    cache = init_cache(config, 2, 16)
    out = apply({"params": params}, TOKENS[:, :10], cache=cache, mode="prefill")
    np.testing.assert_allclose(out.logits, want[:, :10], rtol=1e-3, atol=1e-4)
    for t in range(10, 12):
        step = TOKENS[:, t : t + 1]
        out = apply({"params": params}, step, cache=out.cache, mode="decode")
        np.testing.assert_allclose(out.logits[:, 0], want[:, t], rtol=1e-3, atol=1e-4)


def test_weights_spread_as_asked_and_stack_alike():
    config = GPT.replace(width=64, mlp_width=256, num_heads=4, num_kv_heads=4, head_dim=16)
    params = init_params(config, jax.random.key(0))
    block = params["layers_0"]["block_0"]
    for leaf, std in (
        (params["embedding"], 0.02),
        (block["mixer"]["query"], 0.02),
        (block["mlp"]["up"], 0.02),
        (block["mixer"]["out"], 0.01),  # two layers write four times
        (block["mlp"]["down"], 0.01),
    ):
        assert float(leaf.std()) == pytest.approx(std, rel=0.1)
    assert np.all(np.asarray(params["final_norm"]["scale"]) == 1)
    assert "head" not in params
    scanned = init_params(config.replace(scan=True), jax.random.key(0))
    np.testing.assert_array_equal(scanned["layers"]["block_0"]["mlp"]["up"][0], block["mlp"]["up"])


def test_the_published_attention_has_as_many_parameters_as_published():
    config = GPT.replace(
        vocab_size=283, width=384, layers="full*4", num_heads=6, num_kv_heads=6, head_dim=64,
        mlp_width=1536, learned_positions=256,
    )  # fmt: skip
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert count_params(shapes) - 256 * 384 == 7_190_016


def test_dropout_is_for_training_with_a_key_and_changes_every_part():
    config = GPT.replace(dropout=0.5)
    params, key = make_params(config), jax.random.key(0)
    plain = logits(GPT, params, TOKENS)
    np.testing.assert_array_equal(logits(config, params, TOKENS), plain)
    np.testing.assert_array_equal(logits(config, params, TOKENS, mode="train"), plain)
    np.testing.assert_array_equal(logits(config, params, TOKENS, rng=key), plain)
    one = logits(config, params, TOKENS, rng=key, mode="train")
    two = logits(config, params, TOKENS, rng=jax.random.key(1), mode="train")
    assert np.all(np.any(np.asarray(one != plain), -1))
    assert np.any(np.asarray(one != two))


def test_a_sequence_past_the_learned_positions_is_refused():
    tokens = np.zeros((1, 17), np.int32)
    said = r"must be at most model\.learned_positions = 16\."
    with pytest.raises(ValueError, match=r"^tokens are \(1, 17\); T " + said):
        jax.eval_shape(lambda: logits(GPT, make_params(GPT), jnp.asarray(tokens)))
    with pytest.raises(ValueError, match=r"^length is 17; it " + said):
        init_cache(GPT, 1, 17)
