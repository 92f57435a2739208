"""One call of block-sparse attention cut into tiles, and the steps its passes share under XLA."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from routing_jax.kernels.block_sparse.implementation import AttentionInputs, AttentionOptions
from routing_jax.kernels.block_table import ceil_div, row_lengths
from routing_jax.kernels.online_softmax import matmul
from routing_jax.kernels.padding import cut
from routing_jax.kernels.segments import query_segments


class Tiles(NamedTuple):
    """The inputs cut into tiles. X is the flat (sequence, kv head, tile) or (…, block).

    The last tile and block of q, k and v are zeros that stand for 'none', so that a row which
    has run out of blocks multiplies zeros and not another row's keys.

    Attributes:
      q: [X+1,G,block_q,H].
      k: [X+1,block_kv,H].
      v: [X+1,block_kv,H].
      positions: [B,M,block_q] int32; −1 for a query that sees nothing.
      q_segments: [B,M,block_q] or None.
      k_segments: [B,J,block_kv] or None.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    positions: jax.Array
    q_segments: jax.Array | None
    k_segments: jax.Array | None


def with_none(x: jax.Array) -> jax.Array:
    """Appends one item of zeros.

    >>> with_none(jnp.ones((2, 3))).sum(axis=1).tolist()
    [3.0, 3.0, 0.0]
    """
    return jnp.pad(x, [(0, 1)] + [(0, 0)] * (x.ndim - 1))


