"""How decoding is cut for a Hopper GPU, and which calls it takes."""

import dataclasses

import jax.numpy as jnp

from routing_jax.kernels.block_table import ceil_div
from routing_jax.kernels.decode.implementation import DecodeInputs
from routing_jax.kernels.hopper import WARPGROUP_ROWS

TILE = 64  # keys a step

_HEAD_DIMS = (64, 96, 128, 256)
_MAX_WARPGROUPS = 2
_MULTIPROCESSORS = 132  # of an H100
_SHARED_MEMORY = 225 * 1024  # of a multiprocessor, less what barriers and two programs' starts take
_MOST_STAGES = 8
_LEAST_KEYS_PER_SPLIT = 256  # so that a program's start and the merge stay small beside its keys


@dataclasses.dataclass(frozen=True)
class DecodeTiling:
    """How the kernel cuts its work.

    Attributes:
      stages: steps whose keys and values are in shared memory or on their way.
      splits: programs a row of the page list.
      least_share: pages a split takes before the next one gets any.
    """

    stages: int
    splits: int
    least_share: int


def decode_tiling(
    rows: int, queries: int, head_dim: int, page_size: int, capacity: int
) -> DecodeTiling:
    """The tiling for a call.

    Args:
      rows: page lists to attend to, B·K.
      queries: query rows that share a list, G·T.
      head_dim: H.
      page_size: keys a page.
      capacity: C, slots of a list.

    >>> decode_tiling(rows=8, queries=4, head_dim=128, page_size=128, capacity=64)
    DecodeTiling(stages=3, splits=32, least_share=2)
    """
    warpgroups = ceil_div(queries, WARPGROUP_ROWS)
    query_bytes = 2 * warpgroups * WARPGROUP_ROWS * head_dim
    stage_bytes = 2 * 2 * TILE * head_dim
    # Two programs fit on a multiprocessor if each takes half of its registers and shared memory.
    programs = 2 if warpgroups == 1 and head_dim <= 128 else 1
    room = _SHARED_MEMORY // programs - query_bytes
    least_share = max(1, _LEAST_KEYS_PER_SPLIT // page_size)
    return DecodeTiling(
        stages=min(_MOST_STAGES, room // stage_bytes),
        splits=max(1, min(programs * _MULTIPROCESSORS // rows, ceil_div(capacity, least_share))),
        least_share=least_share,
    )


def shape_refusal(inputs: DecodeInputs) -> str | None:
    """None, or why not even a Hopper GPU runs this call here.

    Args:
      inputs: the call.

    >>> from routing_jax.kernels.decode.pages import PageList
    >>> pool = jnp.ones((1, 16, 1, 64), jnp.bfloat16)
    >>> one = PageList(jnp.array([[1]]), jnp.array([[[0]]]), jnp.array([[[0]]]))
    >>> shape_refusal(DecodeInputs(pool[:, :1], pool, pool, one, jnp.array([9]), None))
    "its page sizes are multiples of 64, and the pool's is 16"
    """
    T, N, H = inputs.q.shape[1:]
    page_size, K = inputs.k_pool.shape[1:3]
    if inputs.q.dtype == jnp.float32:
        return "it computes in float16 and bfloat16, and q has dtype float32"
    if H not in _HEAD_DIMS:
        return f"its head dims are {_HEAD_DIMS}, and q has {H}"
    if page_size % TILE:
        return f"its page sizes are multiples of {TILE}, and the pool's is {page_size}"
    if N // K * T > _MAX_WARPGROUPS * WARPGROUP_ROWS:
        return (
            f"N / K query heads times T queries must be at most {_MAX_WARPGROUPS * WARPGROUP_ROWS} "
            f"rows a kv head, and they are {N // K} times {T}"
        )
    return None
