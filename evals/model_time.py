"""Wall-clock of a whole model: a pass over a batch, and a step of decoding."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from routing_jax.generate import decode_step, prefill
from routing_jax.models import Decoder, DecoderConfig


def median_milliseconds(call: Callable[[], Any], *, calls: int = 10, repeats: int = 5) -> float:
    """Median milliseconds of a call, of several dispatched together; the first is not counted.

    Args:
      call: what is timed; returns arrays.
      calls: dispatched before waiting.
      repeats: samples.

    >>> median_milliseconds(lambda: jnp.ones(3) + 1, calls=1, repeats=1) > 0
    True
    """
    jax.block_until_ready(call())
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        out = None
        for _ in range(calls):
            out = call()
        jax.block_until_ready(out)
        samples.append((time.perf_counter() - start) / calls)
    return float(np.median(samples) * 1e3)


def forward_milliseconds(config: DecoderConfig, params: Any, tokens: Any) -> float:
    """Milliseconds of a pass in mode 'eval', which skips what is not routed.

    Args:
      config: the model.
      params: its parameters.
      tokens: [B,T] int32.
    """
    model = Decoder(config)

    @jax.jit
    def forward(params: Any, tokens: jax.Array) -> jax.Array:
        out: Any = model.apply({"params": params}, tokens, mode="eval")
        return out.logits

    return median_milliseconds(lambda: forward(params, tokens))


def decode_milliseconds(config: DecoderConfig, params: Any, tokens: Any) -> float:
    """Milliseconds of decoding one token of one sequence after T − 1 others.

    Args:
      config: the model.
      params: its parameters.
      tokens: [1,T] int32.
    """
    T = tokens.shape[1]
    fill = jax.jit(lambda params, prompt, n: prefill(config, params, prompt, n, T)[1])
    cache = fill(params, tokens[:, :-1], jnp.array([T - 1]))
    step = jax.jit(lambda params, token, cache: decode_step(config, params, token, cache)[0])
    return median_milliseconds(lambda: step(params, tokens[:, -1], cache))
