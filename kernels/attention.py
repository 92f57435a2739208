"""Dense and compacted-query attention over arrays.

Dense attention is `jax.nn.dot_product_attention`: cuDNN where it can (bfloat16 or float16 on an
NVIDIA GPU), elsewhere XLA, in pieces small enough that no T×S array of logits is ever held at
once. Compacted queries take the same way with a mask or, on Hopper and among many keys, the
block-sparse kernel, which splits their keys among programs so that a few queries fill the chip.
"""

import itertools
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from routing_jax.kernels.block_patterns import dense_table
from routing_jax.kernels.block_sparse.api import block_sparse_attention
from routing_jax.kernels.dropout import draw_kept, drop
from routing_jax.kernels.hopper import hopper_refusal
from routing_jax.kernels.products import float32_product

AttentionImplementation = Literal["xla", "cudnn"]
CompactedImplementation = Literal["xla", "cudnn", "mosaic_gpu"]

# XLA holds the logits of one piece: rows × S × N float32. 2^24 of them are 64 MiB.
_LOGITS_PER_PIECE = 1 << 24
# Query groups that see a growing prefix of the keys: 8 groups do 56 % of the square, where the
# causal half is 50 %.
_CAUSAL_GROUPS = 8
_BLOCK = 128  # keys of a block; queries of a tile unless half as many hold them all
# Among fewer keys the block-sparse kernel takes longer to compile than it ever saves.
_LEAST_KEYS = 8192
_WIDEST_HEAD = 256  # of the block-sparse kernel


def _check(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    chex.assert_rank([q, k, v], 4)
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape [B,S,K,H]; k is {k.shape}, v is {v.shape}.")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q [B,T,N,H] and k [B,S,K,H] must share B and H; {q.shape} vs {k.shape}.")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} heads, which is not a multiple of k's {k.shape[2]} heads."
        )


def default_implementation(dtype: jnp.dtype) -> AttentionImplementation:
    """The attention backend used when none is named: cuDNN for 16-bit floats on a GPU.

    Args:
      dtype: the dtype of queries, keys and values.

    >>> default_implementation(jnp.dtype("float32"))
    'xla'
    """
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    return "cudnn" if half and jax.default_backend() == "gpu" else "xla"


def _default_compacted(q: jax.Array, num_keys: int) -> CompactedImplementation:
    """What compacted queries take when nothing is named."""
    implementation = default_implementation(q.dtype)
    worth_it = implementation == "cudnn" and num_keys >= _LEAST_KEYS
    if worth_it and q.shape[3] <= _WIDEST_HEAD and hopper_refusal() is None:
        return "mosaic_gpu"
    return implementation


def _attend(q, k, v, mask, implementation, causal=False):
    """One call of the library attention; `mask` broadcasts to [B,N,T,S]."""
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=causal, implementation=implementation
    )


def _attend_rows(q, k, v, q_positions, k_positions, q_segments, k_segments):
    """XLA attention with positions and segments, a few query rows at a time."""
    rows = max(8, _LOGITS_PER_PIECE // (k.shape[1] * q.shape[2] * q.shape[0]))
    T = q.shape[1]

    @jax.checkpoint  # the backward pass recomputes a piece's logits instead of keeping them
    def piece(args):
        q, q_positions, q_segments = args
        mask = q_positions[:, :, None] >= k_positions[:, None, :]
        if q_segments is not None:
            mask &= q_segments[:, :, None] == k_segments[:, None, :]
        return _attend(q, k, v, mask[:, None], "xla")

    if rows >= T:
        return piece((q, q_positions, q_segments))
    pieces = -(-T // rows)
    pad = pieces * rows - T

    def split(x):  # [B,T,...] -> [pieces,B,rows,...]
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], pieces, rows, *x.shape[2:]), 1, 0)

    out = jax.lax.map(piece, jax.tree.map(split, (q, q_positions, q_segments)))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], pieces * rows, *q.shape[2:])[:, :T]


