"""Serving by the kernels for Hopper: the logits that XLA's give, prompt and tokens alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.generate import DENSE, SPARSE, ServingConfig
from routing_jax.generate.paged_decode import read_tokens
from routing_jax.generate.paged_prefill import empty_memory, prefill_prompts
from routing_jax.kernels.hopper import hopper_refusal
from routing_jax.models import DecoderConfig, init_params
from routing_jax.routers import SparseModeConfig

MODEL = DecoderConfig(
    vocab_size=64, width=256, layers="full*4", num_heads=8, num_kv_heads=2, head_dim=64,
    mlp_width=512, sparse=SparseModeConfig(sink=64, window=128, block_q=64, block_kv=64),
)  # fmt: skip
LENGTHS, STEPS = np.array([700, 130, 64], np.int32), 70  # enough for windows to turn
DECISIONS = [SPARSE, DENSE, SPARSE, SPARSE]


def logits(kernel):
    """[1+STEPS,B,V]: after the prompts, then after each of the same few tokens."""
    model = MODEL.replace(sparse=dataclasses.replace(MODEL.sparse, implementation=kernel))
    serving = ServingConfig(
        pages=256, sequences=4, length=800, page_size=64, chunk=256, decoding=kernel
    )
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
def test_hopper_kernels_serve_what_xla_serves():
    if refusal := hopper_refusal():
        pytest.skip(refusal)
    expected, found = logits("xla"), logits("mosaic_gpu")
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert error.max() < 0.05
    assert np.median(error) < 0.02
