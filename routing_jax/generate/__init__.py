"""Prefill and decode: from a contiguous cache, or from paged memory that routed layers share."""

from routing_jax.generate.config import ServingConfig
from routing_jax.generate.contiguous import decode_step, generate, prefill
from routing_jax.generate.engine import Engine, Made, Request, TooFewPagesError
from routing_jax.generate.paged_prefill import DENSE, ROUTED, SPARSE
from routing_jax.generate.text import TextModel

__all__ = [
    "DENSE",
    "ROUTED",
    "SPARSE",
    "Engine",
    "Made",
    "Request",
    "ServingConfig",
    "TextModel",
    "TooFewPagesError",
    "decode_step",
    "generate",
    "prefill",
]
