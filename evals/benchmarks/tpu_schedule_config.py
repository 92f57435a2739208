"""What the TPU compiler is asked in `bench tpu-schedule`."""

from dataclasses import dataclass
from typing import Literal, get_args

from routing_jax.evals.benchmarks.tpu_programs import CHIPS

Part = Literal["schedule", "memory"]
Pass = Literal["forward", "backward"]
Program = Literal["forward", "backward", "decode"]


@dataclass(frozen=True)
class TpuScheduleConfig:
    """Sizes of the programs; causal, bfloat16, batch 1.

    Attributes:
      parts: 'schedule' counts the bundles of ours and of splash attention; 'memory' compiles a
        grid of calls, whose rows all are dense or all list blocks, and records what they need.
      passes: of part 'schedule', of ours; the forward pass has splash's beside it.
      chips: TPU generations.
      length: T of part 'schedule', a multiple of block and of every tile.
      sparse_length: T at which ours is also counted with lists.
      blocks: key blocks that a query tile lists; 0 for every visible one.
      head_dims: H of part 'schedule'.
      num_heads: N of part 'schedule'.
      num_kv_heads: K of part 'schedule'; divides N.
      block: queries a tile and keys a block.
      tiles: splash's block_q, block_kv and block_kv_compute, among which the best is taken.
      memory_programs: what part 'memory' compiles; 'decode' is one query of one sequence.
      memory_lengths: T of part 'memory'; of 'decode', keys in the pool.
      memory_head_dims: H of part 'memory'.
      memory_heads: N of part 'memory', one group: what a chip holds of a model split by kv heads.
      memory_blocks: blocks listed a tile in part 'memory', or pages a kv head.
      seed: of the tables.
    """

    parts: tuple[Part, ...] = ("schedule",)
    passes: tuple[Pass, ...] = get_args(Pass)
    chips: tuple[str, ...] = tuple(CHIPS)
    length: int = 32768
    sparse_length: int = 131072
    blocks: tuple[int, ...] = (0, 256, 128, 64, 32, 16)
    head_dims: tuple[int, ...] = (128, 64, 256)
    num_heads: int = 32
    num_kv_heads: int = 8
    block: int = 128
    tiles: tuple[tuple[int, int, int], ...] = (
        (512, 1024, 512),
        (1024, 1024, 512),
        (1024, 1024, 1024),
        (1024, 2048, 512),
        (2048, 2048, 512),
    )
    memory_programs: tuple[Program, ...] = get_args(Program)
    memory_lengths: tuple[int, ...] = (4096, 32768, 131072, 1048576)
    memory_head_dims: tuple[int, ...] = (64, 128, 256)
    memory_heads: int = 4
    memory_blocks: int = 64
    seed: int = 0

    def __post_init__(self):
        for name in ("parts", "passes", "chips", "head_dims", "tiles", "memory_programs"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give at least one.")
        choices = {
            "parts": get_args(Part),
            "passes": get_args(Pass),
            "chips": tuple(CHIPS),
            "memory_programs": get_args(Program),
        }
        for name, accepted in choices.items():
            for value in getattr(self, name):
                if value not in accepted:
                    raise ValueError(f"{name} holds {value!r}; accepted: {', '.join(accepted)}.")
        for name in ("num_heads", "num_kv_heads", "block", "memory_heads", "memory_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads is {self.num_kv_heads}; it must divide num_heads, {self.num_heads}."
            )
        if min(self.blocks, default=0) < 0:
            raise ValueError(f"blocks holds {min(self.blocks)}; 0 stands for all.")
        for name in ("length", "sparse_length"):
            if getattr(self, name) < self.block or getattr(self, name) % self.block:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be a multiple of block, "
                    f"{self.block}."
                )
        for tile in self.tiles:
            if any(self.length % size for size in tile) or tile[1] % tile[2]:
                raise ValueError(
                    f"tiles holds {tile}; each size must divide length, {self.length}, and the "
                    "last the second."
                )
