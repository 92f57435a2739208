"""Who decides where attention is worth its cost."""

from routing_jax.routers.budget import Multipliers, ascend, budget_loss, init_multipliers
from routing_jax.routers.gates import (
    Gate,
    binary_entropy,
    binary_gate,
    categorical_gate,
    straight_through,
)
from routing_jax.routers.layer import (
    LayerRouter,
    LayerRouterConfig,
    LayerRouting,
    cooled_temperature,
    pool_queries,
)
from routing_jax.routers.losses import balance_loss
from routing_jax.routers.routing import Routing
from routing_jax.routers.scheme import SchemeRouter, SchemeRouting, SchemesConfig
from routing_jax.routers.token import TokenRouter, TokenRouterConfig, TokenRouting, seen_before

__all__ = [
    "Gate",
    "LayerRouter",
    "LayerRouterConfig",
    "LayerRouting",
    "Multipliers",
    "Routing",
    "SchemeRouter",
    "SchemeRouting",
    "SchemesConfig",
    "TokenRouter",
    "TokenRouterConfig",
    "TokenRouting",
    "ascend",
    "balance_loss",
    "binary_entropy",
    "binary_gate",
    "budget_loss",
    "categorical_gate",
    "cooled_temperature",
    "init_multipliers",
    "pool_queries",
    "seen_before",
    "straight_through",
]
