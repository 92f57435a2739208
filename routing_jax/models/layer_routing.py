"""Layer routing added to a model that is there already: its routers apart from what is frozen."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from routing_jax.models.config import DecoderConfig
from routing_jax.models.decoder import init_params
from routing_jax.routers import LayerRouterConfig, SparseModeConfig


def with_layer_routing(
    config: DecoderConfig, router: LayerRouterConfig, sparse: SparseModeConfig
) -> DecoderConfig:
    """The model with a router in each of its layers, all of which attend fully now.

    Args:
      config: a model of 'full' layers, as published ones are.
      router: of every layer.
      sparse: what sparse attention is.

    Raises:
      ValueError: a layer that is not 'full'.

    >>> config = DecoderConfig(layers="full*2")
    >>> with_layer_routing(config, LayerRouterConfig(), SparseModeConfig()).layers
    'layer*2'
    """
    if set(config.mixers) != {"full"}:
        raise ValueError(f"model.layers is {config.layers!r}; layer routing needs all 'full'.")
    layers = f"layer*{len(config.mixers)}"
    return config.replace(layers=layers, layer_router=router, sparse=sparse)


def split_routers(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model's parameters as (routers, all others); `merge_routers` puts them together.

    >>> params = {"head": 1, "layers": {"block_0": {"mixer": {"query": 2, "router": {"bias": 3}}}}}
    >>> routers, frozen = split_routers(params)
    >>> routers, merge_routers(frozen, routers) == params
    ({'layers': {'block_0': {'mixer': {'router': {'bias': 3}}}}}, True)
    """
    parts: tuple[dict, dict] = {}, {}
    for path, leaf in flatten_dict(dict(params)).items():
        parts["router" not in path][path] = leaf
    return unflatten_dict(parts[0]), unflatten_dict(parts[1])


def merge_routers(frozen: Mapping[str, Any], routers: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the whole model from its two parts.

    >>> merge_routers({"layers": {"query": 1}}, {"layers": {"router": 2}})
    {'layers': {'query': 1, 'router': 2}}
    """
    return unflatten_dict(flatten_dict(dict(frozen)) | flatten_dict(dict(routers)))


def init_routers(config: DecoderConfig, rng: jax.Array) -> dict[str, Any]:
    """The initial float32 parameters of a model's routers alone; no other is computed.

    Args:
      config: a model with layer routing.
      rng: a PRNG key.

    >>> config = DecoderConfig(width=8, layers="layer*2", head_dim=4, mlp_width=0)
    >>> sorted(init_routers(config, jax.random.key(0)))
    ['layers_0', 'layers_1']
    """
    return jax.jit(lambda key: split_routers(init_params(config, key))[0])(rng)


def layer_gates(intermediates: Mapping[str, Any]) -> jax.Array:
    """The gates that layer routers set, from what a call with mutable 'intermediates' gives.

    Args:
      intermediates: that collection.

    Returns:
      [L,B] float32, 1 for full attention; the order of layers is that of the scan.

    >>> layer_gates({"layers": {"block_0": {"mixer": {"gate": (jnp.ones((2, 3)),)}}}}).shape
    (2, 3)
    """
    found = [
        gate.reshape(-1, gate.shape[-1])
        for path, gates in flatten_dict(dict(intermediates)).items()
        if path[-1] == "gate"
        for gate in gates
    ]
    return jnp.concatenate(found)
