"""Block-sparse decoding in plain XLA.

One row is the queries of one sequence and kv head. `map_rows` takes rows with about as many
pages together; within them a loop gathers the next few pages and adds them by online softmax.
A sequence of length 0 has no page to read.
"""

import jax
import jax.numpy as jnp

from routing_jax.kernels.block_table import ceil_div
from routing_jax.kernels.decode.implementation import DecodeImplementation, DecodeInputs
from routing_jax.kernels.online_softmax import add_piece, empty_softmax, finish_softmax, matmul
from routing_jax.kernels.ragged_rows import map_rows

_KEYS_PER_PIECE = 1024  # so that a loop's own cost is small beside its pages


def _run(scale: float, inputs: DecodeInputs) -> tuple[jax.Array, jax.Array]:
    q, k_pool, v_pool, pages, lengths, block_bias = inputs
    B, T, N, H = q.shape
    P, page_size, K = k_pool.shape[:3]
    G, C = N // K, pages.pages.shape[2]
    width = min(C, ceil_div(_KEYS_PER_PIECE, page_size))
    queries = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B * K, G, T, H)
    counts = jnp.where(lengths[:, None] > 0, jnp.clip(pages.counts, 0, C), 0)
    counts = jnp.broadcast_to(counts, (B, K)).reshape(-1)

    def step(rows, pieces):
        batch, head = rows // K, rows % K
        at = batch, jnp.minimum(head, pages.counts.shape[1] - 1)
        row_pages, row_blocks = pages.pages[at], pages.blocks[at]
        positions = lengths[batch][:, None] - T + jnp.arange(T, dtype=jnp.int32)[None]

        def add_pages(i, state):
            slots = i * width + jnp.arange(width, dtype=jnp.int32)
            stored = jnp.minimum(slots, C - 1)
            page = row_pages[:, stored]
            used = (slots[None] < counts[rows][:, None]) & (page >= 0) & (page < P)
            first = row_blocks[:, stored] * page_size
            keys_at = first[..., None] + jnp.arange(page_size, dtype=jnp.int32)[None, None]
            live = used[..., None] & (keys_at < lengths[batch][:, None, None])
            keys, values = (
                pool.at[page, :, head[:, None]].get(mode="clip") for pool in (k_pool, v_pool)
            )
            # What stands in a pool past a sequence's end may be anything, nan included.
            values = jnp.where(live[..., None], values, 0).reshape(-1, width * page_size, H)
            keys = keys.reshape(-1, width * page_size, H)
            seen = live[:, None] & (keys_at[:, None] <= positions[:, :, None, None])
            logits = matmul("rgqh,rph->rgqp", queries[rows], keys) * scale
            if block_bias is not None:
                bias = block_bias[batch, head][:, stored].astype(jnp.float32)
                logits += jnp.repeat(bias, page_size, axis=1)[:, None, None]
            seen = seen.reshape(-1, 1, T, width * page_size)
            return add_piece(state, jnp.where(seen, logits, -jnp.inf), values)

        state = empty_softmax((rows.shape[0], G, T), H)
        out, lse = finish_softmax(jax.lax.fori_loop(0, pieces.max(), add_pages, state))
        return out.astype(q.dtype), lse

    out, lse = map_rows(step, -(-counts // width), width * page_size * max(H, G * T))
    out = out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    return out, lse.reshape(B, K, G, T).transpose(0, 3, 1, 2).reshape(B, T, N)


XLA = DecodeImplementation("xla", lambda inputs: None, _run)
