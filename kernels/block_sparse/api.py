"""The front door of block-sparse attention: checks, the choice of implementation, the gradient."""

import functools
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from routing_jax.kernels.block_sparse.implementation import (
    AttentionInputs,
    AttentionOptions,
    Implementation,
)
from routing_jax.kernels.block_sparse.masked import MASKED
from routing_jax.kernels.block_sparse.mosaic_gpu import MOSAIC_GPU
from routing_jax.kernels.block_sparse.mosaic_tpu import MOSAIC_TPU
from routing_jax.kernels.block_sparse.xla import XLA
from routing_jax.kernels.block_table import BlockTable, check_table
from routing_jax.kernels.checks import (
    check_bias,
    check_dtype,
    check_head_groups,
    check_same_floats,
    match_shape,
    refuse_rows,
    resolve_scale,
    values_to_check,
)
from routing_jax.kernels.choice import choose

# In the order in which they are tried when the caller names none. XLA refuses nothing, so what
# stands behind it runs only by name: masking skips nothing, nothing of Mosaic TPU has run on a TPU.
IMPLEMENTATIONS: tuple[Implementation, ...] = (MOSAIC_GPU, XLA, MASKED, MOSAIC_TPU)

# What a rematerialised layer may keep of attention, by this name: its output and log-sum-exp.
ATTENTION = "attention"
_INTEGERS = ("int32", "int16", "int8", "uint32", "uint16", "uint8")


def block_sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: BlockTable,
    *,
    block_bias: jax.Array | None = None,
    q_positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    causal: bool = True,
    scale: float | None = None,
    deterministic: bool = True,
    implementation: str | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Softmax attention of each query tile to the key blocks that its table row lists.

    For query t of tile m and head n of kv head k, over the keys s that are in a listed block
    (in any block, if the row is dense), not later than the query's position (if causal) and in
    its segment: out = Σ softmax_s(scale·q·k_s + block_bias[slot of s's block])·v_s. A query that
    sees no key gets output 0 and log-sum-exp −inf. Memory is O(T·block_kv), the work that of the
    listed blocks, and gradients are bitwise repeatable unless asked not to be. Differentiable once,
    in reverse mode, in q, k, v and block_bias (through the log-sum-exp too).

    Args:
      q: [B,T,N,H], bfloat16, float16 or float32.
      k: [B,S,K,H], N a multiple of K; query heads n·G to n·G+G−1 share kv head n, G = N/K.
      v: [B,S,K,H].
      table: rows for ceil(T/block_q) query tiles; its B and K may be 1.
      block_bias: [B,K,M,C], B and K may be 1; added to the logits of the listed block in each
        slot, such as the log of a router's gate. −inf hides the block. Dense rows have no bias.
      q_positions: [B,T] int32, the place of each query in the sequence: ascending, unused slots
        last and marked −1 (output 0). None puts query t at position t.
      segment_ids: [B,S] integers; a query attends only to keys with the id found at its own
        position (none, if that lies past S).
      causal: whether keys after a query's position are hidden.
      scale: what q·k is multiplied by; 1/√H when None.
      deterministic: False lets 'mosaic_gpu' compute all gradients in one kernel that adds to those
        of q in whatever order its programs come: less work, and their last bits differ from run to
        run. It does so without a block_bias, for head dims up to 64, and up to 128 with blocks of
        128 keys. On an H100 it saves a few per cent at head dim 64 and with few queries, and costs
        some with long lists (README). All else, here and elsewhere, is repeatable still.
      implementation: 'mosaic_gpu' (Hopper GPUs), 'xla', 'masked' (which computes every pair, for
        tiles of one or few queries), 'mosaic_tpu' (TPUs), or None for the first of the first two
        that supports the call.
      return_lse: whether to return the log-sum-exp too.

    Returns:
      [B,T,N,H] in q's dtype; with `return_lse` also [B,T,N] float32.

    Raises:
      ValueError: shapes, dtypes or values that do not fit. Values are checked where they are
        concrete; traced ones are under `checked`.
      NotImplementedError: the named implementation does not support the call.

    >>> import jax.numpy as jnp
    >>> from routing_jax.kernels.block_patterns import sink_window_table
    >>> q = jnp.ones((1, 256, 4, 16)); kv = jnp.ones((1, 256, 2, 16))
    >>> table = sink_window_table(256, 256, 1, sinks=1, block_q=64, block_kv=64)
    >>> block_sparse_attention(q, kv, kv, table).shape
    (1, 256, 4, 16)
    """
    inputs = _check_inputs(q, k, v, table, block_bias, q_positions, segment_ids)
    options = AttentionOptions(bool(causal), resolve_scale(scale, q.shape[-1]), bool(deterministic))
    chosen = choose(implementation, IMPLEMENTATIONS, lambda one: one.refusal(options, inputs))
    out, lse = _attend(chosen, options, inputs)
    return (out, lse) if return_lse else out


def _check_inputs(q, k, v, table, block_bias, q_positions, segment_ids) -> AttentionInputs:
    sizes = match_shape("q", q, "BTNH", {})
    sizes = match_shape("k", k, "BSKH", sizes)
    match_shape("v", v, "BSKH", sizes)
    B, T, S, K = (sizes[letter] for letter in "BTSK")
    check_head_groups("k", q, k)
    check_same_floats({"q": q, "k": k, "v": v})
    if not isinstance(table, BlockTable):
        raise ValueError(f"table must be a BlockTable; it is a {type(table).__name__}.")
    check_table(table, T, S, batch=B, kv_heads=K)
    if block_bias is not None:
        block_bias = check_bias(block_bias, "BKMC", (B, K, table.num_tiles, table.capacity))
    if q_positions is not None:
        match_shape("q_positions", q_positions, "BT", sizes)
        check_dtype("q_positions", q_positions, ("int32",))
        _check_positions(q_positions)
    if segment_ids is not None:
        match_shape("segment_ids", segment_ids, "BS", sizes)
        check_dtype("segment_ids", segment_ids, _INTEGERS)
    return AttentionInputs(q, k, v, table, block_bias, q_positions, segment_ids)


def _check_positions(q_positions: jax.Array) -> None:
    """Ascending, then −1: the backward pass and the loop bounds of dense rows rely on it."""
    found = values_to_check(q_positions)
    if found is None:
        return
    _, (positions,) = found
    later, earlier = positions[:, 1:], positions[:, :-1]
    ascending = (later == -1) | ((later > earlier) & (earlier >= 0))
    refuse_rows(
        (positions < -1).any(-1) | ~ascending.all(-1),
        "q_positions must ascend strictly, with unused slots (-1) last",
        lambda row: f"is {np.array2string(positions[row], threshold=8)}",
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(implementation: Implementation, options: AttentionOptions, inputs: AttentionInputs):
    return implementation.forward(options, inputs)


def _attend_forward(implementation, options, inputs):
    outputs = checkpoint_name(implementation.forward(options, inputs), ATTENTION)
    return outputs, (inputs, outputs)


def _attend_backward(implementation, options, residuals, cotangents):
    dq, dk, dv, d_bias = implementation.backward(options, *residuals, *cotangents)
    none: Any = None  # the integers have no cotangent
    return (AttentionInputs(dq, dk, dv, none, d_bias, none, none),)


_attend.defvjp(_attend_forward, _attend_backward)
