"""Attention of a sequence's newest queries over keys and values: a paged pool, or its own cache."""

from routing_jax.kernels.decode.api import block_sparse_decode
from routing_jax.kernels.decode.contiguous import decode_attention, decode_head_runs, whole_pages
from routing_jax.kernels.decode.pages import (
    PageList,
    contiguous_pages,
    dense_pages,
    listed_pages,
    where_pages,
)

__all__ = [
    "PageList",
    "block_sparse_decode",
    "contiguous_pages",
    "decode_attention",
    "decode_head_runs",
    "dense_pages",
    "listed_pages",
    "where_pages",
    "whole_pages",
]
