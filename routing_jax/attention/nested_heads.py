"""Key/value heads in a basis whose first vectors are all that a cheaper scheme needs.

For six heads and schemes of 1, 2 and 6: the mean of all, the difference of the two halves'
means, and what is left within them. The basis is orthonormal, so it inverts by its transpose, and
reading its first K vectors gives exactly the means that K key/value heads would be.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def head_basis(counts: Sequence[int]) -> np.ndarray:
    """The orthonormal basis [K,K] over K = max(counts) heads, a vector a row.

    Its first k rows span what is constant within each of k groups, for every k of `counts`.

    Args:
      counts: key/value heads of each scheme; each divides the next larger.

    >>> np.round(head_basis((4, 2, 1)), 2).tolist()[:2]
    [[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, -0.5, -0.5]]
    """
    K = max(counts)
    rows: list[np.ndarray] = []
    for count in sorted(counts):
        for group in np.repeat(np.eye(count), K // count, axis=1):
            left = group - sum((np.dot(row, group) * row for row in rows), np.zeros(K))
            if np.linalg.norm(left) > 1e-6:  # else the rows so far say it already
                rows.append(left / np.linalg.norm(left))
    return np.stack(rows).astype(np.float32)


def group_means(x: jax.Array, count: int) -> jax.Array:
    """Means over groups of neighbouring heads: [B,S,K,H] to [B,S,count,H].

    >>> group_means(jnp.arange(4.0).reshape(1, 1, 4, 1), 2).ravel().tolist()
    [0.5, 2.5]
    """
    B, S, K, H = x.shape
    return x if count == K else x.reshape(B, S, count, K // count, H).mean(3)


def into_basis(x: jax.Array, basis: np.ndarray) -> jax.Array:
    """Heads [B,S,K,H] as coefficients of the basis [K,K], same shape.

    >>> into_basis(jnp.ones((1, 1, 4, 1)), head_basis((4, 1))).round(3).ravel().tolist()
    [2.0, 0.0, 0.0, 0.0]
    """
    return jnp.einsum("JK,BSKH->BSJH", jnp.asarray(basis, x.dtype), x)


def absorb_queries(q: jax.Array, basis: np.ndarray, count: int) -> jax.Array:
    """Queries that meet the first `count` coefficients themselves: [B,T,N,H] to [B,T,N,count·H].

    Their product with a token's coefficients, laid end to end, is that of q with the heads which
    these coefficients make, so that no head has to be made.

    Args:
      q: [B,T,N,H]; N a multiple of K, neighbours share a head.
      basis: [K,K].
      count: how many coefficients are read.

    >>> absorb_queries(jnp.ones((1, 1, 4, 1)), head_basis((4, 1)), 1).ravel().tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    B, T, N, H = q.shape
    used = jnp.asarray(np.repeat(basis[:count], N // basis.shape[1], axis=1), q.dtype)
    return jnp.einsum("JN,BTNH->BTNJH", used, q).reshape(B, T, N, count * H)


def release_values(y: jax.Array, basis: np.ndarray, count: int) -> jax.Array:
    """Weighted coefficients of values as heads' outputs: [B,T,N,count·H] to [B,T,N,H].

    Args:
      y: [B,T,N,count·H], attention's output over coefficients laid end to end.
      basis: [K,K].
      count: how many coefficients were read.

    >>> release_values(jnp.ones((1, 1, 4, 1)), head_basis((4, 1)), 1).ravel().tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    B, T, N, _ = y.shape
    used = jnp.asarray(np.repeat(basis[:count], N // basis.shape[1], axis=1), y.dtype)
    return jnp.einsum("JN,BTNJH->BTNH", used, y.reshape(B, T, N, count, -1))
