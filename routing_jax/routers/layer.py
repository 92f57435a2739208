"""Layer routing: each layer decides, once a sequence, between full and sparse attention.

The Layer Router of Flux Attention (arXiv 2604.07394): the queries of a prompt's first and last
tokens, before RoPE, are pooled over tokens and heads and scored by a small MLP. Not as released,
what is pooled is standardised first.
"""

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from routing_jax.routers.gates import binary_gate
from routing_jax.routers.routing import Routing

# Widths of the router's layers in head dims, as released; the last scores sparse and full.
_WIDTHS = (8, 2, 4, 1)
# After which of them a SiLU stands: the second ends the encoder, and the third begins the scorer.
_ACTIVATED = (True, False, True, True)


@dataclass(frozen=True)
class LayerRouterConfig:
    """How a layer router decides.

    Attributes:
      pool: how many tokens of the prompt's beginning, and of its end, are pooled.
      full: probability of full attention before training.
    """

    pool: int = 100
    full: float = 0.99

    def __post_init__(self):
        if self.pool < 1:
            raise ValueError(f"layer_router.pool is {self.pool}; it must be at least 1.")
        if not 0 < self.full < 1:
            raise ValueError(f"layer_router.full is {self.full}; it must lie between 0 and 1.")

    def work(self, num_heads: int, head_dim: int) -> int:
        """Multiply-adds the router spends on one sequence: pooling, and the MLP.

        >>> LayerRouterConfig(pool=100).work(num_heads=32, head_dim=128)
        1409280
        """
        sizes = [head_dim, *(width * head_dim for width in _WIDTHS), 2]
        mlp = sum(a * b for a, b in itertools.pairwise(sizes))
        return 2 * self.pool * num_heads * head_dim + mlp


class LayerRouting(NamedTuple):
    """A layer router's output: the decision, and the gate to multiply by.

    Attributes:
      routing: Routing with choice [B] bool, True for full attention, probs and logits [B] float32.
      gate: [B] float32, `choice` with the straight-through gradient.
    """

    routing: Routing
    gate: jax.Array


def pool_queries(queries: jax.Array, lengths: jax.Array, pool: int) -> jax.Array:
    """The mean over heads of the first and the last `pool` tokens of each sequence.

    Prefix and suffix weigh the same, and overlap in sequences shorter than both together. No other
    token is read, so the price does not grow with T.

    Args:
      queries: [B,T,N,H], before RoPE.
      lengths: [B] int32, valid tokens of each sequence; they come first.
      pool: tokens of each end.

    Returns:
      [B,H] float32; 0 for an empty sequence.

    >>> queries = jnp.arange(8.0).reshape(1, 8, 1, 1)
    >>> pool_queries(queries, jnp.array([6]), 2).tolist()  # the mean of 0, 1, 4 and 5
    [[2.5]]
    """
    chex.assert_rank([queries, lengths], [4, 1])
    offset = jnp.arange(min(pool, queries.shape[1]), dtype=jnp.int32)[None]
    count = jnp.minimum(lengths, offset.shape[1])[:, None]
    prefix = jnp.broadcast_to(offset, (lengths.shape[0], offset.shape[1]))
    suffix = lengths[:, None] - count + offset
    read = jnp.tile(offset < count, (1, 2))
    places = jnp.where(read, jnp.concatenate([prefix, suffix], axis=1), 0)
    ends = jnp.take_along_axis(queries, places[:, :, None, None], axis=1)
    ends = jnp.where(read[:, :, None, None], ends.astype(jnp.float32), 0).mean(2)
    return jnp.sum(ends, axis=1) / jnp.maximum(2 * count, 1)


