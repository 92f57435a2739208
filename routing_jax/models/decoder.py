"""The decoder: embedding, a stack of (mixer, MLP) blocks, logits."""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from routing_jax.attention import (
    BlockRouted,
    CausalConv,
    FullAttention,
    LayerCache,
    LayerMemory,
    LayerReport,
    LayerRouted,
    LinearAttention,
    MixtureOfSchemes,
    Mode,
    Prompts,
    RoutedConv,
    empty_block_memory,
    empty_linear_memory,
    rms_norm,
    scheme_heads,
)
from routing_jax.kernels import ATTENTION, dropout
from routing_jax.kernels.checks import refuse_rows, values_to_check
from routing_jax.models.config import DecoderConfig, repeating_pattern
from routing_jax.models.embedding import embed
from routing_jax.models.gpt import GeluMLP, LayerNorm, draw_weights


class DecoderCache(NamedTuple):
    """What decoding remembers: a LayerCache a layer, and each sequence's length so far.

    Attributes:
      layers: one LayerCache a layer (stacked over repeats of the pattern when scanning).
      lengths: [B] int32, tokens held.
    """

    layers: tuple[LayerCache, ...]
    lengths: jax.Array


def _check_room(cache: DecoderCache, positions: jax.Array) -> None:
    """Refuses positions [B,T] that the cache has no place for; without keys it has no end."""
    sizes = [layer.keys.shape[-3] for layer in cache.layers if layer.keys is not None]
    found = values_to_check(positions)
    if sizes and found is not None:
        _, (known,) = found
        refuse_rows(
            (known >= sizes[0]).any(-1),
            f"positions must be below {sizes[0]}, the most tokens a sequence of this cache holds",
            lambda row: f"reaches {known[row].max()}",
        )


class ModelOutput(NamedTuple):
    """What the model returns.

    Attributes:
      logits: [B,T,V] float32; [B,A,V] of the A tokens that were to be read.
      cache: the DecoderCache after these tokens, or None.
      reports: LayerReport with a leading layer dimension [L].
    """

    logits: jax.Array
    cache: DecoderCache | None
    reports: LayerReport


class RMSNorm(nn.Module):
    """`rms_norm` with its own scale."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last dimension of x."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return rms_norm(x, scale, self.eps)


class SwiGLU(nn.Module):
    """(silu(x·gate) ∘ x·up)·down (Shazeer 2020)."""

    mlp_width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B,T,D] to [B,T,D]."""
        D, F = x.shape[-1], self.mlp_width
        init = nn.initializers.lecun_normal()
        gate = self.param("gate", init, (D, F)).astype(x.dtype)
        up = self.param("up", init, (D, F)).astype(x.dtype)
        down = self.param("down", init, (F, D)).astype(x.dtype)
        hidden = jax.nn.silu(jnp.einsum("BTD,DF->BTF", x, gate))
        hidden *= jnp.einsum("BTD,DF->BTF", x, up)
        return jnp.einsum("BTF,FD->BTD", hidden, down)


def make_mixer(config: DecoderConfig, kind: str) -> nn.Module:
    """The mixer of one layer, named by its kind.

    >>> type(make_mixer(DecoderConfig(), "conv")).__name__
    'CausalConv'
    """
    if kind == "full":
        return FullAttention(config.heads, name="mixer")
    if kind == "conv":
        return CausalConv(config.heads, config.conv_width, name="mixer")
    if kind == "schemes":
        return MixtureOfSchemes(config.heads, config.schemes, name="mixer")
    if kind == "block":
        return BlockRouted(config.heads, config.blocks, name="mixer")
    if kind == "layer":
        return LayerRouted(config.heads, config.layer_router, config.sparse, name="mixer")
    if kind == "linear":
        return LinearAttention(config.heads, name="mixer")
    return RoutedConv(config.heads, config.router, config.conv_width, name="mixer")


