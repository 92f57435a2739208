"""Serving by the kernels for Hopper: the logits that XLA's give, prompt and tokens alike."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.generate import DENSE, SPARSE, ServingConfig
from routing_jax.generate.layer import layer_params
from routing_jax.generate.paged_decode import read_tokens
from routing_jax.generate.paged_memory import empty_memory
from routing_jax.generate.paged_prefill import prefill_layer, prefill_prompts
from routing_jax.kernels.hopper import hopper_refusal
from routing_jax.models import DecoderConfig, init_params
from routing_jax.routers import SparseModeConfig

from ..kernels.cuda_lowering import lower_for_cuda

MODEL = DecoderConfig(
    vocab_size=64, width=256, layers="full*4", num_heads=8, num_kv_heads=2, head_dim=64,
    mlp_width=512, sparse=SparseModeConfig(sink=64, window=128, block_q=64, block_kv=64),
)  # fmt: skip
SERVING = ServingConfig(pages=256, sequences=4, length=800, page_size=64, chunk=256)
# Layers of Llama-3.1-8B, and the pool that 32 of them need for 128k tokens, a quarter dense.
LLAMA = DecoderConfig(
    vocab_size=64, width=4096, layers="layer*2", num_heads=32, num_kv_heads=8, head_dim=128,
    mlp_width=14_336, rope_theta=500_000.0,
)  # fmt: skip
LONG = ServingConfig(pages=8416, sequences=1, length=131_136)
LENGTHS, STEPS = np.array([700, 130, 64], np.int32), 70  # enough for windows to turn
DECISIONS = [SPARSE, DENSE, SPARSE, SPARSE]


def searching(model, blocks):
    search = {"retrieval": "topk", "answers": "topk", "blocks": blocks}
    return model.replace(sparse=dataclasses.replace(model.sparse, **search))


def by(kernel, model, serving):
    sparse = dataclasses.replace(model.sparse, implementation=kernel)
    return model.replace(sparse=sparse), dataclasses.replace(serving, decoding=kernel)


def logits(model, kernel):
    """[1+STEPS,B,V]: after the prompts, then after each of the same few tokens."""
    model, serving = by(kernel, model, SERVING)
    params = init_params(MODEL, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 64, (3, serving.bucket(3, 700)), np.int32)
    rows = jnp.array([2, 0, 3])
    first, memory = prefill_prompts(
        model, serving, params, DECISIONS, jnp.asarray(tokens), jnp.asarray(LENGTHS),
        jnp.asarray(LENGTHS) + STEPS, rows, empty_memory(model, serving),
    )  # fmt: skip
    seen = [first]
    for i in range(STEPS):
        out, memory = read_tokens(model, serving, params, jnp.full(4, i % 64), memory)
        seen.append(out[rows])
    return np.stack(seen)


@pytest.mark.gpu
@pytest.mark.parametrize("model", [MODEL, searching(MODEL, 4)])
def test_hopper_kernels_serve_what_xla_serves(model):
    if refusal := hopper_refusal():
        pytest.skip(refusal)
    expected, found = logits(model, "xla"), logits(model, "mosaic_gpu")
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    # Of blocks that score alike, rounding may choose another.
    assert np.quantile(error, 1.0 if model is MODEL else 0.9) < 0.05
    assert np.median(error) < 0.02


@pytest.mark.parametrize(
    ("model", "serving", "length"),
    [(MODEL, SERVING, 832), (LLAMA, LONG, 131_072), (searching(LLAMA, 8), LONG, 131_072)],
)
def test_lowered_for_hopper_pages_are_written_in_place_and_read_by_kernels(
    model, serving, length, monkeypatch
):
    for kernel in ("block_sparse.mosaic_gpu.call", "decode.mosaic_gpu", "block_lse.mosaic_gpu"):
        monkeypatch.setattr(f"routing_jax.kernels.{kernel}.hopper_refusal", lambda: None)
    model, serving = by("mosaic_gpu", model, serving)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    memory = jax.eval_shape(lambda: empty_memory(model, serving))
    B = serving.sequences

    def whole(*shape):
        return jax.ShapeDtypeStruct(shape, "int32")

    x = jax.ShapeDtypeStruct((B, length, model.width), model.dtype)
    layer, each = whole(), whole(B)
    prefill = lower_for_cuda(
        prefill_layer, model, serving, layer_params(params, 0), layer, layer, x, each, each, each,
        memory,
    )  # fmt: skip
    decode = lower_for_cuda(read_tokens, model, serving, params, each, memory)
    pool = "tensor<{}x{}x{}x{}xbf16>".format(*memory.keys.shape)
    P, size, K, H = memory.keys.shape
    narrow = f"tensor<{P}x{K}x{size}x{H // 4}xbf16>"
    for text in (prefill, decode):
        entry = text[text.index("@main") :].split("\n", 1)[0]
        assert len(re.findall(rf"{pool} {{tf.aliasing_output", entry)) == 2
        searches = len(re.findall(rf"{narrow} {{tf.aliasing_output", entry))
        assert searches == (model.sparse.answers == "topk")
        assert "custom_call @mosaic_gpu" in text
        assert ("block_logsumexp_kernel" in text) == searches
        gathers = [line for line in text.splitlines() if "gather" in line]
        assert not [line for line in gathers if pool in line or narrow in line]
    if searches:
        # Lists hold what can be found, not all that is kept; nothing is sorted for them.
        assert "tensor<1x8x17xi32>" in decode
        assert not re.search(r"top_k|stablehlo\.sort", decode)
