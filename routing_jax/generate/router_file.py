"""Layer routers and their files: what a trainer writes and serving reads."""

import dataclasses
import os
from typing import Any, NamedTuple

from routing_jax.generate.prefill import Routers
from routing_jax.models.pretrained import load_router, save_router
from routing_jax.routers import LayerRouterConfig, SparseModeConfig


class RoutedBy(NamedTuple):
    """What decides a model's layers, and what the sparse ones attend to.

    Attributes:
      routers: of the layers.
      sparse: the mode that they were trained with.
    """

    routers: Routers
    sparse: SparseModeConfig


def save_layer_routers(
    path: str | os.PathLike[str], routed_by: RoutedBy, base: str | os.PathLike[str]
) -> None:
    """Writes the routers of all layers into one file, for this base model only.

    Args:
      path: where to.
      routed_by: what is written.
      base: the checkpoint that they were trained for.

    Raises:
      ValueError: `base` holds no weights.
      OSError: it can't be written.
    """
    routers, sparse = routed_by
    params = {f"layers_{i}": layer for i, layer in enumerate(routers.params)}
    settings = {"router": dataclasses.asdict(routers.config), "sparse": dataclasses.asdict(sparse)}
    save_router(path, params, base, settings)


def load_layer_routers(
    path: str | os.PathLike[str], base: str | os.PathLike[str], layers: int
) -> RoutedBy:
    """Reads the routers of all layers of this very model.

    Args:
      path: a file of `save_layer_routers`.
      base: the checkpoint that they shall run in.
      layers: L, of the model.

    Raises:
      ValueError: the file is damaged, belongs to another model, or holds other routers.
    """
    params, settings = load_router(path, base)
    names = [f"layers_{i}" for i in range(layers)]
    if sorted(params) != sorted(names) or sorted(settings) != ["router", "sparse"]:
        raise ValueError(f"{path} holds no layer routers for a model of {layers} layers.")
    # Whoever runs them knows the device: the kernel of training is not part of what was learned.
    sparse: dict[str, Any] = settings["sparse"] | {"implementation": None}
    return RoutedBy(
        Routers(LayerRouterConfig(**settings["router"]), [params[name] for name in names]),
        SparseModeConfig(**sparse),
    )