def make_norm(config: DecoderConfig, name: str) -> nn.Module:
    """A norm of the configured kind.

    >>> type(make_norm(DecoderConfig(norm="layer"), "final_norm")).__name__
    'LayerNorm'
    """
    return (RMSNorm if config.norm == "rms" else LayerNorm)(config.norm_eps, name=name)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    config: DecoderConfig
    kind: str

    @nn.compact
    def __call__(
        self, x: jax.Array, positions, segment_ids, cache, rng, mode: Mode, prompts=None
    ) -> tuple[jax.Array, LayerCache | None, LayerReport]:
        """Runs one layer on x [B,T,D]."""
        cfg = self.config

        def drop(y: jax.Array, place: int) -> jax.Array:
            key = None if rng is None or mode != "train" else jax.random.fold_in(rng, place)
            return dropout(y, cfg.dropout, key)

        told = (prompts,) if self.kind == "layer" else ()
        mixed, cache, report = make_mixer(cfg, self.kind)(
            make_norm(cfg, "mixer_norm")(x), positions, segment_ids, cache, rng, mode, *told
        )
        x = x + drop(mixed, 2)  # 1 is taken by the mixer's attention weights
        if cfg.mlp_width:
            mlp = SwiGLU if cfg.mlp == "swiglu" else GeluMLP
            x = x + drop(mlp(cfg.mlp_width, name="mlp")(make_norm(cfg, "mlp_norm")(x)), 3)
        return x, cache, report


class Pattern(nn.Module):
    """The repeating pattern of layers, once: the body of the scan over layers."""

    config: DecoderConfig
    mode: Mode

    @nn.compact
    def __call__(self, x: jax.Array, scanned: tuple, positions, segment_ids, prompts):
        """Runs the pattern's blocks on x; `scanned` holds this repeat's caches, keys, choices."""
        caches, rngs, choices = scanned
        block = Block
        if self.config.remat:
            # All but what block-sparse attention gave is made again in the backward pass: for the
            # memory of a layer's input or two, the dearest part is not.
            kept = jax.checkpoint_policies.save_only_these_names(ATTENTION)
            block = nn.remat(
                Block, static_argnums=(6,), policy=kept, prevent_cse=not self.config.scan
            )
        new_caches, reports = [], []
        for i, kind in enumerate(repeating_pattern(self.config.mixers)):
            if choices is not None:
                prompts = prompts._replace(choice=choices[i])
            rng = None if rngs is None else rngs[i]
            x, cache, report = block(self.config, kind, name=f"block_{i}")(
                x, positions, segment_ids, caches[i], rng, self.mode, prompts
            )
            new_caches.append(cache)
            reports.append(report)
        return x, (tuple(new_caches), jax.tree.map(lambda *r: jnp.stack(r), *reports))


