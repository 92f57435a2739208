"""How attention runs: functions over arrays that know nothing of models."""

from routing_jax.kernels.attention import (
    AttentionImplementation,
    compacted_attention,
    decode_attention,
    default_implementation,
    dense_attention,
)
from routing_jax.kernels.causal_conv import causal_conv
from routing_jax.kernels.compaction import capacity_ladder, compact, map_routed

__all__ = [
    "AttentionImplementation",
    "capacity_ladder",
    "causal_conv",
    "compact",
    "compacted_attention",
    "decode_attention",
    "default_implementation",
    "dense_attention",
    "map_routed",
]
