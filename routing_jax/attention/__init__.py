"""What runs: the mixers that obey a router, and the dense ones they are compared with."""

from routing_jax.attention.block_routed import (
    BlockMemory,
    BlockRouted,
    block_routed_cost,
    empty_block_memory,
)
from routing_jax.attention.cache import LayerCache, push_history, write_kv
from routing_jax.attention.conv import CausalConv
from routing_jax.attention.full import FullAttention
from routing_jax.attention.layer_routed import (
    LayerMemory,
    LayerRouted,
    Prompts,
    layer_routed_cost,
)
from routing_jax.attention.linear import (
    LinearAttention,
    LinearMemory,
    empty_linear_memory,
    linear_attention,
)
from routing_jax.attention.mixer import LayerReport, Mode, attention_work, visible_pairs
from routing_jax.attention.mixture_of_schemes import MixtureOfSchemes, scheme_cost, scheme_heads
from routing_jax.attention.norm import rms_norm
from routing_jax.attention.projections import HeadsConfig
from routing_jax.attention.routed_conv import RoutedConv, attend_routed, routed_conv_cost

__all__ = [
    "BlockMemory",
    "BlockRouted",
    "CausalConv",
    "FullAttention",
    "HeadsConfig",
    "LayerCache",
    "LayerMemory",
    "LayerReport",
    "LayerRouted",
    "LinearAttention",
    "LinearMemory",
    "MixtureOfSchemes",
    "Mode",
    "Prompts",
    "RoutedConv",
    "attend_routed",
    "attention_work",
    "block_routed_cost",
    "empty_block_memory",
    "empty_linear_memory",
    "layer_routed_cost",
    "linear_attention",
    "push_history",
    "rms_norm",
    "routed_conv_cost",
    "scheme_cost",
    "scheme_heads",
    "visible_pairs",
    "write_kv",
]
