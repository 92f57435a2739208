"""Programs for TPUs, as functions and the shapes of what they take: ours and jax's splash.

Importing Mosaic takes seconds: what needs it does so late.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from routing_jax.kernels import BlockTable, dense_table
from routing_jax.kernels.block_sparse.implementation import (
    AttentionGradients,
    AttentionInputs,
    AttentionOptions,
    AttentionOutputs,
)
from routing_jax.kernels.decode.implementation import DecodeInputs
from routing_jax.kernels.decode.pages import PageList

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


class TpuCase(NamedTuple):
    """One program to compile, causal.

    Attributes:
      topology: the chips it is for, such as 'v5e:2x2'.
      program: the forward or the backward pass of block-sparse attention, splash's forward, or
        decoding, one query a sequence and, with extras, four.
      length: T = S; when decoding, the keys of each sequence.
      head_dim: H.
      num_heads: N.
      num_kv_heads: K.
      batch: B.
      block: queries a tile and keys a block of the table; keys a page.
      capacity: slots of a table row; 0 for a table of dense rows, or one list of every page.
      extras: whether the call has a bias (if rows list blocks), positions and segments.
      dtype: of q, k and v.
      tiles: splash's block_q, block_kv and block_kv_compute.
      mesh: over how many chips (batch, kv heads) are split; None for one chip.
    """

    topology: str
    program: Literal["forward", "backward", "splash", "decode"]
    length: int
    head_dim: int
    num_heads: int = 4
    num_kv_heads: int = 1
    batch: int = 1
    block: int = 128
    capacity: int = 0
    extras: bool = False
    dtype: str = "bfloat16"
    tiles: tuple[int, int, int] = (0, 0, 0)
    mesh: tuple[int, int] | None = None


class Program(NamedTuple):
    """A function to compile, over a mesh with axes 'batch' and 'heads'.

    Attributes:
      function: of arrays.
      arguments: their shapes.
      in_specs: how they are split.
      out_specs: how its results are.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    in_specs: Any
    out_specs: Any


_BY_HEAD: Any = P("batch", None, "heads")


