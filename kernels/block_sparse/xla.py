"""Block-sparse attention in plain XLA: for CPUs, for older GPUs, and for float32.

One row is a query tile of one kv head with its G query heads (in the backward pass for k and v:
a key block with the tiles that list it). `map_rows` takes rows of about equal length together;
within them a loop gathers each row's next block and adds it by online softmax. So the work is
that of the listed blocks, a dense row costs the other rows nothing, and nothing is held that is
larger than q, k, v or the logits of one step. dk and dv are summed tile by tile through the
table's transpose, in a fixed order and without scatter-adds: gradients are bitwise repeatable.
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
    softmax_cotangents,
)
from routing_jax.kernels.block_sparse.xla_tiles import (
    TiledCall,
    from_key_blocks,
    from_query_tiles,
    query_tiles,
    with_none,
)
from routing_jax.kernels.block_table import ceil_div
from routing_jax.kernels.block_transpose import dense_runs, transpose_table
from routing_jax.kernels.online_softmax import add_piece, empty_softmax, finish_softmax, matmul
from routing_jax.kernels.ragged_rows import map_rows

# Tiles are taken together up to so many queries where a block's list of them is walked. Where each
# query is a tile of its own, a block that all of them list would else be a loop of T turns.
_QUERIES = 64


def _forward(options: AttentionOptions, inputs: AttentionInputs) -> AttentionOutputs:
    call = TiledCall(options, inputs)

    def step(rows, lengths):
        batch, head, tile = call.split(rows, call.M)
        q = call.tiles.q[rows]

        def add_block(slot, state):
            block, bias = call.listed_block(rows, slot < lengths, slot)
            keys = call.key_row(batch, head, block)
            logits = call.logits(q, call.tiles.k[keys], bias, batch, tile[:, None], block)
            return add_piece(state, logits, call.tiles.v[keys])

        state = empty_softmax((rows.shape[0], call.G, call.table.block_q), call.H)
        out, lse = finish_softmax(jax.lax.fori_loop(0, lengths.max(), add_block, state))
        return out.astype(inputs.q.dtype), lse[..., None]

    tiles = map_rows(step, call.lengths, call.logits_per_row)
    out, lse = (from_query_tiles(x, call.B, call.K, call.T) for x in tiles)
    return AttentionOutputs(out, lse[..., 0])


class _OutputTiles(NamedTuple):
    """What the backward pass knows of each query: [X+1,G,block_q], and d_out with H behind.

    δ = Σ_h dO·O − dLSE, so that dS = P·(dP − δ). Where nothing was seen the lse is 0, so that
    P = exp(−inf − 0) = 0, and so is its cotangent.
    """

    d_out: jax.Array
    lse: jax.Array
    d_lse: jax.Array
    delta: jax.Array


def _output_tiles(call: TiledCall, outputs: AttentionOutputs, d_out, d_lse) -> _OutputTiles:
    def cut(x):
        return with_none(query_tiles(x, call.K, call.table.block_q))

    empty = outputs.lse == -jnp.inf
    d_lse, delta = softmax_cotangents(outputs, d_out, d_lse)
    of_queries = jnp.where(empty, 0.0, outputs.lse), d_lse, delta
    return _OutputTiles(cut(d_out), *(cut(x[..., None])[..., 0] for x in of_queries))


def _query_gradients(call: TiledCall, outputs: _OutputTiles):
    """The gradients dq [B·K·M,G,block_q,H] and d_bias [B·K·M,C]: each tile over its blocks.

    A query's dS sum to its dLSE over all blocks, but the computed ones miss that by what
    rounding did to δ, which can exceed what is left of a block's sum. So each block gives back
    its share of the miss: d_bias is then as exact as float32, whatever dtype O has.
    """
    shape = call.table.capacity, call.G, call.table.block_q

    def step(rows, lengths):
        batch, head, tile = call.split(rows, call.M)
        q, d_out, lse, d_lse, delta = (x[rows] for x in (call.tiles.q, *outputs))

        def add_block(slot, sums):
            dq, ds_of_slots, p_of_slots, ds_of_all = sums
            block, bias = call.listed_block(rows, slot < lengths, slot)
            keys = call.key_row(batch, head, block)
            k = call.tiles.k[keys]
            p = jnp.exp(call.logits(q, k, bias, batch, tile[:, None], block) - lse[..., None])
            dp = matmul("rgqh,rph->rgqp", d_out, call.tiles.v[keys])
            ds = p * (dp - delta[..., None])
            dq += matmul("rgqp,rph->rgqh", ds.astype(k.dtype), k)
            if call.bias is not None:
                # A dense row walks past the last slot, and has no bias to learn.
                ds_of_block = ds.sum(axis=3)
                ds_of_slots = ds_of_slots.at[:, slot].set(ds_of_block.sum(axis=(1, 2)), mode="drop")
                p_of_slots = p_of_slots.at[:, slot].set(p.sum(axis=3), mode="drop")
                ds_of_all += ds_of_block
            return dq, ds_of_slots, p_of_slots, ds_of_all

        def zeros(*dims):
            return jnp.zeros((rows.shape[0], *dims), jnp.float32)

        start = zeros(*q.shape[1:]), None, None, None
        if call.bias is not None:
            start = start[0], zeros(shape[0]), zeros(*shape), zeros(*shape[1:])
        dq, d_bias, shares, total = jax.lax.fori_loop(0, lengths.max(), add_block, start)
        if call.bias is not None:
            d_bias -= jnp.einsum("rcgq,rgq->rc", shares, total - d_lse, precision="highest")
        return (dq * call.options.scale).astype(q.dtype), d_bias

    dq, d_bias = map_rows(step, call.lengths, call.logits_per_row)
    if call.bias is not None:
        dense = jnp.broadcast_to(call.table.dense, (call.B, call.K, call.M)).reshape(-1, 1)
        d_bias = jnp.where(dense, 0.0, d_bias)
    return dq, d_bias


def _key_gradients(call: TiledCall, outputs: _OutputTiles, q_positions):
    """The gradients dk and dv [B·K·J,block_kv,H]: each block over the tiles that attend to it."""
    transposed = transpose_table(call.table, call.J)
    C, together = transposed.capacity, max(1, _QUERIES // call.table.block_q)
    shape = (call.B, call.K, call.J)
    listed = jnp.broadcast_to(jnp.diff(transposed.offsets), shape)

    runs = dense_runs(
        call.table, transposed, call.T, call.S, q_positions=q_positions, causal=call.options.causal
    )
    first_dense, dense = (jnp.broadcast_to(x, shape) for x in runs)

    def step(rows, lengths):
        batch, head, block = call.split(rows, call.J)
        at = tuple(x[:, None] for x in call.table_row(batch, head))
        k, v = call.tiles.k[rows], call.tiles.v[rows]
        starts = transposed.offsets[(*at, block[:, None])]
        listed_here, first_here = (x.reshape(-1)[rows] for x in (listed, first_dense))

        def of_tiles(x, source):  # [X+1,G,block_q,...], [R,n] -> [R,G,n·block_q,...]
            x = jnp.swapaxes(x[source], 1, 2)
            return x.reshape(*x.shape[:2], -1, *x.shape[4:])

        def add_tiles(i, gradients):
            dk, dv = gradients
            nth = i * together + jnp.arange(together, dtype=jnp.int32)[None]
            active, is_listed = nth < lengths[:, None], nth < listed_here[:, None]
            entry = transposed.entries[(*at, jnp.minimum(starts + nth, call.M * C - 1))]
            nth_dense = jnp.clip((first_here - listed_here)[:, None] + nth, 0, call.M - 1)
            tiles = jnp.where(is_listed, entry // C, transposed.dense_tiles[(*at, nth_dense)])
            tiles = jnp.where(active, tiles, 0)
            source = ((batch * call.K + head) * call.M)[:, None] + tiles
            bias = None
            if call.bias is not None:
                bias = jnp.where(is_listed, call.bias[source, entry % C], 0.0)
            source = jnp.where(active, source, call.B * call.K * call.M)
            q, d_out, lse, _, delta = (of_tiles(x, source) for x in (call.tiles.q, *outputs))
            logits = call.logits(q, k, bias, batch, tiles, block)
            p = jnp.exp(logits - lse[..., None])  # 1 for no tile, whose q and d_out are 0
            dp = matmul("rgqh,rph->rgqp", d_out, v)
            ds = p * (dp - delta[..., None])
            dk += matmul("rgqp,rgqh->rph", ds.astype(q.dtype), q)
            dv += matmul("rgqp,rgqh->rph", p.astype(q.dtype), d_out)
            return dk, dv

        start = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        turns = ceil_div(lengths.max(), together)
        dk, dv = jax.lax.fori_loop(0, turns, add_tiles, start)
        # A block that nobody attends to may hold anything, and nan·0 would be nan.
        read = lengths[:, None, None] > 0
        dk, dv = jnp.where(read, dk, 0.0), jnp.where(read, dv, 0.0)
        return (dk * call.options.scale).astype(k.dtype), dv.astype(v.dtype)

    logits_per_row = call.logits_per_row * together
    return map_rows(step, (listed + dense).reshape(-1), logits_per_row)


def _backward(
    options: AttentionOptions,
    inputs: AttentionInputs,
    outputs: AttentionOutputs,
    d_out: jax.Array,
    d_lse: jax.Array,
) -> AttentionGradients:
    call = TiledCall(options, inputs)
    tiles = _output_tiles(call, outputs, d_out, d_lse)
    dq, d_bias = _query_gradients(call, tiles)
    dk, dv = _key_gradients(call, tiles, inputs.q_positions)
    return AttentionGradients(
        from_query_tiles(dq, call.B, call.K, call.T),
        from_key_blocks(dk, call.B, call.K, call.S),
        from_key_blocks(dv, call.B, call.K, call.S),
        None
        if inputs.block_bias is None
        else d_bias.reshape(inputs.block_bias.shape).astype(inputs.block_bias.dtype),
    )


XLA = Implementation("xla", lambda options, inputs: None, _forward, _backward)
