"""Who decides where attention is worth its cost."""

from routing_jax.routers.budget import Multipliers, ascend, budget_loss, init_multipliers
from routing_jax.routers.gates import Gate, binary_entropy, binary_gate, straight_through
from routing_jax.routers.layer import (
    LayerRouter,
    LayerRouterConfig,
    LayerRouting,
    cooled_temperature,
    pool_queries,
)
from routing_jax.routers.routing import Routing
from routing_jax.routers.token import TokenRouter, TokenRouterConfig, TokenRouting, seen_before

__all__ = [
    "Gate",
    "LayerRouter",
    "LayerRouterConfig",
    "LayerRouting",
    "Multipliers",
    "Routing",
    "TokenRouter",
    "TokenRouterConfig",
    "TokenRouting",
    "ascend",
    "binary_entropy",
    "binary_gate",
    "budget_loss",
    "cooled_temperature",
    "init_multipliers",
    "pool_queries",
    "seen_before",
    "straight_through",
]
