"""The oracle of decoding: each sequence put back in order, then dense float32 attention."""

import jax
import jax.numpy as jnp

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
) -> tuple[jax.Array, jax.Array]:
    """Masked dense attention in float32; arguments as in `block_sparse_decode`. For tests only.

    Returns:
      out [B,T,N,H] and lse [B,T,N], float32.

    >>> one = jnp.zeros((1, 1, 1), jnp.int32)
    >>> pool = jnp.ones((1, 4, 1, 2))
    >>> out, _ = reference_decode(pool[:, :1], pool, pool, PageList(one[0] + 1, one, one),
    ...                           jnp.array([3]))
    >>> out.shape
    (1, 1, 1, 2)
    """
    q, k_pool, v_pool = (x.astype(jnp.float32) for x in (q, k_pool, v_pool))
    B, T, N, H = q.shape
    page_size, K = k_pool.shape[1:3]
    out, lse = [], []
    for b in range(B):
        for n in range(N):
            head = n // (N // K)
            row = min(head, pages.counts.shape[1] - 1)
            keys, values, positions, biases = [], [], [], []
            for c in range(int(pages.counts[b, row])):
                page, block = int(pages.pages[b, row, c]), int(pages.blocks[b, row, c])
                keys.append(k_pool[page, :, head])
                values.append(v_pool[page, :, head])
                positions.append(block * page_size + jnp.arange(page_size))
                bias = 0.0 if block_bias is None else block_bias[b, head, c].astype(jnp.float32)
                biases.append(jnp.full(page_size, bias))
            if not keys:
                out.append(jnp.zeros((T, H)))
                lse.append(jnp.full(T, -jnp.inf))
                continue
            logits = jnp.matmul(q[b, :, n], jnp.concatenate(keys).T, precision="highest")
            logits = logits * (H**-0.5 if scale is None else scale) + jnp.concatenate(biases)[None]
            at = lengths[b] - T + jnp.arange(T)
            logits = jnp.where(jnp.concatenate(positions)[None] <= at[:, None], logits, -jnp.inf)
            total = jax.nn.logsumexp(logits, axis=1)
            weights = jnp.exp(logits - jnp.where(jnp.isfinite(total), total, 0.0)[:, None])
            out.append(jnp.matmul(weights, jnp.concatenate(values), precision="highest"))
            lse.append(total)
    by_head = jnp.stack(out).reshape(B, N, T, H).transpose(0, 2, 1, 3)
    return by_head, jnp.stack(lse).reshape(B, N, T).transpose(0, 2, 1)