def _attend_with_dropout(q, k, v, segment_ids, rate, rng):
    """Causal attention whose weights are dropped at random, which the library call cannot do."""
    B, T, N, H = q.shape
    K = k.shape[2]
    mask = jnp.tri(T, dtype=bool)[None]
    if segment_ids is not None:
        mask &= segment_ids[:, :, None] == segment_ids[:, None, :]

    # The backward pass makes the softmax again from the logits, which it reads in any case: a sum
    # that is kept for it takes XLA a pass of its own over them.
    @jax.checkpoint
    def weigh(logits: jax.Array, kept: jax.Array) -> jax.Array:
        logits = jnp.where(mask[:, None, None], logits * H**-0.5, -jnp.inf)
        return drop(jax.nn.softmax(logits, axis=-1), kept, rate).astype(v.dtype)

    # Keys end up last in memory too: a softmax along columns takes XLA more passes.
    grouped = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    logits = float32_product("BKGTH,BSKH->BKGTS", grouped, k)
    weights = weigh(logits, draw_kept(logits.shape, rate, rng))
    out = jnp.einsum("BKGTS,BSKH->BKGTH", weights, v)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def dense_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    implementation: AttentionImplementation | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
) -> jax.Array:
    """Causal softmax attention of every query to all earlier keys, scaled by 1/√H.

    Args:
      q: [B,T,N,H].
      k: [B,T,K,H], N a multiple of K (grouped-query attention).
      v: [B,T,K,H].
      segment_ids: [B,T] int32; a query attends only within its segment.
      implementation: 'cudnn', 'xla', or None for the best one here.
      dropout_rate: of the attention weights, where `dropout_rng` is given; all T×S of them are
        then held at once, whatever the implementation.
      dropout_rng: a PRNG key, or None for no dropout.

    Returns:
      [B,T,N,H], in q's dtype.

    Raises:
      ValueError: shapes that do not fit together.

    >>> q = jnp.ones((1, 4, 2, 8)); kv = jnp.ones((1, 4, 1, 8))
    >>> dense_attention(q, kv, kv).shape
    (1, 4, 2, 8)
    """
    _check(q, k, v)
    B, T, N, _ = q.shape
    if k.shape[1] != T:
        raise ValueError(f"dense_attention needs T = S; q has T={T}, k has S={k.shape[1]}.")
    if dropout_rate and dropout_rng is not None:
        return _attend_with_dropout(q, k, v, segment_ids, dropout_rate, dropout_rng)
    small = B * N * T * T <= _LOGITS_PER_PIECE
    # A flash kernel has nothing to save on logits this small, and handles tiny T badly.
    implementation = implementation or ("xla" if small else default_implementation(q.dtype))
    if implementation == "cudnn" or small:
        mask = None
        if segment_ids is not None:
            mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
        return _attend(q, k, v, mask, implementation, causal=True)

    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    edges = [T * i // _CAUSAL_GROUPS for i in range(_CAUSAL_GROUPS + 1)]
    return jnp.concatenate(
        [
            _attend_rows(
                q[:, lo:hi],
                k[:, :hi],
                v[:, :hi],
                positions[:, lo:hi],
                positions[:, :hi],
                None if segment_ids is None else segment_ids[:, lo:hi],
                None if segment_ids is None else segment_ids[:, :hi],
            )
            for lo, hi in itertools.pairwise(edges)
            if hi > lo
        ],
        axis=1,
    )


def compacted_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    implementation: CompactedImplementation | None = None,
) -> jax.Array:
    """Causal attention for a few chosen queries of a sequence, work C·S instead of T·S.

    Args:
      q: [B,C,N,H], the chosen queries.
      k: [B,S,K,H], the keys of the whole sequence.
      v: [B,S,K,H].
      q_positions: [B,C] int32, each query's place in the sequence, ascending; unused slots come
        last and hold −1.
      segment_ids: [B,S] int32; a query attends only within its segment.
      implementation: 'cudnn', 'xla', 'mosaic_gpu' for the block-sparse kernel on a Hopper GPU, or
        None for the best one here.

    Returns:
      [B,C,N,H] in q's dtype; unused slots are 0.

    Raises:
      ValueError: shapes that do not fit together.

    >>> q = jnp.ones((1, 2, 1, 8)); kv = jnp.ones((1, 6, 1, 8))
    >>> out = compacted_attention(q, kv, kv, jnp.array([[3, -1]]))
    >>> float(out[0, 0, 0, 0]), float(out[0, 1, 0, 0])
    (1.0, 0.0)
    """
    _check(q, k, v)
    chex.assert_shape(q_positions, q.shape[:2])
    B, S = k.shape[:2]
    implementation = implementation or _default_compacted(q, S)
    if implementation == "mosaic_gpu":
        block_q = _BLOCK if q.shape[1] > _BLOCK // 2 else _BLOCK // 2
        table = dense_table(q.shape[1], S, block_q=block_q, block_kv=_BLOCK)
        out = block_sparse_attention(
            q, k, v, table,
            q_positions=q_positions, segment_ids=segment_ids, implementation=implementation,
        )  # fmt: skip
        assert isinstance(out, jax.Array)  # no log-sum-exp was asked for
        return out
    used = q_positions >= 0
    # An unused slot looks at key 0 only, so that no softmax runs over nothing; it is zeroed below.
    visible_to = jnp.where(used, q_positions, 0)
    k_positions = jnp.broadcast_to(jnp.arange(S, dtype=q_positions.dtype), (B, S))
    q_segments = None
    if segment_ids is not None:
        q_segments = jnp.take_along_axis(segment_ids, visible_to, axis=1)
    if implementation == "cudnn":
        mask = visible_to[:, :, None] >= k_positions[:, None, :]
        if segment_ids is not None and q_segments is not None:
            mask &= q_segments[:, :, None] == segment_ids[:, None, :]
        out = _attend(q, k, v, mask[:, None], "cudnn")
    else:
        out = _attend_rows(q, k, v, visible_to, k_positions, q_segments, segment_ids)
    return jnp.where(used[:, :, None, None], out, 0)
