"""Key/value heads in a basis whose first vectors are all that a cheaper scheme needs.

For six heads and schemes of 1, 2 and 6: what all share, what sets the two halves apart, and what
sets heads apart within them. Projections make these vectors themselves, so that what is stored is
what is read: the first K of them give K key/value heads, which are the means over groups of those
that more vectors give.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# How far details may set heads apart, as a share of what they have in common, before training.
# Projections drawn head by head would have it above 1, and their mean would say next to nothing.
_DETAIL = 0.25


def head_basis(counts: Sequence[int]) -> np.ndarray:
    """The basis [K,K] of K = max(counts) heads: a row says how much of a vector each head takes.

    Its first k rows span what is constant within each of k groups, for every k of `counts`, and
    rows are orthogonal, so that it inverts and no row past k changes a group's mean.

    Args:
      counts: key/value heads of each scheme; each divides the next larger.

    >>> np.round(head_basis((4, 2, 1)), 2).tolist()[:2]
    [[1.0, 1.0, 1.0, 1.0], [0.25, 0.25, -0.25, -0.25]]
    """
    K = max(counts)
    rows: list[np.ndarray] = []
    for count in sorted(counts):
        for group in np.repeat(np.eye(count), K // count, axis=1):
            left = group - sum((np.dot(row, group) * row for row in rows), np.zeros(K))
            if np.linalg.norm(left) > 1e-6:  # else the rows so far say it already
                rows.append(left / np.linalg.norm(left))
    levels = np.searchsorted(sorted(counts), np.arange(K), side="right")
    # Rows of one level give a head vectors that add up to the variance 1, or of details _DETAIL².
    sizes = np.bincount(levels)[levels]
    scales = np.where(levels == 0, 1.0, _DETAIL) * np.sqrt(K / sizes)
    return (scales[:, None] * np.stack(rows)).astype(np.float32)


def heads_from(x: jax.Array, basis: np.ndarray, count: int) -> jax.Array:
    """The `count` heads that the first `count` vectors give: [B,S,K,H] to [B,S,count,H].

    Args:
      x: [B,S,K,H], vectors.
      basis: [K,K].
      count: heads, one of those the basis was made for.

    >>> heads_from(jnp.ones((1, 1, 4, 1)), head_basis((4, 2, 1)), 2).ravel().tolist()
    [1.25, 0.75]
    """
    each = basis[:count, :: len(basis) // count]
    return jnp.einsum("JK,BSJH->BSKH", jnp.asarray(each, x.dtype), x[:, :, :count])


def absorb_queries(q: jax.Array, basis: np.ndarray, count: int) -> jax.Array:
    """Queries that meet the first `count` vectors themselves: [B,T,N,H] to [B,T,N,count·H].

    Their product with a token's vectors, laid end to end, is that of q with the heads which these
    give, so that no head has to be made.

    Args:
      q: [B,T,N,H]; N a multiple of K, neighbours share a head.
      basis: [K,K].
      count: how many vectors are read.

    >>> absorb_queries(jnp.ones((1, 1, 4, 1)), head_basis((4, 1)), 1).ravel().tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    B, T, N, H = q.shape
    used = jnp.asarray(np.repeat(basis[:count], N // basis.shape[1], axis=1), q.dtype)
    return jnp.einsum("JN,BTNH->BTNJH", used, q).reshape(B, T, N, count * H)


def release_values(y: jax.Array, basis: np.ndarray, count: int) -> jax.Array:
    """Weighted vectors of values as heads' outputs: [B,T,N,count·H] to [B,T,N,H].

    Args:
      y: [B,T,N,count·H], attention's output over vectors laid end to end.
      basis: [K,K].
      count: how many vectors were read.

    >>> release_values(jnp.ones((1, 1, 4, 1)), head_basis((4, 1)), 1).ravel().tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    B, T, N, _ = y.shape
    used = jnp.asarray(np.repeat(basis[:count], N // basis.shape[1], axis=1), y.dtype)
    return jnp.einsum("JN,BTNJH->BTNH", used, y.reshape(B, T, N, count, -1))
