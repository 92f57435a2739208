"""Log-sum-exp of a query's logits over each block of keys: by what blocks are searched for."""

from routing_jax.kernels.block_lse.api import IMPLEMENTATIONS, block_logsumexp

__all__ = ["IMPLEMENTATIONS", "block_logsumexp"]
