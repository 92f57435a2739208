"""Wall-clock of a trained model's mixing layers alone, on the inputs they really see."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from routing_jax.attention import Mode
from routing_jax.models import Decoder, DecoderConfig, make_mixer, unstack_layers


def mixer_inputs(
    config: DecoderConfig, params: Any, tokens: Any, *, mode: Mode = "eval"
) -> list[tuple[str, Any, jax.Array]]:
    """Kind, parameters and input [B,T,D] of every mixer, recorded in one pass through the model.

    Args:
      config: the model.
      params: its parameters.
      tokens: [B,T] int32.
      mode: of the pass.

    >>> from routing_jax.models import init_params
    >>> config = DecoderConfig(width=8, head_dim=8, mlp_width=0, layers="conv,full")
    >>> params = init_params(config, jax.random.key(0))
    >>> [(kind, x.shape) for kind, _, x in mixer_inputs(config, params, np.zeros((1, 4), int))]
    [('conv', (1, 4, 8)), ('full', (1, 4, 8))]
    """
    params = unstack_layers(params, config) if config.scan else params
    config = config.replace(scan=False, remat=False)

    @jax.jit
    def record(params, tokens):
        return Decoder(config).apply(
            {"params": params},
            tokens,
            mode=mode,
            capture_intermediates=lambda module, _: module.name == "mixer_norm",
        )[1]

    recorded = record(params, tokens)
    layers = []
    for pattern, blocks in sorted(recorded["intermediates"].items(), key=_number):
        for block, norm in sorted(blocks.items(), key=_number):
            x = norm["mixer_norm"]["__call__"][0]
            layers.append((params[pattern][block]["mixer"], x))
    return [(kind, own, x) for kind, (own, x) in zip(config.mixers, layers)]


def mixing_milliseconds(
    config: DecoderConfig, params: Any, tokens: Any, *, mode: Mode = "eval", repeats: int = 10
) -> float:
    """Median milliseconds for all mixers of the model on one batch: router, gather and all.

    The mixers' inputs are recorded in one pass through the model, then each mixer runs on its own.

    Args:
      config: the model.
      params: its parameters.
      tokens: [B,T] int32.
      mode: 'eval' skips unrouted attention, 'masked' does not.
      repeats: timed calls.

    >>> from routing_jax.models import init_params
    >>> config = DecoderConfig(width=8, head_dim=8, mlp_width=0)
    >>> params = init_params(config, jax.random.key(0))
    >>> mixing_milliseconds(config, params, np.zeros((1, 8), int), repeats=1) > 0
    True
    """
    layers = [(own, x) for _, own, x in mixer_inputs(config, params, tokens, mode=mode)]
    config = config.replace(scan=False, remat=False)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)

    @jax.jit
    def mix(layers):
        return [
            make_mixer(config, kind).apply({"params": p}, x, positions, mode=mode)[0]
            for kind, (p, x) in zip(config.mixers, layers)
        ]

    jax.block_until_ready(mix(layers))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(mix(layers))
        times.append(time.perf_counter() - start)
    return float(np.median(times) * 1e3)


def _number(item: tuple[str, Any]) -> int:
    return int(item[0].rsplit("_", 1)[1])
