"""Attention of a sequence's newest queries over a paged pool of keys and values."""

from routing_jax.kernels.decode.api import block_sparse_decode
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
    "dense_pages",
    "listed_pages",
    "where_pages",
]
