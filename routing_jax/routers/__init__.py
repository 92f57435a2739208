"""Who decides where attention is worth its cost."""

from routing_jax.routers.block import (
    BlockRouter,
    BlockRouting,
    KeyBlocks,
    TileQueries,
    block_features,
    block_router_work,
    means_of_sums,
    router_inputs,
    with_weights,
)
from routing_jax.routers.block_budget import (
    competing_blocks,
    row_limits,
    select_blocks,
    select_candidates,
)
from routing_jax.routers.block_config import BlockRouterConfig
from routing_jax.routers.block_scores import (
    assign_clusters,
    block_sums,
    dot_scores,
    pattern_scores,
)
from routing_jax.routers.block_search import (
    search_keys,
    search_scores,
    searchable_blocks,
    slow_channels,
)
from routing_jax.routers.budget import Multipliers, ascend, budget_loss, init_multipliers
from routing_jax.routers.coarse_to_fine import beam_scores, beam_search
from routing_jax.routers.distillation import (
    block_divergence,
    pooled_attention,
    some_tiles,
)
from routing_jax.routers.gates import (
    Gate,
    binary_entropy,
    binary_gate,
    categorical_gate,
    largest,
    straight_through,
)
from routing_jax.routers.layer import (
    LayerRouter,
    LayerRouterConfig,
    LayerRouting,
    cooled_temperature,
    end_tokens,
    pool_queries,
    standardised,
)
from routing_jax.routers.losses import balance_loss
from routing_jax.routers.routing import Routing
from routing_jax.routers.scheme import SchemeRouter, SchemeRouting, SchemesConfig
from routing_jax.routers.sparse_modes import (
    Answers,
    Retrieval,
    SparseMode,
    SparseModeConfig,
    layer_table,
    streaming_table,
)
from routing_jax.routers.token import TokenRouter, TokenRouterConfig, TokenRouting, seen_before

__all__ = [
    "Answers",
    "BlockRouter",
    "BlockRouterConfig",
    "BlockRouting",
    "Gate",
    "KeyBlocks",
    "LayerRouter",
    "LayerRouterConfig",
    "LayerRouting",
    "Multipliers",
    "Retrieval",
    "Routing",
    "SchemeRouter",
    "SchemeRouting",
    "SchemesConfig",
    "SparseMode",
    "SparseModeConfig",
    "TileQueries",
    "TokenRouter",
    "TokenRouterConfig",
    "TokenRouting",
    "ascend",
    "assign_clusters",
    "balance_loss",
    "beam_scores",
    "beam_search",
    "binary_entropy",
    "binary_gate",
    "block_divergence",
    "block_features",
    "block_router_work",
    "block_sums",
    "budget_loss",
    "categorical_gate",
    "competing_blocks",
    "cooled_temperature",
    "dot_scores",
    "end_tokens",
    "init_multipliers",
    "largest",
    "layer_table",
    "means_of_sums",
    "pattern_scores",
    "pool_queries",
    "pooled_attention",
    "router_inputs",
    "row_limits",
    "search_keys",
    "search_scores",
    "searchable_blocks",
    "seen_before",
    "select_blocks",
    "select_candidates",
    "slow_channels",
    "some_tiles",
    "standardised",
    "straight_through",
    "streaming_table",
    "with_weights",
]