def end_tokens(x: jax.Array, lengths: jax.Array, pool: int) -> tuple[jax.Array, jax.Array]:
    """The tokens that a layer router reads, as sequences of their own.

    `pool_queries` of them is that of the whole, so only their queries need to be computed.

    Args:
      x: [B,T,D].
      lengths: [B] int32, valid tokens of each sequence; they come first.
      pool: tokens of each end.

    Returns:
      ([B,min(T,2·pool),D], [B] int32 how many of them are valid).

    >>> x = jnp.arange(8.0).reshape(1, 8, 1)
    >>> ends, counts = end_tokens(x, jnp.array([6]), 2)
    >>> ends.ravel().tolist(), counts.tolist()
    ([0.0, 1.0, 4.0, 5.0], [4])
    """
    chex.assert_rank([x, lengths], [3, 1])
    place = jnp.arange(min(2 * pool, x.shape[1]), dtype=jnp.int32)[None]
    skipped = jnp.maximum(lengths - 2 * pool, 0)[:, None]
    place = jnp.where(place < pool, place, place + skipped)
    ends = jnp.take_along_axis(x, place[:, :, None], axis=1)
    return ends, jnp.minimum(lengths, place.shape[1])


def cooled_temperature(
    step: jax.Array | int, steps: int, start: float = 1.5, end: float = 1.0, share: float = 0.6
) -> jax.Array:
    """The Gumbel temperature τ: falls from `start` to `end` as a half cosine, then stays.

    Args:
      step: steps done.
      steps: of the whole training.
      start: τ at step 0.
      end: τ from `share` of the steps on.
      share: of the steps, above 0, in which τ falls.

    >>> [round(float(cooled_temperature(step, 100)), 3) for step in (0, 30, 60, 100)]
    [1.5, 1.25, 1.0, 1.0]
    """
    done = jnp.clip(jnp.asarray(step, jnp.float32) / (share * steps), 0, 1)
    return end + (start - end) * (1 + jnp.cos(jnp.pi * done)) / 2


def standardised(pooled: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The scale and shift after which pooled queries differ by 1 from prompt to prompt, around 0.

    Args:
      pooled: [...,n,H], of n prompts.

    Returns:
      ([...,H], [...,H]), as `LayerRouter` takes them.

    >>> [x.tolist() for x in standardised(jnp.array([[1.0], [5.0]]))]
    [[0.5], [-1.5]]
    """
    scale = 1 / jnp.maximum(pooled.std(axis=-2), 1e-6)
    return scale, -scale * pooled.mean(axis=-2)


class LayerRouter(nn.Module):
    """Scores a sequence by its pooled queries and gates it.

    `__call__(queries [B,T,N,H], lengths [B], rng, temperature) -> LayerRouting`. With `rng` the
    gate is noisy, as in training; without, it is the threshold of the probabilities.
    """

    config: LayerRouterConfig

    @nn.compact
    def __call__(
        self,
        queries: jax.Array,
        lengths: jax.Array,
        rng: jax.Array | None = None,
        temperature: jax.Array | float = 1.0,
    ) -> LayerRouting:
        """Routes the sequences of queries [B,T,N,H]; see the class."""
        H = queries.shape[-1]
        x = pool_queries(queries, lengths, self.config.pool)
        self.sow("intermediates", "pooled", x)
        # Pooled queries are nearly the same for all prompts; what differs has to be drawn out first
        # (`standardised`), or training moves all prompts alike until the gates are saturated.
        scale = self.param("scale", nn.initializers.ones, (H,))
        shift = self.param("shift", nn.initializers.zeros, (H,))
        x = x * scale[None] + shift[None]
        for i, (width, activated) in enumerate(zip(_WIDTHS, _ACTIVATED)):
            x = nn.Dense(width * H, name=f"hidden_{i}")(x)
            x = nn.silu(x) if activated else x

        zeros, odds = nn.initializers.zeros, self.config.full / (1 - self.config.full)
        kernel = self.param("scores", zeros, (H, 2))
        bias = self.param("bias", lambda _: jnp.array([0.0, math.log(odds)], jnp.float32))
        scores = x @ kernel + bias[None]
        # Two-way Gumbel-softmax of (sparse, full) is a noisy threshold of their difference.
        logits = scores[:, 1] - scores[:, 0]
        gate = binary_gate(logits, rng, temperature)
        return LayerRouting(Routing(gate.choice, gate.probs, logits), gate.value)
