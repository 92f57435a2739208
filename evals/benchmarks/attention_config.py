"""What the attention benchmark measures, and how long it may take."""

import os
from dataclasses import dataclass
from typing import Literal, get_args

import jax

Part = Literal["ceiling", "agreement", "forward", "forward_backward", "decode", "table"]
Peer = Literal["block_sparse", "fused", "dense", "flex"]
Variant = Literal["few_queries", "block_bias", "group3", "blocks64"]


@dataclass(frozen=True)
class AttentionBenchConfig:
    """Sizes and timing of the attention benchmark; causal, batch 1 but for decoding.

    Attributes:
      parts: what is measured, in this order.
      peers: who is measured: this library, the same with a backward pass that need not be
        deterministic, dense attention (cuDNN on a GPU, XLA elsewhere), and FlexAttention, which
        needs PyTorch with CUDA.
      implementation: the implementation of block-sparse attention and decoding to measure; None
        for the one it picks itself.
      lengths: sequence lengths T, multiples of block.
      blocks: key blocks that a query tile lists; 0 for every visible one.
      head_dims: H.
      num_heads: N, query heads.
      num_kv_heads: K, key/value heads; divides N.
      block: queries a tile and keys a block.
      variants: further cases of the first length: compacted queries with dense rows, a bias on
        each block, 9 query heads over 3 of head dim 64, and blocks half as long.
      variant_blocks: key blocks a tile lists in them.
      few_queries: how many compacted queries the first variant has.
      dense_up_to: the longest T at which every visible block is attended to.
      backward_up_to: the longest T of part 'forward_backward'.
      agreement_length: T of part 'agreement', which compares all peers with float32.
      decode_batches: sequences that decode together.
      decode_length: keys in the cache of each.
      decode_pages: pages of `block` keys that a head reads; 0 for all of them.
      table_length: T at which building a table is timed.
      table_blocks: key blocks a tile lists in it.
      matmul_size: width of the square matrices of the matmul ceiling.
      copy_bytes: size of the array of the bandwidth ceiling.
      dtype: 'bfloat16' or 'float32'.
      repeats: samples a measurement is the median of.
      chain: most calls in one compiled program.
      target_ms: a sample takes about this long.
      cache_bytes: inputs are rotated among sets that together exceed this; 0 for one set.
      compile_threads: programs compiled at a time.
      seconds: time for all; what is not begun by then is reported as skipped. 0 for no limit.
      seed: of inputs and tables.
    """

    parts: tuple[Part, ...] = get_args(Part)
    peers: tuple[Peer, ...] = get_args(Peer)
    implementation: str | None = None
    lengths: tuple[int, ...] = (32768, 8192, 131072, 262144)
    blocks: tuple[int, ...] = (0, 64, 32, 16)
    head_dims: tuple[int, ...] = (128, 64, 256)
    num_heads: int = 32
    num_kv_heads: int = 8
    block: int = 128
    variants: tuple[Variant, ...] = get_args(Variant)
    variant_blocks: tuple[int, ...] = (0, 64, 16)
    few_queries: int = 328
    dense_up_to: int = 131072
    backward_up_to: int = 131072
    agreement_length: int = 2048
    decode_batches: tuple[int, ...] = (8, 1)
    decode_length: int = 131072
    decode_pages: tuple[int, ...] = (0, 64, 16)
    table_length: int = 131072
    table_blocks: int = 64
    matmul_size: int = 8192
    copy_bytes: int = 1 << 30
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    repeats: int = 5
    chain: int = 256
    target_ms: float = 25.0
    cache_bytes: int = 100_000_000
    compile_threads: int = 1
    seconds: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name, accepted in (("parts", Part), ("peers", Peer), ("variants", Variant)):
            for value in getattr(self, name):
                if value not in get_args(accepted):
                    known = ", ".join(get_args(accepted))
                    raise ValueError(f"{name} holds {value!r}; accepted: {known}.")
        for name in ("parts", "peers", "lengths", "blocks", "head_dims"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give at least one.")
        positive = ("num_heads", "num_kv_heads", "few_queries", "table_blocks", "matmul_size")
        for name in (*positive, "repeats", "chain", "compile_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.block < 2 or self.block % 2:
            raise ValueError(f"block is {self.block}; it must be even, one variant halves it.")
        for name in ("lengths", "agreement_length", "decode_length", "table_length"):
            value = getattr(self, name)
            for length in value if isinstance(value, tuple) else (value,):
                if length < self.block or length % self.block:
                    raise ValueError(
                        f"{name} holds {length}; it must be a multiple of block, {self.block}."
                    )
        for name in ("blocks", "variant_blocks", "decode_pages"):
            if min(getattr(self, name), default=0) < 0:
                raise ValueError(f"{name} holds {min(getattr(self, name))}; 0 stands for all.")
        for name in ("head_dims", "decode_batches"):
            if min(getattr(self, name), default=1) < 1:
                raise ValueError(f"{name} holds {min(getattr(self, name))}; it must be at least 1.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads is {self.num_kv_heads}; it must divide num_heads, {self.num_heads}."
            )
        if self.few_queries > self.lengths[0]:
            raise ValueError(
                f"few_queries is {self.few_queries}; the first of lengths is {self.lengths[0]}."
            )
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype is {self.dtype!r}; accepted: 'bfloat16', 'float32'.")


def default_config() -> AttentionBenchConfig:
    """The default for this backend: the sizes of an H100 on a GPU, tiny ones on a CPU.

    The CPU's figures say that the program works, and how its work falls with the blocks listed.
    """
    if jax.default_backend() != "cpu":
        threads = max(1, (os.cpu_count() or 1) - 1)
        return AttentionBenchConfig(compile_threads=threads, seconds=540)
    return AttentionBenchConfig(
        peers=("block_sparse", "dense", "flex"),
        lengths=(2048, 4096),
        blocks=(0, 16, 8, 4),
        head_dims=(64,),
        num_heads=2,
        num_kv_heads=1,
        block=64,
        variant_blocks=(0, 4),
        agreement_length=512,
        decode_batches=(2, 1),
        decode_length=8192,
        decode_pages=(0, 16, 4),
        table_length=4096,
        table_blocks=8,
        matmul_size=512,
        copy_bytes=1 << 24,
        dtype="float32",
        repeats=3,
        chain=2,
        cache_bytes=0,
        seconds=300,
    )
