"""Decoding from a contiguous cache: through the kernel that reads pages, or by XLA.

Reshaped, which moves nothing, a cache [B,S,K,H] is a pool of pages, and a page list says which of
its heads are read: `block_sparse_decode` attends to a few heads of a cache that holds more. XLA
copies what it reads of a part of the heads. So a Hopper GPU reads long caches through its kernel.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from routing_jax.kernels.checks import check_dtype, check_head_groups, match_shape
from routing_jax.kernels.decode.api import block_sparse_decode
from routing_jax.kernels.decode.implementation import DecodeInputs
from routing_jax.kernels.decode.mosaic_gpu import MOSAIC_GPU
from routing_jax.kernels.decode.pages import PageList, contiguous_pages, dense_pages
from routing_jax.kernels.padding import pad_axis

CacheImplementation = Literal["xla", "paged", "mosaic_gpu"]

_PAGE = 128  # keys of a page, or the largest power of two that divides the cache
# So many of six heads of 64 are 12 MiB, which XLA reads in about 10 µs: of fewer, a kernel and the
# merge of what its programs find have nothing to save.
_LEAST_KEYS = 8192


def decode_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    lengths: jax.Array,
    *,
    implementation: CacheImplementation | None = None,
) -> jax.Array:
    """Attention of one query a sequence to the first `lengths` entries of its cache.

    Args:
      q: [B,1,N,H].
      keys: [B,S,K,H], the cache; N a multiple of K.
      values: [B,S,K,H].
      lengths: [B] int32, how many cache entries each query sees; 0 gives output 0.
      implementation: 'xla'; 'paged' for `block_sparse_decode`, whatever runs it; 'mosaic_gpu' for
        its kernel on Hopper GPUs; or None for the best one here, which under a mesh
        (`jax.set_mesh`) is XLA: only that is split among devices.

    Returns:
      [B,1,N,H] in q's dtype.

    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: the named implementation does not support the call.

    >>> q = jnp.ones((2, 1, 1, 8)); kv = jnp.ones((2, 6, 1, 8))
    >>> out = decode_attention(q, kv, kv, jnp.array([3, 0]))
    >>> float(out[0, 0, 0, 0]), float(out[1, 0, 0, 0])
    (1.0, 0.0)
    """
    _check(q, keys, values, lengths)
    check_head_groups("keys", q, keys)
    paged = functools.partial(_as_pool, q, keys, values, lengths)
    implementation = implementation or _default(keys.shape[1], paged)
    if implementation != "xla":
        return _attend_to_pages(paged(), implementation)
    mask = jnp.arange(keys.shape[1])[None, :] < jnp.maximum(lengths, 1)[:, None]
    kv = keys.astype(q.dtype), values.astype(q.dtype)
    out = jax.nn.dot_product_attention(q, *kv, mask=mask[:, None, None], implementation="xla")
    return jnp.where((lengths > 0)[:, None, None, None], out, 0)


def whole_pages(length: int) -> int:
    """How long to make a cache of so many keys: what the kernel is to read ends with a page.

    >>> whole_pages(100), whole_pages(10_000)
    (100, 10112)
    """
    return length if length < _LEAST_KEYS else -(-length // _PAGE) * _PAGE


def decode_head_runs(
    queries: Sequence[jax.Array],
    keys: jax.Array,
    values: jax.Array,
    lengths: jax.Array,
    taken: jax.Array,
    kv_heads: Sequence[int],
    *,
    implementation: CacheImplementation | None = None,
) -> list[jax.Array]:
    """`decode_attention` to each of several runs of heads of one cache, where it is taken.

    The kernel attends to all of them in one call, which reads the heads that a sequence takes. XLA
    reads a run as soon as one sequence of the batch takes it.

    Args:
      queries: [B,1,N,H] of each run, its N a multiple of the run's kv heads.
      keys: [B,S,K,H], the cache; run after run, then heads that are not read.
      values: [B,S,K,H].
      lengths: [B] int32.
      taken: [B,E] bool, whether a sequence attends to a run; where not, its output is 0.
      kv_heads: of each of the E runs; K or less in all.
      implementation: as in `decode_attention`.

    Returns:
      [B,1,N,H] of each run.

    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: the named implementation does not support the call.

    >>> queries = jnp.ones((1, 1, 4, 8)), jnp.ones((1, 1, 2, 8))
    >>> kv, taken = jnp.ones((1, 6, 3, 8)), jnp.array([[False, True]])
    >>> outs = decode_head_runs(queries, kv, kv, jnp.array([5]), taken, (2, 1))
    >>> [(out.shape, float(out[0, 0, 0, 0])) for out in outs]
    [((1, 1, 4, 8), 0.0), ((1, 1, 2, 8), 1.0)]
    """
    sizes = match_shape("keys", keys, "BSKH", {})
    B, K = sizes["B"], sizes["K"]
    match_shape("taken", taken, "BE", {"B": B, "E": len(kv_heads)})
    if sum(kv_heads) > K or len(queries) != len(kv_heads):
        raise ValueError(
            f"kv_heads must be one number for each of {len(queries)} queries and at most {K}, the "
            f"heads of keys, in all; they are {tuple(kv_heads)}."
        )
    runs = [slice(end - n, end) for n, end in zip(kv_heads, itertools.accumulate(kv_heads))]
    for own, run in zip(queries, runs):
        _check(own, keys, values, lengths)
        check_head_groups("its run", own, keys[:, :, run])
    paged = functools.partial(_runs_as_pool, queries, keys, values, lengths, taken, kv_heads)
    implementation = implementation or _default(keys.shape[1], paged)
    if implementation != "xla":
        out = _attend_to_pages(paged(), implementation).reshape(B, K, -1, keys.shape[3])
        groups = [own.shape[2] // n for own, n in zip(queries, kv_heads)]
        parts = [out[:, run, :group] for run, group in zip(runs, groups)]
        return [part.reshape(own.shape) for part, own in zip(parts, queries)]

    def read(own: jax.Array, run: slice, lengths: jax.Array) -> jax.Array:
        def attend() -> jax.Array:
            kv = keys[:, :, run], values[:, :, run]
            return decode_attention(own, *kv, lengths, implementation="xla")

        return jax.lax.cond(jnp.any(lengths > 0), attend, lambda: jnp.zeros_like(own))

    lengths_of = jnp.where(taken, lengths[:, None], 0)
    return [read(*part, lengths_of[:, e]) for e, part in enumerate(zip(queries, runs))]


def _check(q: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array) -> None:
    sizes = match_shape("q", q, "BTNH", {"T": 1})
    sizes = match_shape("keys", keys, "BSKH", {"B": sizes["B"], "H": sizes["H"]})
    match_shape("values", values, "BSKH", sizes)
    match_shape("lengths", lengths, "B", sizes)
    check_dtype("lengths", lengths, ("int32",))


def _default(num_keys: int, paged: Callable[[], DecodeInputs]) -> CacheImplementation:
    """What decoding takes when nothing is named."""
    if num_keys >= _LEAST_KEYS and MOSAIC_GPU.refusal(jax.eval_shape(paged)) is None:
        return "mosaic_gpu"
    return "xla"


def _as_pool(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    lengths: jax.Array,
    read: jax.Array | None = None,
) -> DecodeInputs:
    """The call on the cache as a pool; `read` [B,K] says which heads are read, None all."""
    B, S, K, H = keys.shape
    page = math.gcd(S, _PAGE)
    pages = dense_pages(contiguous_pages(B, S // page), lengths, page)
    if read is not None:
        everywhere = (jnp.broadcast_to(x, (B, K, x.shape[2])) for x in (pages.pages, pages.blocks))
        pages = PageList(jnp.where(read, pages.counts, 0), *everywhere)
    k_pool, v_pool = (x.reshape(-1, page, K, H).astype(q.dtype) for x in (keys, values))
    return DecodeInputs(q, k_pool, v_pool, pages, lengths, None)


def _runs_as_pool(queries, keys, values, lengths, taken, kv_heads) -> DecodeInputs:
    """The runs as one call, with as many query heads for each kv head as the largest group has."""
    (B, _, K, H), most = keys.shape, max(q.shape[2] // n for q, n in zip(queries, kv_heads))
    grouped = [q.reshape(B, n, -1, H) for q, n in zip(queries, kv_heads)]
    q = pad_axis(jnp.concatenate([pad_axis(x, 2, most) for x in grouped], axis=1), 1, K)
    read = pad_axis(taken[:, np.repeat(np.arange(len(kv_heads)), kv_heads)], 1, K)
    return _as_pool(q.reshape(B, 1, -1, H), keys, values, lengths, read)


def _attend_to_pages(call: DecodeInputs, implementation: CacheImplementation) -> jax.Array:
    named = None if implementation == "paged" else implementation
    out = block_sparse_decode(*call[:5], implementation=named)
    assert isinstance(out, jax.Array)  # no log-sum-exp was asked for
    return out
