"""What the block-routing benchmark times: programs dense and routed, and what they count as."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from routing_jax.attention import BlockRouted, FullAttention, HeadsConfig, attention_work
from routing_jax.evals.benchmarks.block_routing_config import BlockRoutingBenchConfig, Part, Pass
from routing_jax.evals.benchmarks.mixing_inputs import normal
from routing_jax.evals.benchmarks.program import Program, differentiated
from routing_jax.evals.benchmarks.timing import State
from routing_jax.generate import prefill
from routing_jax.kernels import block_sparse_attention, dense_attention
from routing_jax.models import Decoder, DecoderConfig, init_params
from routing_jax.routers import (
    BlockRouter,
    BlockRouterConfig,
    BlockRouting,
    block_router_work,
    router_inputs,
    row_limits,
)
from routing_jax.routers.block_config import BlockRouterKind

_TREE = 4  # children a node of the router that searches
_STEP = 1e-6  # down the gradient: small, so that repeated steps stay finite


class Counts(NamedTuple):
    """What a router at a budget counts as, by the unit of cost.

    Attributes:
      cost: multiply-adds ÷ those of dense attention, the router's among them.
      router: the router's alone ÷ those of dense attention.
    """

    cost: float
    router: float


class Case(NamedTuple):
    """A program and what it stands for.

    Attributes:
      router: its name; None for dense attention.
      budget: in words.
      counts: None for dense attention.
      program: what is timed.
    """

    router: str | None
    budget: str
    counts: Counts | None
    program: Program


def counted(router: BlockRouterConfig, length: int, heads: HeadsConfig, width: int) -> Counts:
    """What a whole sequence costs; of clusters and adaptive budgets, at most.

    Args:
      router: the router and its budget.
      length: T.
      heads: head counts and sizes.
      width: D.

    >>> config = BlockRouterConfig(kind="window", fraction=0.25)
    >>> round(counted(config, 8192, HeadsConfig(4, 4, 128), 512).cost, 2)
    0.25
    """
    own = np.arange(0, length, router.block_q) // router.block_kv
    blocks = -(-length // router.block_kv)
    limits = np.asarray(row_limits(router, jnp.asarray(own)[None], blocks))[0, 0]
    seen = (own + 1).sum()
    pairs = jnp.float32(seen * router.block_q * router.block_kv)
    work = block_router_work(
        router,
        tokens=jnp.float32(length),
        tiles=len(own),
        blocks=blocks,
        width=width,
        kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
    )
    share = float(work / attention_work(pairs, heads.num_heads, heads.head_dim))
    return Counts(float(np.minimum(limits, own + 1).sum() / seen) + share, share)


def random_weights(shapes: Any, seed: int) -> Any:
    """Float32 parameters of the given shapes, those of matrices scaled by their first dimension."""
    leaves, tree = jax.tree.flatten(shapes)
    scales = [leaf.shape[0] ** -0.5 if leaf.ndim > 1 else 1.0 for leaf in leaves]
    drawn = [
        normal(seed + i, leaf.shape, "float32") * scale
        for i, (leaf, scale) in enumerate(zip(leaves, scales))
    ]
    return jax.tree.unflatten(tree, drawn)


def _positions(length: int) -> jax.Array:
    return jnp.arange(length, dtype=jnp.int32)[None]


def _budgets(config: BlockRoutingBenchConfig) -> list[tuple[str, BlockRouterConfig]]:
    return [
        (f"{100 * f:.3g} %", dataclasses.replace(config.router, budget="fraction", fraction=f))
        for f in config.fractions
    ]


def _step(passing: Pass, names: tuple[str, ...], forward: Callable[[State], Any]):
    if passing == "forward":
        return lambda state: state | {"y": forward(state)}
    return functools.partial(differentiated, forward, names)


def _products(passing: Pass, length: int, heads: HeadsConfig) -> float:
    """FLOPs of dense causal attention: two products forward, seven with the backward pass."""
    products = 2 if passing == "forward" else 7
    return float(products) * length**2 * heads.num_heads * heads.head_dim


def _qkvx(config: BlockRoutingBenchConfig, length: int, seed: int, *names: str) -> State:
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    shapes = {"q": (N, H), "k": (K, H), "v": (K, H), "dy": (N, H), "x": (config.width,)}
    return {
        name: normal(seed + i, (1, length, *shape), config.dtype)
        for i, (name, shape) in enumerate(shapes.items())
        if name in names
    }


def _router_params(config: BlockRoutingBenchConfig, router: BlockRouterConfig) -> Any:
    """Its parameters; none for a fixed pattern."""
    shapes = jax.eval_shape(
        lambda key, state: _route(router, config.num_kv_heads, None, state, key),
        jax.random.key(0),
        jax.eval_shape(lambda: _qkvx(config, router.block_kv, 0, "x", "q", "k")),
    )
    return random_weights(shapes.get("params", {}), config.seed)


def _route(router: BlockRouterConfig, kv_heads: int, params: Any, state: State, key=None) -> Any:
    """A BlockRouting from x, q and k as a layer makes it; with a key, new parameters instead."""
    x, q, k = state["x"], state["q"], state["k"]

    def whole(module: BlockRouter) -> Any:
        valid, weights = jnp.ones(x.shape[:2], bool), module.weights(x)
        tiles, blocks, _ = router_inputs(router, x, q, k, valid, weights=weights)
        return module(tiles, blocks)

    module = BlockRouter(router, kv_heads)
    if key is not None:
        return nn.init(whole, module)(key)
    return nn.apply(whole, module)({"params": params})


def _dense_attention(config: BlockRoutingBenchConfig, passing: Pass, length: int) -> Case:
    def forward(state: State) -> jax.Array:
        return dense_attention(state["q"], state["k"], state["v"])

    names = ("q", "k", "v") if passing == "forward" else ("q", "k", "v", "dy")
    step = _step(passing, ("q", "k", "v"), forward)
    work = _products(passing, length, config.heads)
    inputs = functools.partial(_inputs, config, length, names, None)
    return Case(None, "", None, Program("dense", work, step, inputs))


def _inputs(
    config: BlockRoutingBenchConfig,
    length: int,
    names: tuple[str, ...],
    router: BlockRouterConfig | None,
    seed: int,
) -> State:
    state = _qkvx(config, length, seed, *names)
    return state if router is None else state | {"router": _router_params(config, router)}


def _attention(config: BlockRoutingBenchConfig, passing: Pass, length: int) -> list[Case]:
    """Router, table and attention, of queries, keys and values that are given."""
    found = [_dense_attention(config, passing, length)]
    for budget, router in _budgets(config):

        def forward(state: State, router: BlockRouterConfig = router) -> jax.Array:
            routing = _route(router, config.num_kv_heads, state["router"], state)
            out = block_sparse_attention(
                state["q"],
                state["k"],
                state["v"],
                routing.table,
                block_bias=routing.bias,
                q_positions=_positions(length),
                implementation=router.implementation,
            )
            assert isinstance(out, jax.Array)  # no log-sum-exp was asked for
            return out

        names = ("q", "k", "v", "x") if passing == "forward" else ("q", "k", "v", "x", "dy")
        counts = counted(router, length, config.heads, config.width)
        step = _step(passing, ("q", "k", "v", "x", "router"), forward)
        work = _products(passing, length, config.heads) * counts.cost
        inputs = functools.partial(_inputs, config, length, names, router)
        found.append(Case(router.kind, budget, counts, Program("routed", work, step, inputs)))
    return found


def _layer(config: BlockRoutingBenchConfig, passing: Pass, length: int) -> list[Case]:
    """The whole mixer, projections included."""

    def case(name: str | None, budget: str, counts: Counts | None, mixer: Any) -> Case:
        def forward(state: State) -> jax.Array:
            return mixer.apply({"params": state["params"]}, state["x"], _positions(length))[0]

        def inputs(seed: int) -> State:
            shape = (1, length, config.width)
            state = {"x": normal(seed, shape, config.dtype)}
            if passing == "training":
                state["dy"] = normal(seed + 1, shape, config.dtype)
            short = jax.ShapeDtypeStruct((1, config.router.block_kv, config.width), config.dtype)
            made = jax.eval_shape(
                mixer.init, jax.random.key(0), short, _positions(config.router.block_kv)
            )
            return state | {"params": random_weights(made["params"], config.seed)}

        step = _step(passing, ("x", "params"), forward)
        work = _products(passing, length, config.heads) * (counts.cost if counts else 1.0)
        return Case(name, budget, counts, Program(name or "dense", work, step, inputs))

    found = [case(None, "", None, FullAttention(config.heads))]
    for budget, router in _budgets(config):
        counts = counted(router, length, config.heads, config.width)
        found.append(case(router.kind, budget, counts, BlockRouted(config.heads, router)))
    return found


def _router(config: BlockRoutingBenchConfig, passing: Pass, length: int) -> list[Case]:
    """From a layer's input to its table, beside dense attention."""
    if passing == "training":
        return []
    fixed = dataclasses.replace(config.router, budget="blocks", blocks=config.listed, fanout=0)
    scored: tuple[BlockRouterKind, ...] = ("learned", "pooled", "clusters")
    first, smallest = _budgets(config)[0]
    kinds: list[tuple[str, str, BlockRouterConfig]] = [
        (kind, first, dataclasses.replace(smallest, kind=kind)) for kind in scored
    ]
    words = f"{config.listed} blocks"
    learned = dataclasses.replace(fixed, kind="learned")
    kinds.append(("learned", words, learned))
    kinds.append(("tree", words, dataclasses.replace(learned, fanout=_TREE)))
    found = [_dense_attention(config, passing, length)]
    for name, budget, router in kinds:

        def forward(state: State, router: BlockRouterConfig = router) -> tuple[Any, ...]:
            made: BlockRouting = _route(router, config.num_kv_heads, state["router"], state)
            return made.table, made.bias

        counts = counted(router, length, config.heads, config.width)
        work = _products(passing, length, config.heads) * counts.router
        inputs = functools.partial(_inputs, config, length, ("x", "q", "k"), router)
        step = _step(passing, (), forward)
        found.append(Case(name, budget, counts, Program("router", work, step, inputs)))
    return found


