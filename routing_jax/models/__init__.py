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

__all__ = [
    "MIXERS",
    "Decoder",
    "DecoderCache",
    "DecoderConfig",
    "ModelOutput",
    "count_params",
    "init_cache",
    "init_params",
    "make_mixer",
    "parse_layers",
    "repeating_pattern",
    "stack_layers",
    "unstack_layers",
]
