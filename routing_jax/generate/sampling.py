"""From logits to the next token: greedy, or drawn with temperature, top-k and top-p."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """How each sequence's tokens are chosen.

    Attributes:
      temperature: [B] float32; 0 takes the most likely token.
      top_k: [B] int32, how many of the most likely tokens can be drawn; 0 for all.
      top_p: [B] float32, their probability's sum from which on less likely ones cannot; 1 for all.
      seed: [B] int32, of the draws.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seed: jax.Array


@jax.jit
def choose_tokens(logits: jax.Array, sampling: Sampling | None, positions: jax.Array) -> jax.Array:
    """The next token of each sequence.

    What is drawn depends on the sequence's seed and position, never on its neighbours. Top-p
    (nucleus sampling, arXiv 1904.09751) counts the probabilities that top-k leaves.

    Args:
      logits: [B,V] float32.
      sampling: how; None takes the most likely. On a GPU anything else waits for the device, to see
        whether all temperatures are 0 and nothing has to be sorted.
      positions: [B] int32, where the token will stand.

    Returns:
      [B] int32.

    >>> choose_tokens(jnp.array([[0.0, 2.0, 1.0]]), None, jnp.array([7])).tolist()
    [1]
    """
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if sampling is None:
        return best

    def draw() -> jax.Array:
        drawn = sampling.temperature > 0
        scaled = logits / jnp.where(drawn, sampling.temperature, 1.0)[:, None]
        order = jnp.argsort(scaled, axis=-1, descending=True)
        ordered = jnp.take_along_axis(scaled, order, axis=-1)
        rank = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]
        top_k = jnp.where(sampling.top_k > 0, sampling.top_k, logits.shape[-1])
        ordered = jnp.where(rank < top_k[:, None], ordered, -jnp.inf)
        probs = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        kept = (before < sampling.top_p[:, None]) | (rank == 0)
        keys = jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(
            sampling.seed, positions
        )
        ranks = jax.vmap(jax.random.categorical)(keys, jnp.where(kept, ordered, -jnp.inf))
        tokens = jnp.take_along_axis(order, ranks[:, None], axis=-1)[:, 0]
        return jnp.where(drawn, tokens.astype(jnp.int32), best)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), draw, lambda: best)
