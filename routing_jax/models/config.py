"""What a decoder is made of."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Literal

from routing_jax.attention import HeadsConfig
from routing_jax.routers import (
    BlockRouterConfig,
    LayerRouterConfig,
    SchemesConfig,
    SparseModeConfig,
    TokenRouterConfig,
)

MIXERS = ("full", "conv", "routed", "schemes", "block", "layer", "linear")


def parse_layers(pattern: str) -> tuple[str, ...]:
    """The mixer of each layer, from a compact pattern.

    Args:
      pattern: comma-separated mixers, each optionally repeated with `*n`; a group in brackets
        repeats as a whole.

    Raises:
      ValueError: an empty pattern, an unknown mixer or a malformed repeat.

    >>> parse_layers("conv,routed*2")
    ('conv', 'routed', 'routed')
    >>> parse_layers("(conv,full)*2")
    ('conv', 'full', 'conv', 'full')
    """
    text = pattern.replace(" ", "")

    def spread(match: re.Match[str]) -> str:
        return ",".join([match.group(1)] * int(match.group(2)))

    # A repeat followed by another, as in '(full)*2*3', stays as it is, and is refused below.
    text = re.sub(r"\(([^()]*)\)\*([1-9]\d*+)(?!\*)", spread, text)
    text = re.sub(r"([a-z_]+)\*([1-9]\d*+)(?!\*)", spread, text)
    layers = tuple(text.split(","))
    for name in layers:
        if name not in MIXERS:
            raise ValueError(
                f"model.layers is {pattern!r}, where {name!r} is not a mixer; accepted: "
                f"{', '.join(MIXERS)}, repeated with *n, as in 'conv,routed*2' or '(conv,full)*3'."
            )
    return layers


def repeating_pattern(layers: tuple[str, ...]) -> tuple[str, ...]:
    """The shortest pattern whose repetition gives the stack.

    >>> repeating_pattern(("conv", "full", "conv", "full"))
    ('conv', 'full')
    """
    for period in range(1, len(layers) + 1):
        if len(layers) % period == 0 and layers == layers[:period] * (len(layers) // period):
            return layers[:period]
    raise AssertionError("a stack always repeats itself once")


@dataclass(frozen=True)
class DecoderConfig:
    """A pre-norm decoder whose layers each choose a mixer.

    Attributes:
      vocab_size: V.
      width: D.
      layers: the mixer of each layer, as in 'conv,routed*2': full, conv, routed, schemes, block,
        layer or linear.
      num_heads: N, query heads.
      num_kv_heads: K, key/value heads; N = K is multi-head, K = 1 multi-query attention.
      head_dim: H.
      mlp: 'swiglu' as in Llama, or 'gelu' as in GPT-2.
      mlp_width: F of the MLP; 0 for no MLP.
      rope_theta: base of the rotary embedding; 0 for none.
      rope_factors: H/2 divisors of the rotary frequencies, for long contexts; empty for none.
      qkv_bias: add a bias to queries, keys and values.
      qk_norm: RMS-normalise queries and keys head by head, before they turn.
      context: most tokens a sequence may have; 0 for no limit.
      learned_positions: positions with a learned embedding, the longest sequence; 0 for none.
      conv_width: W, tokens that the depthwise convolution sees.
      router: the token router of routed layers.
      schemes: the attention schemes of 'schemes' layers, and their router.
      blocks: the block router of block layers.
      layer_router: the router of 'layer' layers, which chooses between full and sparse attention.
      sparse: what sparse attention is in 'layer' layers.
      norm: 'rms' or 'layer', without bias.
      norm_eps: added to the mean square, or variance, in the norm.
      tie_embeddings: use the embedding as output projection.
      head_bias: add a bias to the logits, so that what is rarely an answer is ruled out at once.
      dropout: in training, of embeddings, attention weights, and what a layer adds.
      init_std: of all matrices, output projections less by √(2L), as in GPT-2; 0 to scale each by
        its inputs.
      dtype: compute dtype; parameters and softmax stay float32.
      attention: 'cudnn', 'xla', or None for the best one here.
      scan: run the repeating pattern of layers as one loop: many layers compile faster, same
        numbers. Without `remat`, training copies what its backward pass needs into stacks and back.
      remat: recompute a layer's activations in the backward pass: less memory, same numbers.
    """

    vocab_size: int = 256
    width: int = 64
    layers: str = "routed*2"
    num_heads: int = 1
    num_kv_heads: int = 1
    head_dim: int = 64
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    mlp_width: int = 128
    rope_theta: float = 10_000.0
    rope_factors: tuple[float, ...] = ()
    qkv_bias: bool = False
    qk_norm: bool = False
    context: int = 0
    learned_positions: int = 0
    conv_width: int = 4
    router: TokenRouterConfig = field(default_factory=TokenRouterConfig)
    schemes: SchemesConfig = field(default_factory=SchemesConfig)
    blocks: BlockRouterConfig = field(default_factory=BlockRouterConfig)
    layer_router: LayerRouterConfig = field(default_factory=LayerRouterConfig)
    sparse: SparseModeConfig = field(default_factory=SparseModeConfig)
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    head_bias: bool = False
    dropout: float = 0.0
    init_std: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attention: Literal["xla", "cudnn"] | None = None
    scan: bool = False
    remat: bool = False

    def __post_init__(self):
        parse_layers(self.layers)
        for name in ("vocab_size", "width", "num_heads", "num_kv_heads", "head_dim", "conv_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_kv_heads is {self.num_kv_heads}; it must divide "
                f"model.num_heads = {self.num_heads}."
            )
        if "schemes" in self.mixers:
            self.schemes.kv_heads(self.num_heads)
        if "layer" in self.mixers and self.sparse.searches:
            self.sparse.channels_of(self.head_dim)
        if self.rope_theta and self.head_dim % 2:
            raise ValueError(
                f"model.head_dim is {self.head_dim}; with RoPE (model.rope_theta > 0) it must be "
                "even."
            )
        if self.rope_theta < 0:
            raise ValueError(
                f"model.rope_theta is {self.rope_theta}; it must be above 0, or 0 for no positions."
            )
        if self.rope_factors and (
            len(self.rope_factors) * 2 != self.head_dim or not min(self.rope_factors) > 0
        ):
            raise ValueError(
                f"model.rope_factors is {self.rope_factors}; it must be empty, or "
                f"model.head_dim / 2 = {self.head_dim // 2} numbers above 0."
            )
        for name in ("mlp_width", "context", "learned_positions", "init_std"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least 0.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout is {self.dropout}; it must lie in [0, 1).")
        if self.norm not in ("rms", "layer"):
            raise ValueError(f"model.norm is {self.norm!r}; accepted: 'rms', 'layer'.")
        if self.mlp not in ("swiglu", "gelu"):
            raise ValueError(f"model.mlp is {self.mlp!r}; accepted: 'swiglu', 'gelu'.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"model.dtype is {self.dtype!r}; accepted: 'float32', 'bfloat16'.")
        if self.attention not in ("xla", "cudnn", None):
            raise ValueError(
                f"model.attention is {self.attention!r}; accepted: 'xla', 'cudnn', None."
            )

    @property
    def mixers(self) -> tuple[str, ...]:
        """The mixer of each layer, spelled out."""
        return parse_layers(self.layers)

    @property
    def heads(self) -> HeadsConfig:
        """The head counts, as the mixers take them."""
        return HeadsConfig(
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.rope_theta,
            self.attention,
            self.rope_factors,
            self.qkv_bias,
            self.qk_norm,
            self.norm_eps,
            self.dropout,
        )

    def replace(self, **changes) -> "DecoderConfig":
        """A copy with some fields changed.

        >>> DecoderConfig().replace(width=32).width
        32
        """
        return dataclasses.replace(self, **changes)
