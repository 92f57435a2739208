"""Attention to key blocks chosen at run time."""

from routing_jax.kernels.block_sparse.api import ATTENTION, block_sparse_attention

__all__ = ["ATTENTION", "block_sparse_attention"]