def query_tiles(x: jax.Array, kv_heads: int, block_q: int) -> jax.Array:
    """Queries by tile: [B,T,N,H] -> [B·K·M,G,block_q,H], the last tile filled with zeros.

    >>> query_tiles(jnp.ones((2, 20, 6, 4)), 3, 8).shape
    (18, 2, 8, 4)
    """
    B, _, N, H = x.shape
    tiles = cut(x.reshape(B, -1, kv_heads, N // kv_heads, H), 1, block_q)  # B M bq K G H
    return tiles.transpose(0, 3, 1, 4, 2, 5).reshape(-1, N // kv_heads, block_q, H)


def from_query_tiles(tiles: jax.Array, batch: int, kv_heads: int, length: int) -> jax.Array:
    """Undoes `query_tiles`: [B·K·M,G,block_q,H] -> [B,T,N,H].

    >>> from_query_tiles(jnp.ones((18, 2, 8, 4)), 2, 3, 20).shape
    (2, 20, 6, 4)
    """
    _, G, block_q, H = tiles.shape
    tiles = tiles.reshape(batch, kv_heads, -1, G, block_q, H).transpose(0, 2, 4, 1, 3, 5)
    return tiles.reshape(batch, -1, kv_heads * G, H)[:, :length]


def key_blocks(x: jax.Array, block_kv: int) -> jax.Array:
    """Keys or values by block: [B,S,K,H] -> [B·K·J,block_kv,H], the last one filled with zeros.

    >>> key_blocks(jnp.ones((2, 20, 3, 4)), 8).shape
    (18, 8, 4)
    """
    return cut(x, 1, block_kv).transpose(0, 3, 1, 2, 4).reshape(-1, block_kv, x.shape[3])


def from_key_blocks(blocks: jax.Array, batch: int, kv_heads: int, length: int) -> jax.Array:
    """Undoes `key_blocks`: [B·K·J,block_kv,H] -> [B,S,K,H].

    >>> from_key_blocks(jnp.ones((18, 8, 4)), 2, 3, 20).shape
    (2, 20, 3, 4)
    """
    _, block_kv, H = blocks.shape
    blocks = blocks.reshape(batch, kv_heads, -1, block_kv, H).transpose(0, 2, 3, 1, 4)
    return blocks.reshape(batch, -1, kv_heads, H)[:, :length]


def _tiles(inputs: AttentionInputs) -> Tiles:
    q, k, v, table, _, positions, segments = inputs
    B, T, K = q.shape[0], q.shape[1], k.shape[2]
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    q_segments = k_segments = None
    if segments is not None:
        positions, own = query_segments(positions, segments)
        q_segments = cut(own, 1, table.block_q)
        k_segments = cut(segments, 1, table.block_kv)
    return Tiles(
        with_none(query_tiles(q, K, table.block_q)),
        with_none(key_blocks(k, table.block_kv)),
        with_none(key_blocks(v, table.block_kv)),
        cut(positions, 1, table.block_q, fill=-1),
        q_segments,
        k_segments,
    )


class TiledCall:
    """One call's tiles and sizes, and the steps that forward and backward share.

    B, T, S, N, K, G, H, M and J are the sizes of the dimensions with these letters; `lengths`
    [B·K·M] is how many blocks each row visits, `bias` [B·K·M,C] or None.
    """

    def __init__(self, options: AttentionOptions, inputs: AttentionInputs):
        self.options = options
        self.table = table = inputs.table
        self.B, self.T, self.N, self.H = inputs.q.shape
        self.S, self.K = inputs.k.shape[1:3]
        self.M, self.J = table.num_tiles, ceil_div(self.S, table.block_kv)
        self.G = self.N // self.K
        self.tiles = _tiles(inputs)
        self.bias = None
        if inputs.block_bias is not None:
            self.bias = inputs.block_bias.astype(jnp.float32).reshape(-1, table.capacity)
        lengths = row_lengths(
            table, self.T, self.S, q_positions=inputs.q_positions, causal=options.causal
        )
        self.lengths = jnp.broadcast_to(lengths, (self.B, self.K, self.M)).reshape(-1)
        self.logits_per_row = self.G * table.block_q * table.block_kv

    def split(self, rows: jax.Array, pieces: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A flat row number as (sequence, kv head, tile or block)."""
        head = rows // pieces
        return head // self.K, head % self.K, rows % pieces

    def table_row(self, batch: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where the table keeps the rows of a (sequence, kv head)."""
        B, K = self.table.counts.shape[:2]
        return jnp.minimum(batch, B - 1), jnp.minimum(head, K - 1)

    def listed_block(self, rows: jax.Array, active: jax.Array, slot: jax.Array):
        """The block [R] in a slot of each row, J where there is none, and its bias [R,1]."""
        batch, head, tile = self.split(rows, self.M)
        where = (*self.table_row(batch, head), tile)
        dense = self.table.counts[where] < 0
        stored = jnp.minimum(slot, self.table.capacity - 1)
        block = jnp.where(dense, slot, self.table.indices[(*where, stored)])
        block = jnp.where(active & (block >= 0) & (block < self.J), block, self.J)
        bias = None
        if self.bias is not None:
            bias = jnp.where(dense, 0.0, self.bias[rows, stored])[:, None]
        return block, bias

    def logits(self, q, k, bias, batch, tiles, block):
        """[R,G,n·block_q,block_kv] logits of n tiles and one block a row, −inf where hidden.

        Args:
          q: [R,G,n·block_q,H].
          k: [R,block_kv,H].
          bias: [R,n] or None.
          batch: [R].
          tiles: [R,n].
          block: [R].
        """
        size, at = self.table.block_kv, (batch[:, None], tiles)

        def of_queries(by_tile):  # [B,M,block_q] -> [R,n·block_q,1]
            return by_tile[at].reshape(q.shape[0], -1, 1)

        positions = of_queries(self.tiles.positions)
        keys = (block[:, None] * size + jnp.arange(size, dtype=jnp.int32)[None])[:, None, :]
        seen = (positions >= (keys if self.options.causal else 0)) & (keys < self.S)
        if self.tiles.q_segments is not None and self.tiles.k_segments is not None:
            of_block = self.tiles.k_segments[batch, jnp.minimum(block, self.J - 1)]
            seen &= of_queries(self.tiles.q_segments) == of_block[:, None, :]
        logits = matmul("rgqh,rph->rgqp", q, k) * self.options.scale
        if bias is not None:
            logits += jnp.repeat(bias, self.table.block_q, axis=1)[:, None, :, None]
        return jnp.where(seen[:, None], logits, -jnp.inf)

    def key_row(self, batch: jax.Array, head: jax.Array, block: jax.Array) -> jax.Array:
        """Where the flat k and v keep a block; J leads to their zeros."""
        rows = (batch * self.K + head) * self.J + block
        return jnp.where(block < self.J, rows, self.B * self.K * self.J)
