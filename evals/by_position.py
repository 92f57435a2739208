"""Where in the context a model is right, and what each head of a block-routed layer visits."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from routing_jax.models import Decoder, DecoderConfig, repeating_pattern


def position_edges(length: int, first: int = 256) -> list[int]:
    """Where the parts of a context end: `first`, then doubling, the last at `length`.

    >>> position_edges(1500)
    [256, 512, 1024, 1500]
    """
    edges = [first]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    return [*(edge for edge in edges if edge < length), length]


def loss_by_position(
    config: DecoderConfig, params: Any, batches: Iterable[Any], edges: list[int]
) -> list[float]:
    """Mean nats a weighted position in each part of the context.

    Args:
      config: the model.
      params: its parameters.
      batches: of (tokens, targets, weights), each [B,T]; only positions of weight > 0 are read.
      edges: where the parts end; the first begins at 0.

    Raises:
      ValueError: `batches` is empty.

    >>> from routing_jax.models import init_params
    >>> config = DecoderConfig(width=8, layers="conv", mlp_width=0)
    >>> batch = (np.zeros((2, 8), int), np.zeros((2, 8), int), np.ones((2, 8)))
    >>> len(loss_by_position(config, init_params(config, jax.random.key(0)), [batch], [2, 8]))
    2
    """
    model = Decoder(config)

    @jax.jit
    def measure(params, tokens, targets, weights):
        out: Any = model.apply({"params": params}, tokens, mode="eval")
        read = (weights > 0).astype(jnp.float32)
        nll = optax.softmax_cross_entropy_with_integer_labels(out.logits, targets)
        return jnp.sum(nll * read, axis=0), jnp.sum(read, axis=0)

    rows = [jax.device_get(measure(params, *batch)) for batch in batches]
    if not rows:
        raise ValueError("batches is empty; evaluation needs at least one batch.")
    nll, read = (np.sum(column, axis=0, dtype=np.float64) for column in zip(*rows))
    parts = [slice(start, end) for start, end in zip([0, *edges], edges)]
    return [float(nll[part].sum() / max(read[part].sum(), 1)) for part in parts]


def head_usage(config: DecoderConfig, params: Any, tokens: Any) -> list[list[float]]:
    """The share of visible key blocks that each kv head visits, a list a block-routed layer.

    Args:
      config: the model.
      params: its parameters.
      tokens: [B,T] int32.

    >>> from routing_jax.models import init_params
    >>> config = DecoderConfig(width=8, head_dim=8, mlp_width=0, layers="block,conv")
    >>> head_usage(config, init_params(config, jax.random.key(0)), jnp.zeros((1, 8), jnp.int32))
    [[1.0]]
    """
    model = Decoder(config)
    told: Any = jax.jit(
        lambda p, t: model.apply({"params": p}, t, mode="eval", mutable=["intermediates"])[1]
    )(params, tokens).get("intermediates", {})
    pattern = repeating_pattern(config.mixers)
    layers = []
    for repeat in range(len(config.mixers) // len(pattern)):
        for i, kind in enumerate(pattern):
            if kind == "block":
                name = "layers" if config.scan else f"layers_{repeat}"
                (share,) = told[name][f"block_{i}"]["mixer"]["head_usage"]
                layers.append(np.asarray(share[repeat] if config.scan else share).tolist())
    return layers