def dense_model(model: DecoderConfig) -> DecoderConfig:
    """The model with full attention in place of block routing.

    >>> dense_model(DecoderConfig(layers="block*6")).layers
    'full*6'
    """
    return model.replace(layers=model.layers.replace("block", "full"))


def _model(config: BlockRoutingBenchConfig, passing: Pass, length: int) -> list[Case]:
    """A whole model: prefill, or a step of training."""

    def case(name: str | None, budget: str, counts: Counts | None, model: DecoderConfig) -> Case:
        def read(state: State) -> State:
            lengths = jnp.full(1, length, jnp.int32)
            y, cache = prefill(model, state["params"], state["tokens"], lengths, length)
            return state | {"y": y, "cache": cache}

        def train(state: State) -> State:
            tokens = state["tokens"]

            def loss(params: Any) -> jax.Array:
                out: Any = Decoder(model).apply({"params": params}, tokens, mode="train")
                return optax.softmax_cross_entropy_with_integer_labels(out.logits, tokens).mean()

            y, gradients = jax.value_and_grad(loss)(state["params"])
            params = jax.tree.map(lambda p, g: p - _STEP * g, state["params"], gradients)
            return state | {"y": y, "params": params}

        def inputs(seed: int) -> State:
            key = jax.random.key(seed)
            return {
                "tokens": jax.random.randint(key, (1, length), 0, model.vocab_size),
                "params": init_params(model, key),
            }

        attention = _products(passing, length, model.heads) * (counts.cost if counts else 1.0)
        work = attention * len(model.mixers)
        step = read if passing == "forward" else train
        return Case(name, budget, counts, Program(name or "dense", work, step, inputs))

    model = config.model
    found = [case(None, "", None, dense_model(model))]
    for budget, router in _budgets(config):
        counts = counted(router, length, model.heads, model.width)
        found.append(case(router.kind, budget, counts, model.replace(blocks=router)))
    return found


def cases(config: BlockRoutingBenchConfig, part: Part, passing: Pass, length: int) -> list[Case]:
    """The cases of one part and pass at one length: dense first, then the routed ones.

    Args:
      config: sizes and budgets.
      part: 'attention', 'layer', 'router' or 'model'.
      passing: 'forward' or 'training'; a router alone has no training.
      length: T.

    >>> [case.budget for case in cases(BlockRoutingBenchConfig(), "layer", "forward", 8192)]
    ['', '12 %', '25 %']
    """
    build = {"attention": _attention, "layer": _layer, "router": _router, "model": _model}
    return build[part](config, passing, length)
