"""Attention to key blocks chosen at run time."""

from routing_jax.kernels.block_sparse.api import block_sparse_attention

__all__ = ["block_sparse_attention"]
