"""What the serving benchmark measures, and how long it may take."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

import jax

from routing_jax.evals.benchmarks.running import set_memory_fraction
from routing_jax.kernels import llama3_factors
from routing_jax.models import DecoderConfig, with_layer_routing
from routing_jax.routers import LayerRouterConfig, SparseMode, SparseModeConfig

Part = Literal["router", "prefill", "decode"]
Who = Literal["routed", "composed", "kernels", "dense"]
"""Who is measured.

routed: layers in a pattern. composed: the same, its dense layers searching for blocks by channels.
kernels: all layers dense. dense: cuDNN's attention.
"""
PATTERNED: tuple[Who, ...] = ("routed", "composed")  # some layers sparse, the others not
Shape = Literal["llama-3.1-8b", "qwen3-4b", "tiny"]

_SHAPES = {
    "llama-3.1-8b": DecoderConfig(
        vocab_size=128_256,
        width=4096,
        layers="full*32",
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_width=14_336,
        rope_theta=500_000.0,
        rope_factors=llama3_factors(128, 500_000.0, 8.0, 1.0, 4.0, 8192),
        norm_eps=1e-5,
    ),
    "qwen3-4b": DecoderConfig(
        vocab_size=151_936,
        width=2560,
        layers="full*36",
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_width=9728,
        rope_theta=1_000_000.0,
        qk_norm=True,
        tie_embeddings=True,
    ),
    "tiny": DecoderConfig(
        vocab_size=64,
        width=32,
        layers="full*4",
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_width=64,
        dtype="float32",
    ),
}


@dataclass(frozen=True)
class ServePathConfig:
    """Sizes and timing of the serving benchmark. Weights are random, so it measures no quality.

    Attributes:
      model: whose shape: llama-3.1-8b, qwen3-4b, or tiny for a CPU.
      parts: what is measured of each length, in this order.
      who: what is measured beside each other: 'routed', 'composed' (whose layers that are not
        sparse search for blocks, in prefill and for each token), 'dense' (cuDNN's attention on a
        GPU, XLA's elsewhere) and, after all rows of these, 'kernels' (this library's, all layers
        dense).
      lengths: tokens of the prompts, and of the sequences that are decoded, in this order.
      prefill_batches: prompts that are read together.
      decode_batches: sequences that are decoded together; what does not fit is reported so.
      sparse_shares: of the layers, in a fixed pattern; the routers are computed all the same.
      mode: what sparse layers do, as in `SparseModeConfig`.
      blocks: how many each search finds, besides sink and window: those of 'composed', and of
        sparse layers in mode topk.
      channels: of keys, by which a block is found, as in `SparseModeConfig`.
      sink: first tokens that sparse layers see.
      window: tokens before a query that sparse layers see.
      block: keys a block, and tokens a page.
      pool: tokens of each end that the routers read.
      chunk: tokens that pass a projection or an MLP together in prefill.
      attention: of routed and kernels: 'mosaic_gpu', 'xla', or None for its own choice.
      steps: tokens that a sample of decoding makes.
      repeats: samples a row is the median of.
      row_seconds: time after which a row takes no further sample. 0 for no limit.
      seconds: time for all; what is not begun by then is reported as skipped. 0 for no limit.
      seed: of weights and tokens.
    """

    model: Shape = "llama-3.1-8b"
    parts: tuple[Part, ...] = get_args(Part)
    who: tuple[Who, ...] = get_args(Who)
    lengths: tuple[int, ...] = (8192, 32_768, 131_072)
    prefill_batches: tuple[int, ...] = (1,)
    decode_batches: tuple[int, ...] = (1, 3, 12)
    sparse_shares: tuple[float, ...] = (0.75,)
    mode: SparseMode = "streaming"
    blocks: int = 16
    channels: int | None = None
    sink: int = 128
    window: int = 1024
    block: int = 128
    pool: int = 100
    chunk: int = 8192
    attention: Literal["mosaic_gpu", "xla"] | None = None
    steps: int = 16
    repeats: int = 3
    row_seconds: float = 0.0
    seconds: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name, kinds in (("parts", Part), ("who", Who)):
            for value in getattr(self, name):
                if value not in get_args(kinds):
                    accepted = ", ".join(get_args(kinds))
                    raise ValueError(f"{name} holds {value!r}; accepted: {accepted}.")
        if self.model not in _SHAPES:
            raise ValueError(f"model is {self.model!r}; accepted: {', '.join(_SHAPES)}.")
        listed = ("parts", "who", "lengths", "prefill_batches", "decode_batches", "sparse_shares")
        for name in listed:
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give at least one.")
        for name in ("lengths", "prefill_batches", "decode_batches"):
            if min(getattr(self, name)) < 1:
                raise ValueError(
                    f"{name} holds {min(getattr(self, name))}; each must be at least 1."
                )
        for share in self.sparse_shares:
            if not 0 <= share <= 1:
                raise ValueError(f"sparse_shares holds {share}; each must lie between 0 and 1.")
        for name in ("blocks", "chunk", "steps", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")

    @property
    def decoder(self) -> DecoderConfig:
        """The model of that shape, of which any context is asked, its layers routed.

        >>> ServePathConfig(model="qwen3-4b").decoder.layers
        'layer*36'
        """
        sparse = SparseModeConfig(
            mode=self.mode,
            blocks=self.blocks,
            channels=self.channels,
            sink=self.sink,
            window=self.window,
            block_q=self.block,
            block_kv=self.block,
            implementation=self.attention,
        )
        return with_layer_routing(_SHAPES[self.model], LayerRouterConfig(pool=self.pool), sparse)

    def model_of(self, who: Who) -> DecoderConfig:
        """The model as one of those who are measured has it.

        Parameters are those of 'routed' for all: who has no routers ignores theirs.

        >>> ServePathConfig().model_of("dense").layers
        'full*32'
        >>> ServePathConfig().model_of("composed").sparse.answers
        'topk'
        """
        model = self.decoder
        if who == "routed":
            return model
        if who == "composed":
            sparse = dataclasses.replace(model.sparse, retrieval="topk", answers="topk")
            return model.replace(sparse=sparse)
        sparse = dataclasses.replace(model.sparse, mode="streaming")  # nobody is sparse or searches
        return model.replace(layers=model.layers.replace("layer", "full"), sparse=sparse)


def dense_layers(layers: int, sparse_share: float) -> tuple[bool, ...]:
    """A pattern that spreads the dense layers evenly, the last of them last.

    >>> dense_layers(8, 0.75)
    (False, False, False, True, False, False, False, True)
    """
    dense = round((1 - sparse_share) * layers)
    return tuple((i + 1) * dense // layers > i * dense // layers for i in range(layers))


def take_all_memory() -> None:
    """Lets jax take nearly all of a GPU's memory at its start, for the largest sizes to fit."""
    set_memory_fraction(0.94)


def default_config() -> ServePathConfig:
    """The default for this backend: an 8B model on a GPU, a tiny one elsewhere."""
    if jax.default_backend() == "gpu":
        return ServePathConfig(attention="mosaic_gpu")
    return ServePathConfig(
        model="tiny",
        lengths=(256, 1024),
        decode_batches=(1, 2),
        sink=16,
        window=32,
        block=16,
        pool=8,
        chunk=256,
        steps=4,
    )
