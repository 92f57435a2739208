"""How decoding is cut for a TPU, and which calls it takes."""

import dataclasses

import jax.numpy as jnp

from routing_jax.kernels.block_table import ceil_div
from routing_jax.kernels.decode.implementation import DecodeInputs
from routing_jax.kernels.tpu import LANES, tpu_refusal

_PAGE_SIZES = (16, 32, 64, 128, 256, 512)
_HEAD_DIM = 256
_KV_HEADS = 128
_STEP_KEYS = 1024
_SCALARS = 2**19  # bytes of scalar memory for lists, half of the least that a chip has
_VECTORS = 40 * 2**20  # of vector memory, of the 64 MiB that the smallest of the chips has
_RING = 8 * 2**20


@dataclasses.dataclass(frozen=True)
class DecodeTiling:
    """How the kernel cuts its work.

    Attributes:
      pages: pages a step.
      stages: steps whose keys and values are in vector memory or on their way.
      slots: slots of a list that a program reads; longer lists take several, merged afterwards.
      rows: query rows a kv head, padded.
    """

    pages: int
    stages: int
    slots: int
    rows: int


def decode_tiling(inputs: DecodeInputs, cores: int = 1) -> DecodeTiling:
    """The tiling for a call.

    A step of 1,024 keys takes about 780 bundles of the compiler's schedule (bfloat16, head dim 128,
    for v5e; 1,000 in two steps of 512), of which 25 begin the copies of each page: on a v5e a third
    of the time in which its keys and values arrive. The ring has room for 4 to 8 MiB, so 3 MiB or
    more are under way; a tpu7x core gets 3.7 MB/µs, and a copy takes about a microsecond to begin.

    Args:
      inputs: the call.
      cores: of the chip, if it deals programs out to them; they share a sequence that is alone.

    >>> from routing_jax.kernels.decode.pages import PageList
    >>> pool, rows = jnp.ones((9, 128, 8, 128), jnp.bfloat16), jnp.ones((1, 8, 64), jnp.int32)
    >>> pages = PageList(rows[..., 0], rows, rows)
    >>> decode_tiling(DecodeInputs(pool[:1, :1], pool, pool, pages, jnp.array([9]), None))
    DecodeTiling(pages=8, stages=8, slots=64, rows=16)
    """
    B, T, N, H = inputs.q.shape
    page_size, K = inputs.k_pool.shape[1:3]
    capacity = inputs.pages.pages.shape[2]
    pages = max(1, _STEP_KEYS // page_size)
    step = 2 * 4 * pages * page_size * max(H, LANES)  # as if of 32 bits, which pairs of heads are
    slots = _SCALARS // (2 * 4 * _list_rows(inputs)) // LANES  # two programs' lists
    if cores > B:
        slots = min(slots, ceil_div(capacity, cores * LANES))
    whole = 32 // inputs.q.dtype.itemsize  # rows of a tile of memory
    return DecodeTiling(
        pages=pages,
        stages=max(2, _RING // step),
        slots=min(capacity, slots * LANES),
        rows=ceil_div(N // K * T, whole) * whole,
    )


def refusal(inputs: DecodeInputs) -> str | None:
    """Why the TPU kernel does not run this call here; None if it does."""
    return shape_refusal(inputs) or tpu_refusal()


def shape_refusal(inputs: DecodeInputs) -> str | None:
    """Why no TPU runs this call; None if TPUs do.

    Args:
      inputs: the call.

    >>> from routing_jax.kernels.decode.pages import PageList
    >>> pool = jnp.ones((1, 8, 1, 64), jnp.bfloat16)
    >>> one = PageList(jnp.array([[1]]), jnp.array([[[0]]]), jnp.array([[[0]]]))
    >>> shape_refusal(DecodeInputs(pool[:, :1], pool, pool, one, jnp.array([9]), None))
    "its page sizes are (16, 32, 64, 128, 256, 512), and the pool's is 8"
    """
    H, page_size = inputs.q.shape[3], inputs.k_pool.shape[1]
    if inputs.q.dtype == jnp.float16:
        return "it computes in bfloat16 and float32, and q has dtype float16"
    if H > _HEAD_DIM:
        return f"it takes head dims up to {_HEAD_DIM}, and q has {H}"
    if page_size not in _PAGE_SIZES:
        return f"its page sizes are {_PAGE_SIZES}, and the pool's is {page_size}"
    if inputs.k_pool.shape[2] > _KV_HEADS:
        return f"it takes up to {_KV_HEADS} kv heads, and the pool has {inputs.k_pool.shape[2]}"
    needed = vector_memory(inputs, decode_tiling(inputs))
    if needed > _VECTORS:
        return (
            f"it holds all queries of a sequence in {_VECTORS >> 20} MiB, and this call needs "
            f"{ceil_div(needed, 2**20)} MiB"
        )
    return None


def _list_rows(inputs: DecodeInputs) -> int:
    """Rows of scalar memory: pages and blocks of each list, and the bias of each head."""
    rows = 2 * ceil_div(inputs.pages.pages.shape[1], 8) * 8
    return rows if inputs.block_bias is None else rows + ceil_div(inputs.k_pool.shape[2], 8) * 8


def vector_memory(inputs: DecodeInputs, tiling: DecodeTiling) -> int:
    """An upper estimate of the bytes of vector memory: queries, results, ring, sums, logits.

    Args:
      inputs: the call.
      tiling: its tiling.
    """
    K, H = inputs.k_pool.shape[2], max(inputs.q.shape[3], LANES)
    keys = tiling.pages * inputs.k_pool.shape[1]
    rows = 2 * K * tiling.rows * (2 * H + LANES) * 4
    ring = 2 * tiling.stages * keys * H * 4
    step = 2 * tiling.rows * (H + 2 * LANES) * 4 + 4 * keys * (tiling.rows + H) * 4
    return rows + ring + step
