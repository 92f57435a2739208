"""The oracle of decoding: each query's visible keys gathered, then one float64 softmax."""

import jax
import numpy as np

from routing_jax.kernels.decode.pages import PageList


def reference_decode(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    pages: PageList,
    lengths: jax.Array,
    *,
    block_bias: jax.Array | None = None,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One query after the other, by numpy; arguments as in `block_sparse_decode`. For tests only.

    Returns:
      out [B,T,N,H] and lse [B,T,N], float64.

    >>> import jax.numpy as jnp
    >>> one = jnp.zeros((1, 1, 1), jnp.int32)
    >>> pool = jnp.ones((1, 4, 1, 2))
    >>> out, _ = reference_decode(pool[:, :1], pool, pool, PageList(one[0] + 1, one, one),
    ...                           jnp.array([3]))
    >>> out.shape
    (1, 1, 1, 2)
    """
    queries, keys_of_pool, values_of_pool = (np.asarray(x, np.float64) for x in (q, k_pool, v_pool))
    counts, physical, blocks = (np.asarray(x) for x in pages)
    B, T, N, H = q.shape
    page_size, K = k_pool.shape[1:3]
    scale = H**-0.5 if scale is None else scale
    out, lse = np.zeros((B, T, N, H)), np.full((B, T, N), -np.inf)
    for b, t, n in np.ndindex(B, T, N):
        head, position = n // (N // K), int(lengths[b]) - T + t
        row = b, min(head, counts.shape[1] - 1)
        logits, values = [], []
        for c in range(counts[row]):
            seen = blocks[row][c] * page_size + np.arange(page_size) <= position
            of_page = physical[row][c], seen, head
            bias = 0.0 if block_bias is None else float(block_bias[b, head, c])
            logits.append(keys_of_pool[of_page] @ queries[b, t, n] * scale + bias)
            values.append(values_of_pool[of_page])
        if sum(map(len, logits)):
            total = np.logaddexp.reduce(np.concatenate(logits))
            weights = np.exp(np.concatenate(logits) - total)
            out[b, t, n], lse[b, t, n] = weights @ np.concatenate(values), total
    return out, lse
