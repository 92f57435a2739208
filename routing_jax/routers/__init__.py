"""Who decides where attention is worth its cost."""

from routing_jax.routers.gates import (
    Gate,
    binary_entropy,
    binary_gate,
    categorical_gate,
    straight_through,
)
from routing_jax.routers.losses import balance_loss
from routing_jax.routers.routing import Routing
from routing_jax.routers.scheme import SchemeRouter, SchemeRouting, SchemesConfig
from routing_jax.routers.token import TokenRouter, TokenRouterConfig, TokenRouting, seen_before

__all__ = [
    "Gate",
    "Routing",
    "SchemeRouter",
    "SchemeRouting",
    "SchemesConfig",
    "TokenRouter",
    "TokenRouterConfig",
    "TokenRouting",
    "balance_loss",
    "binary_entropy",
    "binary_gate",
    "categorical_gate",
    "seen_before",
    "straight_through",
]
