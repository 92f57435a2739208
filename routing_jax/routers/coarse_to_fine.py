"""The best-scored blocks without scoring every block: a beam that descends a tree of pooled keys.

A node of level l pools fanout^l blocks. From the coarsest level down, the best nodes are kept and
only their children are scored, so that a row costs O(log T) scores and all rows O(T log T).
"""

import jax
import jax.numpy as jnp

from routing_jax.kernels.padding import pad_axis


def tree_levels(num_blocks: int, fanout: int) -> list[int]:
    """Nodes of each level, finest first; the coarsest has at most `fanout`.

    Args:
      num_blocks: J.
      fanout: children a node.

    >>> tree_levels(100, 4)
    [100, 25, 7, 2]
    """
    sizes = [num_blocks]
    while sizes[-1] > fanout:
        sizes.append(-(-sizes[-1] // fanout))
    return sizes


def beam_scores(num_blocks: int, fanout: int, beam: int) -> int:
    """How many scores `beam_search` computes for one row.

    >>> [beam_scores(2**n, 4, 8) for n in (6, 8, 10, 12)]
    [60, 96, 132, 168]
    """
    total = nodes = tree_levels(num_blocks, fanout)[-1]
    for _ in tree_levels(num_blocks, fanout)[1:]:
        nodes = (min(beam, nodes) + 1) * fanout
        total += nodes
    return total


def beam_search(
    queries: jax.Array, keys: jax.Array, own: jax.Array, *, fanout: int, beam: int
) -> tuple[jax.Array, jax.Array]:
    """Candidates among the blocks before each tile's own, with their scores.

    A node that reaches into the own block or past it would pool keys that the tile must not see:
    it is opened without being scored. Exact where the beam is as broad as the tree.

    Args:
      queries: [B,M,K,R].
      keys: [B,J,K,R], pooled keys of the blocks.
      own: [B,M] int32, the block that each tile stands in.
      fanout: children a node.
      beam: nodes kept at each level.

    Returns:
      ([B,K,M,X] int32 blocks, [B,K,M,X] float32 q·k/√R, −inf where the candidate is none).

    >>> keys = jnp.array([0.0, 3, 1, 2, 9])[None, :, None, None]
    >>> blocks, scores = beam_search(
    ...     jnp.ones((1, 1, 1, 1)), keys, jnp.array([[4]]), fanout=2, beam=1)
    >>> int(blocks.ravel()[scores.argmax()])
    1
    """
    levels = [keys]
    for size in tree_levels(keys.shape[1], fanout)[1:]:
        children = pad_axis(levels[-1], 1, size * fanout)
        shape = children.shape[0], size, fanout, *children.shape[2:]
        levels.append(children.reshape(shape).mean(axis=2))
    queries = queries.swapaxes(1, 2)  # B K M R
    offsets = jnp.arange(fanout, dtype=jnp.int32)
    shape = queries.shape[:3]
    nodes = jnp.arange(levels[-1].shape[1], dtype=jnp.int32)
    nodes = jnp.broadcast_to(nodes[None, None, None], (*shape, nodes.size))
    for level in reversed(range(len(levels))):
        edge = (own // fanout**level)[:, None, :, None]
        scores = score_listed(queries, levels[level], nodes)
        scores = jnp.where(nodes < edge, scores, -jnp.inf)
        if level == 0:
            return nodes, scores
        best, at = jax.lax.top_k(scores, min(beam, nodes.shape[-1]))
        kept = jnp.take_along_axis(nodes, at, axis=-1)
        # What is no node goes past the edge, and its children then stand past theirs.
        kept = jnp.where(best > -jnp.inf, kept, edge + 1)
        opened = jnp.concatenate([kept, jnp.broadcast_to(edge, (*shape, 1))], axis=-1)
        nodes = (opened[..., None] * fanout + offsets[None, None, None, None]).reshape(*shape, -1)
    raise AssertionError("a tree has leaves")


def score_listed(queries: jax.Array, keys: jax.Array, listed: jax.Array) -> jax.Array:
    """Scores q · k / √R of listed blocks only.

    Args:
      queries: [B,K,M,R].
      keys: [B,J,K,R].
      listed: [B,K,M,X] int32; what lies outside [0, J) is clipped into it.

    Returns:
      [B,K,M,X] float32.

    >>> keys = jnp.arange(3.0)[None, :, None, None]
    >>> score_listed(jnp.ones((1, 1, 1, 1)), keys, jnp.array([[[[2, 0]]]])).ravel().tolist()
    [2.0, 0.0]
    """
    batch, heads = (jnp.arange(n)[:, None, None, None] for n in listed.shape[:2])
    at = batch, jnp.clip(listed, 0, keys.shape[1] - 1), heads.reshape(1, -1, 1, 1)
    scores = jnp.einsum("BKMR,BKMXR->BKMX", queries, keys[at], precision="highest")
    return scores * queries.shape[-1] ** -0.5
