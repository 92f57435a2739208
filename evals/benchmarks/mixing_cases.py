"""What the mixing benchmark times: one step a case, dense and routed, with exact usage.

A real token router decides inside every routed step, on inputs that make exactly the wanted tokens
attend (`mixing_inputs`); nothing tells the compiler which.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from routing_jax.attention import FullAttention, HeadsConfig, LayerCache, RoutedConv
from routing_jax.attention.projections import (
    AttentionWeights,
    project_keys_values,
    project_out,
    project_queries,
)
from routing_jax.evals.benchmarks.mixing_config import MixingBenchConfig, Part
from routing_jax.evals.benchmarks.mixing_inputs import choose_tokens, normal, tokens_input, weights
from routing_jax.evals.benchmarks.timing import State
from routing_jax.kernels import (
    capacity_ladder,
    causal_conv,
    compacted_attention,
    dense_attention,
    map_routed,
)
from routing_jax.routers import TokenRouter, TokenRouterConfig

# Of an AttentionWeights; the measured layers have no biases and no norms.
_PROJECTIONS = ("query", "key", "value", "out")


class Case(NamedTuple):
    """A step to time.

    Attributes:
      usage: the share of tokens that attend; None for dense, which the others are compared with.
      tokens: how many attend.
      name: cases of one part and length that share it share a compiled program.
      step: State -> State.
      state: makes a fresh input of the step from a seed.
    """

    usage: float | None
    tokens: int
    name: str
    step: Callable[[State], State]
    state: Callable[[int], State]


def _heads(config: MixingBenchConfig) -> HeadsConfig:
    return HeadsConfig(config.num_heads, config.num_kv_heads, config.head_dim)


def _router(config: MixingBenchConfig) -> TokenRouterConfig:
    return TokenRouterConfig(hidden=config.router_hidden)


def _attention_weights(params: dict[str, Any]) -> AttentionWeights:
    return AttentionWeights(*(params[name] for name in _PROJECTIONS))


def _positions(length: int) -> jax.Array:
    return jnp.arange(length, dtype=jnp.int32)[None]


def _mixing(config: MixingBenchConfig, length: int) -> list[Case]:
    """Queries, keys and values are given: router, compaction, attention, scatter, convolution."""
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    router: Any = TokenRouter(_router(config))

    def dense(state: State) -> State:
        return state | {"y": dense_attention(state["q"], state["k"], state["v"])}

    def routed(state: State) -> State:
        q, k, v, x = (state[name] for name in "qkvx")
        params = {"params": state["router"]}
        choice = router.apply(params, x, _positions(length)).routing.choice

        def attend(q: jax.Array, positions: jax.Array) -> jax.Array:
            q = q.reshape(*q.shape[:2], N, H)
            if q.shape[1] == length:
                y = dense_attention(q, k, v)
            else:
                y = compacted_attention(q, k, v, positions)
            return y.reshape(*y.shape[:2], N * H)

        conv = causal_conv(x, state["conv"])
        return state | {"y": map_routed(attend, q.reshape(*q.shape[:2], N * H), choice, conv)}

    def dense_state(seed: int) -> State:
        return {
            "q": normal(seed + 1, (1, length, N, H), config.dtype),
            "k": normal(seed + 2, (1, length, K, H), config.dtype),
            "v": normal(seed + 3, (1, length, K, H), config.dtype),
            "y": jnp.full((1, length, N, H), jnp.nan, config.dtype),
        }

    def routed_state(tokens: int, seed: int) -> State:
        params = weights(config)
        return dense_state(seed) | {
            "x": tokens_input(config, choose_tokens(length, tokens, seed), seed),
            "y": jnp.full((1, length, config.width), jnp.nan, config.dtype),
            "router": params["router"],
            "conv": params["conv"],
        }

    return [Case(None, length, "dense", dense, dense_state)] + [
        Case(usage, tokens, "routed", routed, functools.partial(routed_state, tokens))
        for usage, tokens in _usages(config, length)
    ]


def _projections(config: MixingBenchConfig, length: int) -> list[Case]:
    """Keys and values for every token; queries and output for as many as the capacity holds."""
    N, K, H, D = config.num_heads, config.num_kv_heads, config.head_dim, config.width
    heads, positions = _heads(config), _positions(length)

    def project(capacity: int, state: State) -> State:
        attention = _attention_weights(state["params"])
        k, v = project_keys_values(state["x"], positions, attention, heads)
        if not capacity:
            return state | {"k": k, "v": v}
        chosen, at = state["x"][:, :capacity], positions[:, :capacity]
        q = project_queries(chosen, at, attention, heads)
        y = project_out(state["mixed"][:, :capacity], attention)
        return state | {"q": q, "k": k, "v": v, "y": y}

    def make(capacity: int, seed: int) -> State:
        params = weights(config)
        shapes = {"q": (N, H), "y": (D,)} if capacity else {}
        return {
            "x": normal(seed, (1, length, D), config.dtype),
            "mixed": normal(seed + 1, (1, length, N, H), config.dtype),
            "params": {name: params[name] for name in _PROJECTIONS},
            **{name: jnp.full((1, length, K, H), jnp.nan, config.dtype) for name in "kv"},
            **{
                name: jnp.full((1, capacity, *shape), jnp.nan, config.dtype)
                for name, shape in shapes.items()
            },
        }

    def case(usage: float | None, tokens: int) -> Case:
        capacity = min(c for c in capacity_ladder(length) if c >= tokens)
        step, state = functools.partial(project, capacity), functools.partial(make, capacity)
        return Case(usage, tokens, f"capacity {capacity}", step, state)

    return [case(None, length)] + [case(*pair) for pair in _usages(config, length)]


def _layer(config: MixingBenchConfig, length: int) -> list[Case]:
    """The whole mixers as modules, evaluating."""
    mixers = _mixers(config)

    def step(name: str, state: State) -> State:
        y, _, _ = mixers[name].apply({"params": state["params"]}, state["x"], _positions(length))
        return state | {"y": y}

    def make(name: str, tokens: int, seed: int) -> State:
        return {
            "x": tokens_input(config, choose_tokens(length, tokens, seed), seed),
            "params": _params(config, name),
            "y": jnp.full((1, length, config.width), jnp.nan, config.dtype),
        }

    return _module_cases(_usages(config, length), length, step, make)


def _decode(config: MixingBenchConfig, length: int) -> list[Case]:
    """One token against a cache of `length` entries, its own the last."""
    mixers = _mixers(config)
    K, H, D = config.num_kv_heads, config.head_dim, config.width
    positions = jnp.full((1, 1), length - 1, jnp.int32)

    def step(name: str, state: State) -> State:
        y, cache, _ = mixers[name].apply(
            {"params": state["params"]}, state["x"], positions, cache=state["cache"], mode="decode"
        )
        return state | {"y": y, "cache": cache}

    def make(name: str, tokens: int, seed: int) -> State:
        history = normal(seed + 3, (1, config.conv_width - 1, D), config.dtype)
        return {
            "x": tokens_input(config, np.array([tokens > 0]), seed),
            "cache": LayerCache(
                keys=normal(seed + 1, (1, length, K, H), config.dtype),
                values=normal(seed + 2, (1, length, K, H), config.dtype),
                history=history if name == "routed" else None,
            ),
            "params": _params(config, name),
            "y": jnp.full((1, 1, D), jnp.nan, config.dtype),
        }

    return _module_cases([(0.0, 0), (1.0, 1)], 1, step, make)


def _mixers(config: MixingBenchConfig) -> dict[str, Any]:
    return {
        "dense": FullAttention(_heads(config)),
        "routed": RoutedConv(_heads(config), _router(config), config.conv_width),
    }


def _params(config: MixingBenchConfig, name: str) -> dict[str, Any]:
    params = weights(config)
    return params if name == "routed" else {key: params[key] for key in _PROJECTIONS}


def _usages(config: MixingBenchConfig, length: int) -> list[tuple[float, int]]:
    return [(usage, round(usage * length)) for usage in config.usages]


def _module_cases(
    usages: list[tuple[float, int]],
    length: int,
    step: Callable[[str, State], State],
    make: Callable[[str, int, int], State],
) -> list[Case]:
    def case(usage: float | None, tokens: int, name: str) -> Case:
        steps, states = functools.partial(step, name), functools.partial(make, name, tokens)
        return Case(usage, tokens, name, steps, states)

    return [case(None, length, "dense"), *(case(*pair, "routed") for pair in usages)]


_BUILDERS = {
    "mixing": _mixing,
    "projections": _projections,
    "layer": _layer,
    "decode": _decode,
}


def cases(config: MixingBenchConfig, part: Part, length: int) -> list[Case]:
    """The cases of one part at one length: dense first, then one a usage.

    Args:
      config: sizes and usages.
      part: 'mixing', 'projections', 'layer' or 'decode'.
      length: T, or the cache's length for 'decode'.

    >>> [case.tokens for case in cases(MixingBenchConfig(), "mixing", 4096)]
    [4096, 0, 4, 41, 205, 512, 1024, 2048, 4096]
    """
    return _BUILDERS[part](config, length)
