"""Queries of decoding as the kernels take them: rows of a matrix, a matrix a kv head."""

import jax


def rows_of_queries(q: jax.Array, num_kv_heads: int) -> jax.Array:
    """The T·G queries of each kv head, row t·G + g: [B,T,N,H] to [B,K,T·G,H].

    Args:
      q: [B,T,N,H].
      num_kv_heads: K, a divisor of N.

    >>> rows_of_queries(jax.numpy.ones((2, 3, 8, 4)), 2).shape
    (2, 2, 12, 4)
    """
    B, T, N, H = q.shape
    by_head = q.reshape(B, T, num_kv_heads, N // num_kv_heads, H).transpose(0, 2, 1, 3, 4)
    return by_head.reshape(B, num_kv_heads, -1, H)


def queries_of_rows(
    out: jax.Array, lse: jax.Array, num_queries: int, num_heads: int
) -> tuple[jax.Array, jax.Array]:
    """What rows gave, by query: the way back.

    Args:
      out: [B,K,R,H]; rows past T·G are padding.
      lse: [B,K,R].
      num_queries: T.
      num_heads: N.

    Returns:
      [B,T,N,H] and [B,T,N].

    >>> out, lse = jax.numpy.ones((2, 2, 16, 4)), jax.numpy.ones((2, 2, 16))
    >>> [x.shape for x in queries_of_rows(out, lse, 3, 8)]
    [(2, 3, 8, 4), (2, 3, 8)]
    """
    B, K, _, H = out.shape
    T, G = num_queries, num_heads // K
    out = out[:, :, : T * G].reshape(B, K, T, G, H).transpose(0, 2, 1, 3, 4)
    lse = lse[:, :, : T * G].reshape(B, K, T, G).transpose(0, 2, 1, 3)
    return out.reshape(B, T, num_heads, H), lse.reshape(B, T, num_heads)
