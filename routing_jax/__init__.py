"""Attention routing in JAX: decide where attention is worth its cost, and skip the rest."""

__version__ = "0.1.0"
