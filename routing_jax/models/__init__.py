"""A decoder whose layers each choose a mixer."""

from routing_jax.models.config import MIXERS, DecoderConfig, parse_layers, repeating_pattern
from routing_jax.models.decoder import (
    Decoder,
    DecoderCache,
    ModelOutput,
    count_params,
    init_cache,
    init_params,
    make_mixer,
    stack_layers,
    unstack_layers,
)
from routing_jax.models.layer_routing import (
    init_routers,
    layer_gates,
    merge_routers,
    split_routers,
    with_layer_routing,
)

__all__ = [
    "MIXERS",
    "Decoder",
    "DecoderCache",
    "DecoderConfig",
    "ModelOutput",
    "count_params",
    "init_cache",
    "init_params",
    "init_routers",
    "layer_gates",
    "make_mixer",
    "merge_routers",
    "parse_layers",
    "repeating_pattern",
    "split_routers",
    "stack_layers",
    "unstack_layers",
    "with_layer_routing",
]
