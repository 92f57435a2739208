"""Who decides where attention is worth its cost."""

from routing_jax.routers.gates import Gate, binary_entropy, binary_gate, straight_through
from routing_jax.routers.routing import Routing
from routing_jax.routers.token import TokenRouter, TokenRouterConfig, TokenRouting, seen_before

__all__ = [
    "Gate",
    "Routing",
    "TokenRouter",
    "TokenRouterConfig",
    "TokenRouting",
    "binary_entropy",
    "binary_gate",
    "seen_before",
    "straight_through",
]