class Decoder(nn.Module):
    """A causal language model with a mixer per layer.

    `apply({'params': p}, tokens [B,T], positions, segment_ids, cache, rng, mode, prompts,
    read) -> ModelOutput`; `prompts` is for layer routers.
    Use `init_params` for its parameters: they are the same with and without scan.
    A position past the cache's end raises ValueError where positions are concrete. Under jit they
    are not: the key is dropped and later tokens do not see it, so the caller has to count, or to
    run under `kernels.checked`, which reports it.

    >>> model = Decoder(DecoderConfig(width=8, head_dim=8, mlp_width=0))
    >>> params = init_params(model.config, jax.random.key(0))
    >>> model.apply({"params": params}, jnp.zeros((1, 4), jnp.int32)).logits.shape
    (1, 4, 256)
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: DecoderCache | None = None,
        rng: jax.Array | None = None,
        mode: Mode = "eval",
        prompts: Prompts | None = None,
        read: jax.Array | None = None,
    ) -> ModelOutput:
        """Runs the model on tokens [B,T]; positions default to 0…T−1 after the cache's end.

        `read` [B,A] int32 names the places in T whose logits are wanted; all of them when None.
        """
        cfg = self.config
        dtype = jnp.dtype(cfg.dtype)
        if mode in ("prefill", "decode") and cache is None:
            raise ValueError(f"mode {mode!r} needs a cache; it is None.")
        if mode == "decode" and tokens.shape[1] != 1:
            raise ValueError(f"mode 'decode' takes tokens [B,1]; they are {tokens.shape}.")
        if positions is None:
            start = 0 if cache is None else cache.lengths[:, None]
            positions = jnp.broadcast_to(
                jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] + start, tokens.shape
            )
        if cache is not None:
            _check_room(cache, positions)
        # Tied, the same rows score the answers: logits of unit size need rows of unit length.
        spread = cfg.width**-0.5 if cfg.tie_embeddings else 1.0
        embedding = self.param(
            "embedding", nn.initializers.normal(spread), (cfg.vocab_size, cfg.width)
        )
        x = embed(embedding.astype(dtype), tokens)
        if cfg.learned_positions:
            if tokens.shape[1] > cfg.learned_positions:
                raise ValueError(
                    f"tokens are {tokens.shape}; T must be at most model.learned_positions = "
                    f"{cfg.learned_positions}."
                )
            table = self.param(
                "positions", nn.initializers.normal(spread), (cfg.learned_positions, cfg.width)
            )
            x += embed(table.astype(dtype), jnp.maximum(positions, 0))
        if rng is not None and mode == "train":
            x = dropout(x, cfg.dropout, jax.random.fold_in(rng, 0))

        mixers = cfg.mixers
        period = len(repeating_pattern(mixers))
        repeats = len(mixers) // period
        rngs = None if rng is None else jax.random.split(rng, (repeats, period))
        choices = None
        if prompts is not None and prompts.choice is not None:
            choices = prompts.choice.reshape(repeats, period, -1)
            prompts = prompts._replace(choice=None)
        if cfg.scan:
            caches = (None,) * period if cache is None else cache.layers
            scan = nn.scan(
                Pattern,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
                length=repeats,
                # The values that kernels check under `checked` look to Flax like a dependency.
                check_constancy_invariants=False,
            )
            x, (caches, reports) = scan(cfg, mode, name="layers")(
                x, (caches, rngs, choices), positions, segment_ids, prompts
            )
            reports = jax.tree.map(lambda r: r.reshape(len(mixers), *r.shape[2:]), reports)
        else:
            given = (None,) * len(mixers) if cache is None else cache.layers
            caches, reports = (), []
            for i in range(repeats):
                part = given[i * period : (i + 1) * period]
                own = jax.tree.map(lambda a, i=i: a[i], (rngs, choices))
                x, (new, report) = Pattern(cfg, mode, name=f"layers_{i}")(
                    x, (part, *own), positions, segment_ids, prompts
                )
                caches += new
                reports.append(report)
            reports = jax.tree.map(lambda *r: jnp.concatenate(r), *reports)
        if cache is not None:
            lengths = jnp.maximum(cache.lengths, jnp.max(positions, axis=1) + 1)
            cache = DecoderCache(caches, lengths)

        if read is not None:
            x = jnp.take_along_axis(x, read[..., None], axis=1)
        x = make_norm(cfg, "final_norm")(x)
        if cfg.tie_embeddings:
            head = embedding.T
        else:
            head = self.param("head", nn.initializers.lecun_normal(), (cfg.width, cfg.vocab_size))
        logits = jnp.einsum(
            "BTD,DV->BTV", x, head.astype(dtype), preferred_element_type=jnp.float32
        )
        if cfg.head_bias:
            bias = self.param("head_bias", nn.initializers.zeros, (cfg.vocab_size,))
            logits += bias[None, None]
        return ModelOutput(logits, cache, reports)


def stack_layers(params: dict[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """Parameters of the unrolled model as the scanned one holds them: leaves [repeats, …].

    >>> config = DecoderConfig(width=8, layers="conv*3", mlp_width=0)
    >>> stacked = stack_layers(init_params(config, jax.random.key(0)), config)
    >>> stacked["layers"]["block_0"]["mixer"]["conv"].shape
    (3, 4, 8)
    """
    repeats = len(config.mixers) // len(repeating_pattern(config.mixers))
    rest = {k: v for k, v in params.items() if not k.startswith("layers_")}
    layers = [params[f"layers_{i}"] for i in range(repeats)]
    return {**rest, "layers": jax.tree.map(lambda *p: jnp.stack(p), *layers)}


def unstack_layers(params: dict[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `stack_layers`: parameters of the scanned model, unrolled.

    >>> config = DecoderConfig(width=8, layers="conv*3", mlp_width=0, scan=True)
    >>> sorted(unstack_layers(init_params(config, jax.random.key(0)), config))
    ['embedding', 'final_norm', 'head', 'layers_0', 'layers_1', 'layers_2']
    """
    repeats = len(config.mixers) // len(repeating_pattern(config.mixers))
    rest = {k: v for k, v in params.items() if k != "layers"}
    layers = {
        f"layers_{i}": jax.tree.map(lambda p, i=i: p[i], params["layers"]) for i in range(repeats)
    }
    return rest | layers