def _shape(dimensions: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(dimensions, dtype)


def _table(case: TpuCase) -> BlockTable:
    """The shapes of the case's table, a row for each sequence, kv head and tile."""
    B, K, T, block = case.batch, case.num_kv_heads, case.length, case.block
    if case.capacity == 0:
        return jax.eval_shape(functools.partial(dense_table, T, T, block_q=block, block_kv=block))
    M = -(-T // block)
    counts = _shape((B, K, M), jnp.int32)
    indices = _shape((B, K, M, case.capacity), jnp.int32)
    return BlockTable(counts, indices, block, block)


def attention_inputs(case: TpuCase) -> tuple[AttentionOptions, AttentionInputs]:
    """One call of block-sparse attention, in shapes.

    >>> attention_inputs(TpuCase("v5e:2x2", "forward", 1024, 64))[1].q.shape
    (1, 1024, 4, 64)
    """
    B, T, N, K, H = case.batch, case.length, case.num_heads, case.num_kv_heads, case.head_dim
    q = _shape((B, T, N, H), case.dtype)
    k = _shape((B, T, K, H), case.dtype)
    table = _table(case)
    bias = ids = None
    if case.extras:
        ids = _shape((B, T), jnp.int32)
        if case.capacity:
            bias = _shape(table.indices.shape, jnp.float32)
    options = AttentionOptions(causal=True, scale=H**-0.5)
    return options, AttentionInputs(q, k, k, table, bias, ids, ids)


def _specs(inputs: AttentionInputs) -> AttentionInputs:
    """How a call is split: everything by sequence, and by kv head what has heads."""
    row: Any = P("batch", "heads") if inputs.table.counts.shape[0] > 1 else P()
    bias = None if inputs.block_bias is None else row
    ids: Any = None if inputs.q_positions is None else P("batch")
    table = jax.tree.map(lambda _: row, inputs.table)
    return AttentionInputs(_BY_HEAD, _BY_HEAD, _BY_HEAD, table, bias, ids, ids)


def _block_sparse(case: TpuCase) -> Program:
    from routing_jax.kernels.block_sparse.mosaic_tpu.backward import backward
    from routing_jax.kernels.block_sparse.mosaic_tpu.call import unsupported
    from routing_jax.kernels.block_sparse.mosaic_tpu.forward import forward

    options, inputs = attention_inputs(case)
    if refused := unsupported(options, inputs):
        raise NotImplementedError(refused)
    specs = _specs(inputs)
    if case.program == "forward":
        run = functools.partial(forward, options)
        return Program(run, (inputs,), (specs,), AttentionOutputs(_BY_HEAD, _BY_HEAD))
    lse = _shape(inputs.q.shape[:3], jnp.float32)
    return Program(
        functools.partial(backward, options),
        (inputs, AttentionOutputs(inputs.q, lse), inputs.q, lse),
        (specs, AttentionOutputs(_BY_HEAD, _BY_HEAD), _BY_HEAD, _BY_HEAD),
        AttentionGradients(_BY_HEAD, _BY_HEAD, _BY_HEAD, specs.block_bias),
    )


def _decode(case: TpuCase) -> Program:
    from routing_jax.kernels.decode.mosaic_tpu.call import run_on_tpu
    from routing_jax.kernels.decode.mosaic_tpu.tiling import shape_refusal

    B, K, H, size = case.batch, case.num_kv_heads, case.head_dim, case.block
    pages = -(-case.length // size)
    rows, C = (B, K if case.capacity else 1), case.capacity or pages
    pool = _shape((B * pages, size, K, H), case.dtype)
    inputs = DecodeInputs(
        _shape((B, 4 if case.extras else 1, case.num_heads, H), case.dtype),
        pool,
        pool,
        PageList(_shape(rows, jnp.int32), *[_shape((*rows, C), jnp.int32)] * 2),
        _shape((B,), jnp.int32),
        _shape((B, K, C), jnp.float32) if case.extras else None,
    )
    if refused := shape_refusal(inputs):
        raise NotImplementedError(refused)
    row: Any = P("batch", "heads") if case.capacity else P("batch")
    by_head: Any = P(None, None, "heads")
    lengths: Any = P("batch")
    bias: Any = P("batch", "heads") if case.extras else None
    specs = DecodeInputs(_BY_HEAD, by_head, by_head, PageList(row, row, row), lengths, bias)
    run = functools.partial(run_on_tpu, H**-0.5)
    return Program(run, (inputs,), (specs,), (_BY_HEAD, _BY_HEAD))


def splash_call(case: TpuCase) -> Any:
    """Splash attention of one kv head and the query heads of its group, for the case's tiles."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

    mask = splash_attention_mask.CausalMask((case.length, case.length))
    masks = splash_attention_mask.MultiHeadMask([mask] * (case.num_heads // case.num_kv_heads))
    return splash.make_splash_mqa(
        masks,
        block_sizes=splash.BlockSizes(*case.tiles),
        head_shards=1,
        q_seq_shards=1,
        save_residuals=True,  # the log-sum-exp, which ours returns too
    )


def _splash(case: TpuCase) -> Program:
    _, inputs = attention_inputs(case)
    call = splash_call(case)
    B, T, N, K, H = *inputs.q.shape[:3], case.num_kv_heads, case.head_dim

    def run(q, k, v):
        q = q.transpose(0, 2, 1, 3).reshape(B, K, N // K, T, H) * jnp.asarray(H**-0.5, q.dtype)
        out, (lse,) = jax.vmap(jax.vmap(call))(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))
        out = out.reshape(B, N, T, H).transpose(0, 2, 1, 3)
        return out, lse.reshape(B, N, T).transpose(0, 2, 1)

    return Program(run, (inputs.q, inputs.k, inputs.v), (_BY_HEAD,) * 3, (_BY_HEAD,) * 2)


def program(case: TpuCase) -> Program:
    """What to compile for a case.

    Args:
      case: see `TpuCase`.

    Raises:
      NotImplementedError: the TPU kernels do not take the call.

    >>> program(TpuCase("v5e:2x2", "forward", 1024, 64)).arguments[0].table.counts.shape
    (1, 1, 8)
    """
    programs = {"splash": _splash, "decode": _decode}
    return programs.get(case.program, _block_sparse)(case)
