"""Prefill and decode: a prompt in one pass, then one token at a time from the cache.

A token attends only where its router opens, in prefill by compaction and in decode by skipping
the layer's attention when no sequence of the batch is routed there.
"""

from typing import Any

import jax
import jax.numpy as jnp

from routing_jax.kernels import whole_pages
from routing_jax.kernels.checks import refuse_rows, values_to_check
from routing_jax.models import Decoder, DecoderCache, DecoderConfig, init_cache


def prefill(
    config: DecoderConfig, params: Any, tokens: jax.Array, lengths: jax.Array, cache_length: int
) -> tuple[jax.Array, DecoderCache]:
    """Reads prompts of different lengths, padded at the end.

    Args:
      config: the model.
      params: its parameters.
      tokens: [B,T] int32.
      lengths: [B] int32, valid tokens of each prompt, at least 1.
      cache_length: S, the most tokens a sequence will hold.

    Returns:
      ([B,V] logits after each prompt's last token, the cache).

    Raises:
      ValueError: a length outside 1…T, or a prompt longer than the cache; both only where lengths
        are concrete. Under jit, what does not fit is dropped, as `Decoder` says.

    >>> from routing_jax.models import init_params
    >>> config = DecoderConfig(width=8, layers="full", head_dim=8, mlp_width=0)
    >>> params = init_params(config, jax.random.key(0))
    >>> logits, cache = prefill(config, params, jnp.zeros((2, 4), jnp.int32), jnp.array([4, 2]), 8)
    >>> logits.shape, cache.lengths.tolist()
    ((2, 256), [4, 2])
    """
    B, T = tokens.shape
    found = values_to_check(lengths)
    if found is not None:
        _, (known,) = found
        refuse_rows(
            (known < 1) | (known > T),
            f"lengths must be from 1 to {T}, the tokens given of each prompt",
            lambda row: f"is {known[row]}",
        )
    index = jnp.arange(T, dtype=jnp.int32)[None]
    positions = jnp.where(index < lengths[:, None], index, -1)
    cache = init_cache(config, B, cache_length)
    model = Decoder(config)
    out: Any = model.apply({"params": params}, tokens, positions, cache=cache, mode="prefill")
    last = jnp.take_along_axis(out.logits, (lengths - 1)[:, None, None], axis=1)
    return last[:, 0], out.cache


def decode_step(
    config: DecoderConfig, params: Any, tokens: jax.Array, cache: DecoderCache
) -> tuple[jax.Array, DecoderCache]:
    """Reads one token a sequence.

    Args:
      config: the model.
      params: its parameters.
      tokens: [B] int32.
      cache: what came before.

    Returns:
      ([B,V] logits, the cache).

    Raises:
      ValueError: a sequence's cache is full, where its lengths are concrete. Under jit they are
        not: the token's key is dropped and it attends without itself, as do all that follow.

    >>> from routing_jax.models import init_params
    >>> config = DecoderConfig(width=8, layers="full", head_dim=8, mlp_width=0)
    >>> params = init_params(config, jax.random.key(0))
    >>> _, cache = decode_step(config, params, jnp.zeros(2, jnp.int32), init_cache(config, 2, 8))
    >>> cache.lengths.tolist()
    [1, 1]
    """
    model = Decoder(config)
    out: Any = model.apply({"params": params}, tokens[:, None], cache=cache, mode="decode")
    return out.logits[:, 0], out.cache


def generate(
    config: DecoderConfig,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    steps: int,
    *,
    temperature: float = 0.0,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Continues prompts by `steps` tokens, as one compiled loop.

    Args:
      config: the model.
      params: its parameters.
      tokens: [B,T] int32, prompts padded at the end.
      lengths: [B] int32, valid tokens of each prompt, at least 1.
      steps: tokens to make.
      temperature: of sampling; 0 takes the most likely token.
      rng: a PRNG key, needed when temperature is above 0.

    Returns:
      [B,steps] int32.

    Raises:
      ValueError: a temperature below 0, or above 0 without a key; before the first step, a length
        outside 1…T where lengths are concrete. The cache is made for T + `steps` tokens or a few
        more, which lengths up to T never overrun.

    >>> from routing_jax.models import init_params
    >>> config = DecoderConfig(width=8, layers="full", head_dim=8, mlp_width=0)
    >>> params = init_params(config, jax.random.key(0))
    >>> generate(config, params, jnp.zeros((1, 4), jnp.int32), jnp.array([4]), 3).shape
    (1, 3)
    """
    if temperature < 0 or (temperature > 0 and rng is None):
        raise ValueError(
            f"temperature is {temperature}; it must be at least 0, and above 0 needs an rng key."
        )
    key = jax.random.key(0) if rng is None else rng

    def choose(logits: jax.Array, key: jax.Array) -> jax.Array:
        if temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, logits / temperature).astype(jnp.int32)

    def step(carry: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
        logits, cache = carry
        token = choose(logits, key)
        return decode_step(config, params, token, cache), token

    room = whole_pages(tokens.shape[1] + steps)
    logits, cache = prefill(config, params, tokens, lengths, room)
    _, made = jax.lax.scan(step, (logits, cache), jax.random.split(key, steps))
    return made.T
