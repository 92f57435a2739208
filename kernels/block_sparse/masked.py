"""Block-sparse attention that computes every pair and hides what is not listed.

Nothing is skipped, so nothing is saved. But where tiles are as small as one query, gathering the
blocks of a row costs more than dense products of matrices do; up to some ten thousand keys this is
the quicker way to train there. Queries pass in parts, so that logits of one part are all that is
held, and the backward pass computes them anew. It adds in a fixed order: gradients are repeatable.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from routing_jax.kernels.block_sparse.implementation import (
    AttentionGradients,
    AttentionInputs,
    AttentionOptions,
    AttentionOutputs,
    Implementation,
)
from routing_jax.kernels.block_table import ceil_div
from routing_jax.kernels.padding import cut
from routing_jax.kernels.segments import query_segments

_LOGITS = 2**28  # held at once, 1 GiB


class _Part(NamedTuple):
    """Some tiles and their queries; with [parts] in front, all of them.

    Attributes:
      q: [B,m,block_q,K,G,H].
      positions: [B,m,block_q] int32, −1 for none.
      segments: [B,m,block_q] or None.
      counts: [B or 1,K or 1,m] int32, as a table has them.
      indices: [B or 1,K or 1,m,C] int32.
      bias: [B or 1,K or 1,m,C] float32.
    """

    q: jax.Array
    positions: jax.Array
    segments: jax.Array | None
    counts: jax.Array
    indices: jax.Array
    bias: jax.Array


def _parts(inputs: AttentionInputs) -> _Part:
    """All tiles in parts, so many of which that a part's logits are at most `_LOGITS`."""
    q, k, _, table, bias, positions, segments = inputs
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    size, most = table.block_q, _LOGITS // (B * N * S * table.block_q)
    number = max(1, min(table.num_tiles, most))

    def part(tiles: jax.Array, axis: int = 1, fill: int = 0) -> jax.Array:
        return jnp.moveaxis(cut(tiles, axis, number, fill), axis, 0)

    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    own = None
    if segments is not None:
        positions, own = query_segments(positions, segments)
    bias = jnp.zeros(table.indices.shape) if bias is None else bias.astype(jnp.float32)
    return _Part(
        part(cut(q.reshape(B, T, K, N // K, H), 1, size)),
        part(cut(positions, 1, size, fill=-1), fill=-1),
        None if own is None else part(cut(own, 1, size)),
        part(table.counts, 2),
        part(table.indices, 2),
        part(bias, 2),
    )


def _block_bias(part: _Part, num_blocks: int) -> jax.Array:
    """[B or 1,K or 1,m,J] float32, −inf where a block is not listed."""
    slots = jnp.arange(part.indices.shape[-1], dtype=jnp.int32)
    blocks = jnp.arange(num_blocks, dtype=jnp.int32)
    listed = slots[None, None, None] < part.counts[..., None]
    hit = listed[..., None] & (part.indices[..., None] == blocks[None, None, None, None])
    # A block is listed once, so its bias is the only one that is added.
    bias = jnp.sum(jnp.where(hit, part.bias[..., None], 0.0), axis=-2)
    seen = hit.any(axis=-2) | (part.counts < 0)[..., None]
    return jnp.where(seen, bias, -jnp.inf)


def _attend(options: AttentionOptions, inputs: AttentionInputs) -> tuple[jax.Array, jax.Array]:
    q, k, v, table = inputs.q, inputs.k, inputs.v, inputs.table
    (B, T, N, _), S = q.shape, k.shape[1]
    num_blocks = ceil_div(S, table.block_kv)
    at_keys = jnp.arange(S, dtype=jnp.int32)[None, None, None]

    @jax.checkpoint
    def one(part: _Part) -> tuple[jax.Array, jax.Array]:
        # By a broadcast, whose gradient is a sum; a gather's would add in any order.
        of_blocks = _block_bias(part, num_blocks)[..., None]
        of_blocks = jnp.broadcast_to(of_blocks, (*of_blocks.shape[:-1], table.block_kv))
        of_blocks = of_blocks.reshape(*of_blocks.shape[:3], -1)[..., :S]
        # What no row lists may hold anything.
        read = (of_blocks > -jnp.inf).any(axis=2).swapaxes(1, 2)[..., None]
        keys, values = (jnp.where(read, x, jnp.zeros_like(x)) for x in (k, v))
        logits = jnp.einsum("BmqKGH,BSKH->BKmGqS", part.q, keys, preferred_element_type=jnp.float32)
        logits = logits * options.scale + of_blocks[:, :, :, None, None]
        seen = part.positions[..., None] >= (at_keys if options.causal else 0)
        if part.segments is not None and inputs.segment_ids is not None:
            seen &= part.segments[..., None] == inputs.segment_ids[:, None, None]
        logits = jnp.where(seen[:, None, :, None], logits, -jnp.inf)
        most = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
        some = most > -jnp.inf
        weights = jnp.exp(logits - jnp.where(some, most, 0.0))
        total = weights.sum(axis=-1, keepdims=True)
        safe = jnp.where(some, total, 1.0)
        lse = jnp.where(some, jnp.log(safe) + jnp.where(some, most, 0.0), -jnp.inf)[..., 0]
        weights = (weights / safe).astype(v.dtype)
        out = jnp.einsum("BKmGqS,BSKH->BmqKGH", weights, values, preferred_element_type=jnp.float32)
        return out.astype(q.dtype), lse.transpose(0, 2, 4, 1, 3)

    out, lse = (x.swapaxes(0, 1) for x in jax.lax.map(one, _parts(inputs)))
    return out.reshape(B, -1, *q.shape[2:])[:, :T], lse.reshape(B, -1, N)[:, :T]


def _forward(options: AttentionOptions, inputs: AttentionInputs) -> AttentionOutputs:
    return AttentionOutputs(*_attend(options, inputs))


def _backward(
    options: AttentionOptions,
    inputs: AttentionInputs,
    outputs: AttentionOutputs,
    d_out: jax.Array,
    d_lse: jax.Array,
) -> AttentionGradients:
    def again(q, k, v, block_bias):
        return _attend(options, inputs._replace(q=q, k=k, v=v, block_bias=block_bias))

    _, pull = jax.vjp(again, inputs.q, inputs.k, inputs.v, inputs.block_bias)
    return AttentionGradients(*pull((d_out, jnp.where(outputs.lse == -jnp.inf, 0.0, d_lse))))


MASKED = Implementation("masked", lambda options, inputs: None, _forward, _backward)
