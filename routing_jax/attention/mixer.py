"""The interface of everything that mixes tokens: modes, the report, and the unit of cost.

A mixer is called as `(x, positions, segment_ids, cache, rng, mode) -> (y, cache, LayerReport)`.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from routing_jax.kernels import segment_starts

Mode = Literal["train", "eval", "masked", "prefill", "decode"]
"""How a mixer runs.

train: both branches, noisy gates, gradients. masked: both branches, no noise (the reference that
skipping is tested against). eval: no noise, unrouted work skipped. prefill: eval, and fills an
empty cache. decode: one token a sequence, from the cache.
"""


def check_mode(mode: str) -> None:
    """Refuses what is no Mode, which would run as some other one; every mixer calls it first.

    Raises:
      ValueError: `mode` is not one of them.

    >>> check_mode("evaluate")
    Traceback (most recent call last):
    ValueError: mode is 'evaluate'; accepted: train, eval, masked, prefill, decode.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode is {mode!r}; accepted: {', '.join(get_args(Mode))}.")


class LayerReport(NamedTuple):
    """What a layer spent, on average over the batch. Values are hard, gradients soft.

    Attributes:
      cost: scalar, multiply-adds for mixing ÷ those of full causal attention.
      kv_cost: scalar, key/value bytes read ÷ those that dense multi-head attention reads.
      usage: scalar, the fraction of tokens that attended; of mixed schemes, the share of the
        dearest; for block routers, of the visible key blocks that were visited; for layer
        routers, the share of sequences that attended fully.
      aux: scalar, the router's own auxiliary loss, to be weighted and added by the trainer; for
        independent gates minus their mean entropy in nats, which keeps them undecided; for scheme
        routers the balance loss.
      choice: [B,T] bool, which tokens attended; of mixed schemes, by the dearest; of layer
        routers, fully.
    """

    cost: jax.Array
    kv_cost: jax.Array
    usage: jax.Array
    aux: jax.Array
    choice: jax.Array


def visible_pairs(positions: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """How many keys each query may see causally: its own segment's tokens so far, itself included.

    Args:
      positions: [B,T] int32, −1 for padding, which sees nothing.
      segment_ids: [B,T] int32 or None; segments are contiguous runs.

    Returns:
      [B,T] float32.

    >>> visible_pairs(jnp.array([[0, 1, 2, -1]]), jnp.array([[0, 0, 1, 1]])).tolist()
    [[1.0, 2.0, 1.0, 0.0]]
    """
    seen = positions + 1
    if segment_ids is not None:
        index = jnp.arange(positions.shape[1], dtype=jnp.int32)[None]
        seen = jnp.where(positions >= 0, index - segment_starts(segment_ids) + 1, 0)
    return seen.astype(jnp.float32)


def attention_work[Number: (jax.Array, float)](
    pairs: Number, num_heads: int, head_dim: int
) -> Number:
    """Multiply-adds of scores and weighted values over so many query–key pairs.

    Args:
      pairs: visible pairs, any shape.
      num_heads: N.
      head_dim: H.

    >>> attention_work(10.0, 2, 8)
    320.0
    """
    return pairs * (2 * num_heads * head_dim)