@functools.partial(jax.jit, static_argnames="config")  # so that the layers are traced, not run
def init_params(config: DecoderConfig, rng: jax.Array) -> dict[str, Any]:
    """The model's initial float32 parameters, the same numbers with and without scan.

    Args:
      config: the model.
      rng: a PRNG key.

    >>> small = DecoderConfig(width=8, head_dim=8, mlp_width=0)
    >>> sorted(init_params(small, jax.random.key(0)))
    ['embedding', 'final_norm', 'head', 'layers_0', 'layers_1']
    """
    tokens = jnp.zeros((1, config.conv_width), jnp.int32)
    unrolled = Decoder(config.replace(scan=False, remat=False))
    params = unrolled.init(rng, tokens, mode="masked")["params"]
    if config.init_std:
        params = draw_weights(params, config.init_std, len(config.mixers), rng)
    return stack_layers(params, config) if config.scan else params


def init_cache(
    config: DecoderConfig, batch: int, length: int, dtype: jnp.dtype | None = None
) -> DecoderCache:
    """An empty cache for sequences of up to `length` tokens.

    Args:
      config: the model.
      batch: B.
      length: S, the most tokens a sequence may hold; with block or layer routing, it is rounded
        up to whole blocks.
      dtype: of keys, values and convolution inputs; the compute dtype when None.

    Raises:
      ValueError: `length` is longer than the model's context, or than its learned positions.

    >>> init_cache(DecoderConfig(), 2, 16).layers[0].keys.shape
    (2, 16, 1, 64)
    """
    for name in ("context", "learned_positions"):
        if 0 < getattr(config, name) < length:
            raise ValueError(
                f"length is {length}; it must be at most model.{name} = {getattr(config, name)}."
            )
    dtype = jnp.dtype(dtype or config.dtype)

    pages = {"block": config.blocks.block_kv, "layer": config.sparse.block_kv}
    page = math.lcm(*(size for kind, size in pages.items() if kind in config.mixers))
    length = -(-length // page) * page  # a block is a page of the decoding kernel

    def memory(kind: str):
        if kind == "block":
            blocks = length // config.blocks.block_kv
            return empty_block_memory(config.blocks, config.heads, batch, blocks, config.width)
        if kind == "layer":
            return LayerMemory(jnp.zeros(batch, bool))
        return empty_linear_memory(config.heads, batch) if kind == "linear" else None

    def layer(kind: str) -> LayerCache:
        heads = config.heads
        if kind == "schemes":
            heads = scheme_heads(heads, config.schemes).projected
        kv = (batch, length, heads.num_kv_heads, heads.head_dim)
        attends, convolves = kind not in ("conv", "linear"), kind in ("conv", "routed")
        return LayerCache(
            keys=jnp.zeros(kv, dtype) if attends else None,
            values=jnp.zeros(kv, dtype) if attends else None,
            history=jnp.zeros((batch, config.conv_width - 1, config.width), dtype)
            if convolves
            else None,
            summary=jnp.zeros((batch, config.router.summary))
            if kind == "routed" and config.router.summary
            else None,
            memory=memory(kind),
        )

    layers = tuple(layer(kind) for kind in config.mixers)
    if config.scan:
        period = len(repeating_pattern(config.mixers))
        layers = tuple(
            jax.tree.map(lambda *c: jnp.stack(c), *layers[i::period]) for i in range(period)
        )
    return DecoderCache(layers, jnp.zeros((batch,), jnp.int32))


def count_params(params: Any) -> int:
    """How many numbers a parameter tree holds (arrays or shapes).

    >>> count_params({"kernel": jnp.zeros((4, 8)), "bias": jnp.zeros(8)})
    40
    """
    return sum(leaf.size for leaf in jax.tree.leaves(params))
