"""Random inputs and weights that make a real token router choose exactly the wanted tokens.

The router's first hidden unit reads channel 0 of a token, where the input says ±8, and outweighs
the other units: the gate's logit is near +4 or −4.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from routing_jax.evals.benchmarks.mixing_config import MixingBenchConfig

_SIGNAL = 8.0


def choose_tokens(length: int, tokens: int, seed: int) -> np.ndarray:
    """A mask [T] with exactly `tokens` true entries at random places.

    >>> int(choose_tokens(100, 7, seed=0).sum())
    7
    """
    mask = np.zeros(length, bool)
    mask[np.random.default_rng(seed).permutation(length)[:tokens]] = True
    return mask


@functools.partial(jax.jit, static_argnums=(1, 2))
def normal(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Standard normal numbers of a shape, made on the device (rbg: gigabytes in no time)."""
    return jax.random.normal(jax.random.key(seed, impl="rbg"), shape, dtype)


@jax.jit
def _signal(x: jax.Array, mask: jax.Array) -> jax.Array:
    return x.at[:, :, 0].set(jnp.where(mask, _SIGNAL, -_SIGNAL).astype(x.dtype))


def tokens_input(config: MixingBenchConfig, mask: np.ndarray, seed: int) -> jax.Array:
    """Random tokens x [1,T,D] that the router of `weights` gates exactly as `mask` [T] says."""
    x = normal(seed, (1, len(mask), config.width), config.dtype)
    return _signal(x, jnp.asarray(mask)[None])


@functools.partial(jax.jit, static_argnums=0)
def weights(config: MixingBenchConfig) -> dict[str, Any]:
    """Parameters of `RoutedConv` in the compute dtype; its float32 router obeys channel 0."""
    N, K, H, D = config.num_heads, config.num_kv_heads, config.head_dim, config.width

    def scaled(seed: int, *shape: int, fan_in: int) -> jax.Array:
        return normal(config.seed + seed, shape, config.dtype) * fan_in**-0.5

    hidden = 0.02 * normal(config.seed + 5, (D, config.router_hidden), "float32")
    hidden = hidden.at[0].set(0).at[:, 0].set(0).at[0, 0].set(1)
    return {
        "query": scaled(1, D, N, H, fan_in=D),
        "key": scaled(2, D, K, H, fan_in=D),
        "value": scaled(3, D, K, H, fan_in=D),
        "out": scaled(4, N, H, D, fan_in=N * H),
        "conv": scaled(6, config.conv_width, D, fan_in=config.conv_width),
        "router": {
            "hidden": hidden,
            "out": jnp.full((config.router_hidden,), 0.01).at[0].set(1),
            "bias": jnp.float32(-_SIGNAL / 2),
        },
    }
