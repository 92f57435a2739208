"""Running a mixer's work on each device's own part of the batch and of the heads."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from routing_jax.attention.projections import AttentionWeights, HeadsConfig
from routing_jax.kernels import BlockTable, block_sparse_attention

# The axes of the one mesh this library uses (DESIGN: `data`, `fsdp`, `tensor`).
_BATCH_AXES = ("data", "fsdp")
_HEAD_AXIS = "tensor"


def over_batch_and_heads(
    fn: Callable[..., Any],
    x: jax.Array,
    positions: jax.Array,
    choice: jax.Array,
    segment_ids: jax.Array | None,
    otherwise: jax.Array,
    weights: AttentionWeights,
    heads: HeadsConfig,
    *,
    split_heads: bool = True,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Calls `fn` under `shard_map` when a mesh is set (`jax.set_mesh`), plainly when none is.

    Data-dependent branches must be taken device by device; the partitioner alone would make them
    global. Heads are split where the mesh's tensor axis divides the key/value heads.

    Args:
      fn: (x, positions, choice, segment_ids, otherwise, weights, total) -> (y [B,T,D], (k, v)
        [B,T,K,H]); `total` sums a per-device part of y over the devices that hold other heads.
      x: [B,T,D].
      positions: [B,T].
      choice: [B,T].
      segment_ids: [B,T] or None.
      otherwise: [B,T,D], what y is to have once in all: 0 on all but one of the devices that hold
        other heads.
      weights: the projections.
      heads: head counts and sizes.
      split_heads: False where `fn` needs all heads on each device.

    Returns:
      What `fn` returns, for the whole batch.

    >>> x, ids, one = jnp.ones((2, 3, 4)), jnp.zeros((2, 3), int), jnp.ones((4, 1, 2))
    >>> weights = AttentionWeights(one, one, one, one.transpose(1, 2, 0))
    >>> def sums(x, positions, choice, segment_ids, otherwise, weights, total):
    ...     values = jnp.einsum("BTD,DKH->BTKH", x, weights.value)
    ...     y = jnp.einsum("BTNH,NHD->BTD", values, weights.out)
    ...     return total(y + otherwise), (values, values)
    >>> over_batch_and_heads(sums, x, ids, ids, None, x, weights, HeadsConfig(1, 1, 2))[0].shape
    (2, 3, 4)
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return fn(x, positions, choice, segment_ids, otherwise, weights, lambda y: y)
    batch, head = _axes_of(mesh, x.shape[0], heads.num_kv_heads)
    head = head if split_heads else None
    into: Any = P(None, head, None)
    out: Any = P(head, None, None)
    bias: Any = P(head, None)
    whole: Any = P()
    split_weights = AttentionWeights(into, into, into, out, bias, bias, bias, whole, whole)

    def total(y: jax.Array) -> jax.Array:
        return jax.lax.psum(y, head) if head else y

    def local(x, positions, choice, segment_ids, otherwise, weights):
        if head:
            first = jax.lax.axis_index(head) == 0
            otherwise = jnp.where(first, otherwise, jnp.zeros_like(otherwise))
        return fn(x, positions, choice, segment_ids, otherwise, weights, total)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(*[P(batch)] * 5, split_weights),
        out_specs=(P(batch), (P(batch, None, head), P(batch, None, head))),
        check_vma=False,  # the branches of lax.switch mix constants with per-device values
    )(x, positions, choice, segment_ids, otherwise, weights)


def block_attention_over_batch_and_heads(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: BlockTable,
    block_bias: jax.Array | None,
    q_positions: jax.Array,
    segment_ids: jax.Array | None,
    implementation: str | None,
) -> jax.Array:
    """`block_sparse_attention` under `shard_map` when a mesh is set, plainly when none is.

    Its loops follow each row's own length, and a Pallas call cannot be partitioned. Heads are
    split where the mesh's tensor axis divides the key/value heads.

    Args:
      q: [B,T,N,H].
      k: [B,S,K,H].
      v: [B,S,K,H].
      table: the listed blocks; its B and K may be 1.
      block_bias: [B,K,M,C] or None; its B and K may be 1.
      q_positions: [B,T] int32.
      segment_ids: [B,S] int32 or None.
      implementation: as `block_sparse_attention` takes it.

    Returns:
      [B,T,N,H].

    >>> from routing_jax.kernels import dense_table
    >>> q, at = jnp.ones((1, 4, 2, 8)), jnp.arange(4)[None]
    >>> table = dense_table(4, 4, block_q=2, block_kv=2)
    >>> block_attention_over_batch_and_heads(q, q, q, table, None, at, None, None).shape
    (1, 4, 2, 8)
    """

    def local(q, k, v, counts, indices, bias, places, segments):
        rows = BlockTable(counts, indices, table.block_q, table.block_kv)
        return block_sparse_attention(
            q,
            k,
            v,
            rows,
            block_bias=bias,
            q_positions=places,
            segment_ids=segments,
            implementation=implementation,
        )

    arrays = q, k, v, table.counts, table.indices, block_bias, q_positions, segment_ids
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(*arrays)
    batch, head = _axes_of(mesh, q.shape[0], k.shape[2])

    def spec(array: jax.Array | None, head_axis: int) -> Any:
        """What is 1 stands for all, and every device has it."""
        if array is None:
            return P()
        axes: list[Any] = [None] * array.ndim
        if array.shape[0] > 1:
            axes[0] = batch
        if 0 < head_axis < array.ndim and array.shape[head_axis] > 1:
            axes[head_axis] = head
        return P(*axes)

    heads_at = (2, 2, 2, 1, 1, 1, 0, 0)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=tuple(spec(array, axis) for array, axis in zip(arrays, heads_at)),
        out_specs=spec(q, 2),
        check_vma=False,  # the loops mix constants with per-device values
    )(*arrays)


def _axes_of(
    mesh: AbstractMesh, batch: int, kv_heads: int
) -> tuple[tuple[str, ...] | None, str | None]:
    """The mesh axes over which sequences and heads are split; None where they do not divide."""
    devices = mesh.shape[_BATCH_AXES[0]] * mesh.shape[_BATCH_AXES[1]]
    others = mesh.shape[_HEAD_AXIS]
    return (
        _BATCH_AXES if batch % devices == 0 else None,
        _HEAD_AXIS if others > 1 and kv_heads % others == 0 else None,
    )
