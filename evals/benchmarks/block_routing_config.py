"""What the block-routing benchmark measures, and how long it may take."""

import os
from dataclasses import dataclass, field
from typing import Literal, get_args

import jax

from routing_jax.attention import HeadsConfig
from routing_jax.evals.benchmarks.running import set_memory_fraction
from routing_jax.models import DecoderConfig
from routing_jax.routers import BlockRouterConfig

Part = Literal["attention", "layer", "router", "model"]
Pass = Literal["forward", "training"]


@dataclass(frozen=True)
class BlockRoutingBenchConfig:
    """Sizes and timing of the block-routing benchmark; batch 1, random weights.

    Attributes:
      parts: what is measured, in this order: attention with queries, keys and values given, the
        whole layer, the router alone, and a whole model.
      passes: forward (of a model: prefill, its cache filled) and training: forward and backward
        (of a model: the loss, its gradients and a plain step down them). A router has no training.
      lengths: sequence lengths T, the more important first.
      fractions: budgets, shares of the visible blocks.
      listed: blocks a row, of the routers with a fixed number of them.
      router: the router of layers and model; its budget is set to each of `fractions`.
      num_heads: N of the layer.
      num_kv_heads: K of the layer.
      head_dim: H of the layer.
      width: D of the layer.
      model: the whole model; 'block' layers are 'full' ones in the dense model.
      dtype: 'bfloat16' or 'float32', of everything but routers and parameters.
      repeats: samples a measurement is the median of.
      chain: most calls in one compiled program.
      target_ms: a sample takes about this long.
      cache_bytes: inputs are rotated among sets that together exceed this; 0 for one set.
      compile_threads: programs compiled at a time.
      seconds: time for all; what is not begun by then is reported as skipped. 0 for no limit.
      seed: of inputs and weights.
    """

    parts: tuple[Part, ...] = get_args(Part)
    passes: tuple[Pass, ...] = ("training", "forward")
    lengths: tuple[int, ...] = (65536, 8192, 32768, 131072, 16384)
    fractions: tuple[float, ...] = (0.12, 0.25)
    listed: int = 32
    router: BlockRouterConfig = field(
        default_factory=lambda: BlockRouterConfig(block_q=128, block_kv=128)
    )
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    width: int = 4096
    model: DecoderConfig = field(
        default_factory=lambda: DecoderConfig(
            width=512, layers="block*6", num_heads=4, num_kv_heads=4, head_dim=128, mlp_width=1536
        )
    )
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    repeats: int = 5
    chain: int = 32
    target_ms: float = 50.0
    cache_bytes: int = 0
    compile_threads: int = 1
    seconds: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name, accepted in (("parts", Part), ("passes", Pass)):
            for value in getattr(self, name):
                if value not in get_args(accepted):
                    known = ", ".join(get_args(accepted))
                    raise ValueError(f"{name} holds {value!r}; accepted: {known}.")
        for name in ("parts", "passes", "lengths", "fractions"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give at least one.")
        for name in ("num_heads", "num_kv_heads", "head_dim", "width", "repeats", "chain"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.compile_threads < 1:
            raise ValueError(f"compile_threads is {self.compile_threads}; it must be at least 1.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads is {self.num_kv_heads}; it must divide num_heads, {self.num_heads}."
            )
        if min(self.lengths) < self.router.block_kv:
            raise ValueError(
                f"lengths holds {min(self.lengths)}; each must be at least a block of "
                f"{self.router.block_kv} keys."
            )
        for fraction in self.fractions:
            if not 0 < fraction <= 1:
                raise ValueError(f"fractions holds {fraction}; each must lie in (0, 1].")
        if self.listed < self.router.forced + 1:
            raise ValueError(
                f"listed is {self.listed}; it must be at least {self.router.forced + 1}, so that a "
                "row can choose a block."
            )
        if "block" not in self.model.mixers:
            raise ValueError(
                f"model.layers is {self.model.layers!r}; it must have a 'block' layer."
            )
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype is {self.dtype!r}; accepted: 'bfloat16', 'float32'.")

    @property
    def heads(self) -> HeadsConfig:
        """The layer's heads."""
        return HeadsConfig(self.num_heads, self.num_kv_heads, self.head_dim)


def take_all_memory() -> None:
    """Lets jax take nearly all of a GPU's memory at its start, for the longest to fit."""
    set_memory_fraction(0.94)


def default_config() -> BlockRoutingBenchConfig:
    """The default for this backend: the sizes of an H100 on a GPU, tiny ones on a CPU."""
    if jax.default_backend() != "cpu":
        threads = max(1, (os.cpu_count() or 1) - 1)
        return BlockRoutingBenchConfig(compile_threads=threads, seconds=540)
    return BlockRoutingBenchConfig(
        lengths=(4096, 1024),
        listed=8,
        router=BlockRouterConfig(block_q=64, block_kv=64, width=16),
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
        width=128,
        model=DecoderConfig(
            width=128, layers="block*2", num_heads=2, num_kv_heads=1, mlp_width=256, dtype="float32"
        ),
        dtype="float32",
        repeats=3,
        chain=2,
        seconds=300,
    )
