"""How far block-routed attention is from dense attention of a trained model, as contexts grow."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from routing_jax.attention import BlockRouted, FullAttention, HeadsConfig
from routing_jax.evals.mixing_time import mixer_inputs
from routing_jax.models import DecoderConfig
from routing_jax.routers import BlockRouterConfig

Row = dict[str, Any]


def _router_params(router: BlockRouterConfig, trained: Mapping[str, Any]) -> Mapping[str, Any]:
    """The trained ones for 'indexer', random ones of their shapes for 'random', or none."""
    if router.kind == "indexer":
        return trained
    if router.kind != "random":
        return {}
    keys = jax.random.split(jax.random.key(0), len(trained))
    return {
        name: jax.random.normal(key, trained[name].shape) * trained[name].shape[0] ** -0.5
        for key, name in zip(keys, trained)
    }


@functools.partial(jax.jit, static_argnums=(0, 1))
def _layer_errors(
    heads: HeadsConfig, routers: tuple[BlockRouterConfig, ...], layers: Any
) -> tuple[jax.Array, jax.Array]:
    """‖routed − dense‖ ÷ ‖dense‖ and cost, [layers, routers], from stacked parameters and inputs.

    All routers are one program, which is compiled in a fraction of the time.
    """

    def one(layer: tuple[Any, jax.Array]) -> tuple[jax.Array, jax.Array]:
        params, x = layer
        positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        weights = {name: leaf for name, leaf in params.items() if name != "router"}
        dense: Any = FullAttention(heads).apply({"params": weights}, x, positions)
        want = dense[0].astype(jnp.float32)
        errors, costs = [], []
        for router in routers:
            own = weights | {"router": _router_params(router, params["router"])}
            routed: Any = BlockRouted(heads, router).apply({"params": own}, x, positions)
            errors.append(jnp.linalg.norm(routed[0].astype(jnp.float32) - want))
            costs.append(routed[2].cost)
        return jnp.stack(errors) / jnp.linalg.norm(want), jnp.stack(costs)

    return jax.lax.map(one, layers)


def attention_errors(
    config: DecoderConfig,
    params: Any,
    tokens: Any,
    routers: Mapping[str, BlockRouterConfig],
    lengths: Sequence[int],
) -> list[Row]:
    """Error of each router in every block layer, on the inputs that dense attention leads to.

    Args:
      config: a model whose 'block' layers were trained with kind 'indexer'; it attends as it was
        trained to, so that only the layer compared is routed.
      params: its parameters.
      tokens: [B,T] int32, at least as long as the longest of `lengths`.
      routers: name → router; of kind 'indexer', 'random', 'pooled' or a fixed pattern.
      lengths: how many of the tokens are read.

    Returns:
      A row a router and length: router, length, error, ‖routed − dense‖ ÷ ‖dense‖ of what the layer
      adds, and cost, both means over layers.

    >>> from routing_jax.models import init_params
    >>> blocks = BlockRouterConfig(kind="indexer", fraction=1.0, block_q=8, block_kv=8)
    >>> config = DecoderConfig(width=8, head_dim=8, mlp_width=0, layers="block", blocks=blocks)
    >>> params, tokens = init_params(config, jax.random.key(0)), np.zeros((1, 32), int)
    >>> attention_errors(config, params, tokens, {"indexer": blocks}, [32])[0]["error"]
    0.0
    """
    rows = []
    for length in lengths:
        found = [
            (own, x)
            for kind, own, x in mixer_inputs(config, params, tokens[:, :length])
            if kind == "block"
        ]
        layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
        errors, costs = _layer_errors(config.heads, tuple(routers.values()), layers)
        for name, error, cost in zip(routers, np.mean(errors, axis=0), np.mean(costs, axis=0)):
            row = {"router": name, "length": length, "error": float(error), "cost": float(cost)}
            rows.append(row)
    return rows


def least_cost(rows: Sequence[Row], limit: float) -> float | None:
    """The cost at which the error falls to a limit, between two measured costs on a line.

    None where it does at none that was measured.

    Args:
      rows: of one router at one length, at several budgets.
      limit: the error allowed.

    >>> least_cost([{"cost": 0.1, "error": 0.4}, {"cost": 0.3, "error": 0.0}], 0.1)
    0.25
    """
    line = sorted((row["cost"], row["error"]) for row in rows)
    if line and line[0][1] <= limit:
        return line[0][0]
    for (low, above), (high, below) in itertools.pairwise(line):
        if below <= limit < above:
            return round(low + (high - low) * (above - limit) / (above - below), 12)
    return None
