"""What the mixing benchmark measures, and how long it may take."""

import os
from dataclasses import dataclass
from typing import Literal, get_args

import jax

Part = Literal["mixing", "decode", "projections", "layer"]


@dataclass(frozen=True)
class MixingBenchConfig:
    """Sizes and timing of the mixing benchmark; batch 1.

    Attributes:
      parts: what is measured, in this order.
      lengths: sequence lengths T; for part 'decode', lengths of the cache.
      usages: shares of tokens that attend, 0 to 1; 'decode' has only routed and not routed.
      num_heads: N, query heads.
      num_kv_heads: K, key/value heads; divides N.
      head_dim: H.
      width: D; must be N·H, since 'mixing' leaves the output projection out.
      conv_width: W, taps of the convolution.
      router_hidden: hidden width of the token router.
      dtype: 'bfloat16' or 'float32', of everything but the router.
      repeats: samples a measurement is the median of.
      chain: most calls in one compiled program; fewer for long sequences, whose calls are long.
      target_ms: a sample dispatches programs until it takes about this long.
      cache_bytes: inputs are rotated among sets that together exceed this; 0 for one set.
      compile_threads: programs compiled at a time.
      seconds: time for all; what is not begun by then is reported as skipped. 0 for no limit.
      seed: of inputs, weights and of which tokens attend.
    """

    parts: tuple[Part, ...] = get_args(Part)
    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536)
    usages: tuple[float, ...] = (0.0, 0.001, 0.01, 0.05, 0.125, 0.25, 0.5, 1.0)
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    width: int = 4096
    conv_width: int = 4
    router_hidden: int = 16
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    repeats: int = 5
    chain: int = 8
    target_ms: float = 25.0
    cache_bytes: int = 100_000_000
    compile_threads: int = 1
    seconds: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name in ("parts", "lengths", "usages"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give at least one.")
        for part in self.parts:
            if part not in get_args(Part):
                raise ValueError(f"parts holds {part!r}; accepted: {', '.join(get_args(Part))}.")
        positive = ("num_heads", "num_kv_heads", "head_dim", "conv_width", "router_hidden")
        for name in (*positive, "repeats", "chain", "compile_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if min(self.lengths) < self.conv_width:
            raise ValueError(
                f"lengths holds {min(self.lengths)}; each must be at least conv_width, "
                f"{self.conv_width}."
            )
        for usage in self.usages:
            if not 0 <= usage <= 1:
                raise ValueError(f"usages holds {usage}; each must lie between 0 and 1.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads is {self.num_kv_heads}; it must divide num_heads, {self.num_heads}."
            )
        if self.width != self.num_heads * self.head_dim:
            raise ValueError(
                f"width is {self.width}; it must be num_heads·head_dim, "
                f"{self.num_heads * self.head_dim}."
            )
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype is {self.dtype!r}; accepted: 'bfloat16', 'float32'.")

    def calls(self, length: int) -> int:
        """Calls chained in one program at a length: fewer as the square of the length grows.

        >>> config = MixingBenchConfig(chain=8)
        >>> [config.calls(length) for length in (4096, 32768, 65536)]
        [8, 8, 2]
        """
        return max(1, min(self.chain, self.chain * 32768**2 // length**2))


def default_config() -> MixingBenchConfig:
    """The default for this backend: an H100's worth of heads on a GPU, one small head on a CPU.

    The CPU's head (N = K = 1, H = 64, float32) lets dense attention over 64k tokens end in tens
    of seconds on two cores; its ratios, not its milliseconds, say something of larger models.
    """
    if jax.default_backend() != "cpu":
        threads = max(1, (os.cpu_count() or 1) - 1)
        return MixingBenchConfig(compile_threads=threads, seconds=90)
    return MixingBenchConfig(
        num_heads=1,
        num_kv_heads=1,
        head_dim=64,
        width=64,
        dtype="float32",
        repeats=3,
        chain=4,
        target_ms=50,
        cache_bytes=0,
        seconds=1200,
    )
