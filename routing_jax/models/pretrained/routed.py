"""A published model with trained layer routers: how they are saved, and how both are loaded."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from routing_jax.models.config import DecoderConfig
from routing_jax.models.decoder import stack_layers, unstack_layers
from routing_jax.models.layer_routing import init_routers, merge_routers, with_layer_routing
from routing_jax.models.pretrained.load import Pretrained, load_pretrained
from routing_jax.models.pretrained.router_file import load_router, save_router
from routing_jax.routers import LayerRouterConfig, SparseModeConfig


def save_routers(
    path: str | os.PathLike[str],
    routers: Mapping[str, Any],
    base: str | os.PathLike[str],
    config: DecoderConfig,
) -> None:
    """Writes the trained routers of a model to a router file.

    Args:
      path: where to; its folder must be there.
      routers: as `split_routers` gives them.
      base: the checkpoint that they were trained for.
      config: the routed model, with its layer_router and sparse.

    Raises:
      ValueError: `base` holds no weights.
      OSError: it can't be written; the file is named.

    >>> save_routers("r.safetensors", {}, "nowhere", DecoderConfig())
    Traceback (most recent call last):
    FileNotFoundError: ...
    """
    if config.scan:
        routers = unstack_layers(dict(routers), config)
    parts = {name: dataclasses.asdict(getattr(config, name)) for name in ("layer_router", "sparse")}
    save_router(path, routers, base, parts)


def load_routed(
    router: str | os.PathLike[str], base: str | os.PathLike[str], **options: Any
) -> Pretrained:
    """Loads a published model and the routers that were trained for it.

    Args:
      router: a file of `save_routers`.
      base: the model's folder or GGUF file.
      **options: as `load_pretrained` takes them.

    Raises:
      ValueError: what `load_router` and `load_pretrained` refuse, routers with other parameters
        than those of this version, and routers that were trained with learned weights of a search.

    >>> load_routed("nowhere.safetensors", "a.gguf")
    Traceback (most recent call last):
    ValueError: nowhere.safetensors is no whole router file: No such file or directory.
    """
    saved = load_router(router, base)
    try:
        sparse = saved.config["sparse"]
        if sparse.get("taught") or any("search" in path for path in flatten_dict(saved.params)):
            raise ValueError(
                f"{router} was trained with learned weights of a search, which this version has "
                "not; train its routers anew."
            )
        parts = (
            LayerRouterConfig(**saved.config["layer_router"]),
            SparseModeConfig.from_saved(sparse),
        )
    except (KeyError, TypeError) as e:
        raise ValueError(f"{router} was written by another version: {e}.") from e
    model = load_pretrained(base, **options)
    config = with_layer_routing(model.config, *parts)
    found, wanted = _sizes(saved.params), _sizes(_expected(config))
    if found != wanted:
        name = min(path for path in found | wanted if found.get(path) != wanted.get(path))
        raise ValueError(
            f"{router} was written by another version: {name} has the shape {found.get(name)}; it "
            f"must be {wanted.get(name)}."
        )
    routers = jax.tree.map(jnp.asarray, saved.params)
    if config.scan:
        routers = stack_layers(routers, config)
    return Pretrained(config, merge_routers(model.params, routers))


def _expected(config: DecoderConfig) -> dict[str, Any]:
    """Routers as they are saved, without values; all layers are like one, which is traced alone."""
    one = config.replace(layers="layer", scan=False)
    (layer,) = jax.eval_shape(lambda: init_routers(one, jax.random.key(0))).values()
    return {f"layers_{i}": layer for i in range(len(config.mixers))}


def _sizes(routers: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flatten_dict(dict(routers), sep="/").items()}
