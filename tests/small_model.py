"""A decoder with every kind of layer, small enough to compile in a moment, and its parameters."""

import functools

import jax
import numpy as np

from routing_jax.models import DecoderConfig, init_params, stack_layers
from routing_jax.routers import TokenRouterConfig

MIXED = DecoderConfig(
    vocab_size=24,
    width=8,
    layers="conv,routed,full",
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_width=12,
    conv_width=3,
    router=TokenRouterConfig(hidden=4, bias=0.0, summary=3),
    dtype="float32",
)


@functools.cache
def make_params(config=MIXED):
    """Parameters whose router scores differ from token to token.

    From numpy, as compiling an initialiser takes longer than the rest of a test.
    """
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        match path[-1].key:
            case "bias":
                return np.zeros_like(noise)
            case "scale":
                return 1 + 0.1 * noise
            case "embedding" | "positions" | "hidden" | "out" if leaf.ndim < 3:
                return noise
            case _:
                return noise / leaf.shape[0] ** 0.5

    unrolled = config.replace(scan=False)
    shapes = jax.eval_shape(lambda: init_params(unrolled, jax.random.key(0)))
    params = jax.tree_util.tree_map_with_path(fill, shapes)
    return jax.device_get(stack_layers(params, config)) if config.scan else params
