"""Held-out next-token evaluation: how right the model is, and what it spent.

Attention is skipped where the router says so, as it will be when the model is used.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from routing_jax.attention import Mode
from routing_jax.models import Decoder, DecoderConfig


class Evaluation(NamedTuple):
    """What a model did on held-out sequences.

    Attributes:
      accuracy: share of weighted positions whose most likely token is the target.
      loss: mean nats a weighted position.
      usage: mean share of tokens that attended.
      cost: mean multiply-adds for mixing ÷ those of full causal attention.
      kv_cost: mean key/value bytes read ÷ those of dense multi-head attention.
      usage_per_layer: [L].
      cost_per_layer: [L].
      sequences: how many were read.
      positions: how many targets were read.
    """

    accuracy: float
    loss: float
    usage: float
    cost: float
    kv_cost: float
    usage_per_layer: tuple[float, ...]
    cost_per_layer: tuple[float, ...]
    sequences: int
    positions: int


def evaluate(
    config: DecoderConfig, params: Any, batches: Iterable[Any], mode: Mode = "eval"
) -> Evaluation:
    """Evaluates a model on all of `batches`.

    Args:
      config: the model.
      params: its parameters.
      batches: of (tokens, targets, weights), each [B,T]; only positions of weight > 0 are read.
      mode: 'eval' skips unrouted attention, 'masked' computes and discards it.

    Raises:
      ValueError: `batches` is empty.

    >>> from routing_jax.models import init_params
    >>> config = DecoderConfig(width=8, head_dim=8, mlp_width=0)
    >>> batch = (np.zeros((2, 8), int), np.zeros((2, 8), int), np.ones((2, 8)))
    >>> evaluate(config, init_params(config, jax.random.key(0)), [batch]).positions
    16
    """
    sequences, rows = 0, []
    for tokens, targets, weights in batches:
        measured = _measure(params, tokens, targets, weights, config=config, mode=mode)
        rows.append(jax.device_get(measured))
        sequences += tokens.shape[0]
    if not rows:
        raise ValueError("batches is empty; evaluation needs at least one batch.")
    hits, nll, read, usage, cost, kv_cost = (np.array(column) for column in zip(*rows))
    return Evaluation(
        accuracy=float(hits.sum() / read.sum()),
        loss=float(nll.sum() / read.sum()),
        usage=float(usage.mean()),
        cost=float(cost.mean()),
        kv_cost=float(kv_cost.mean()),
        usage_per_layer=tuple(usage.mean(axis=0).tolist()),
        cost_per_layer=tuple(cost.mean(axis=0).tolist()),
        sequences=sequences,
        positions=int(read.sum()),
    )


# Here and not within: a run is evaluated more than once, and is compiled once.
@functools.partial(jax.jit, static_argnames=("config", "mode"))
def _measure(
    params: Any, tokens: Any, targets: Any, weights: Any, *, config: DecoderConfig, mode: Mode
) -> tuple[jax.Array, ...]:
    """Of one batch: hits, summed loss, positions read; usage, cost and kv_cost [L]."""
    out: Any = Decoder(config).apply({"params": params}, tokens, mode=mode)
    read = (weights > 0).astype(jnp.float32)
    nll = optax.softmax_cross_entropy_with_integer_labels(out.logits, targets)
    hits = (jnp.argmax(out.logits, axis=-1) == targets) * read
    spent = (out.reports.usage, out.reports.cost, out.reports.kv_cost)
    return jnp.sum(hits), jnp.sum(nll * read), jnp.sum(read), *spent


def routed_tokens(config: DecoderConfig, params: Any, tokens: Any) -> np.ndarray:
    """Which token in which layer attended: [B,L,T] bool, for a heat map.

    Args:
      config: the model.
      params: its parameters.
      tokens: [B,T] int32.
    """
    model = Decoder(config)
    out: Any = jax.jit(lambda p, t: model.apply({"params": p}, t, mode="eval"))(params, tokens)
    return np.swapaxes(np.asarray(out.reports.choice), 0, 1)
