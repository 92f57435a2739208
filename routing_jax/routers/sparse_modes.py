"""What a layer attends to as it is routed: streaming, triangle, top blocks, everything.

The modes of Flux Attention (arXiv 2604.07394) as rows of one block table, in which the samples
that are routed to full attention are dense, or search for blocks themselves: one call of
block-sparse attention serves them all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import chex
import jax
import jax.numpy as jnp

from routing_jax.kernels import BlockTable, table_from_scores, with_dense_rows
from routing_jax.routers.block_config import BlockImplementation

SparseMode = Literal["streaming", "triangle", "topk"]
Retrieval = Literal["full", "topk"]
Answers = Literal["full", "topk"]


@dataclass(frozen=True)
class SparseModeConfig:
    """What sparse attention of a layer is, and what full attention is.

    Sink and window are rounded up to whole key blocks.

    Attributes:
      mode: streaming: the first tokens and a window (StreamingLLM, arXiv 2309.17453). triangle:
        the same, and from the prompt's last tokens on everything (TriangleMix, arXiv 2507.21526).
        topk: triangle, and the blocks that a tile's first query finds by a few channels of their
        keys (`search_scores`).
      retrieval: what a layer does that is routed to full attention. full: it attends to everything.
        topk: while it reads the prompt, to what sparse layers of mode topk attend to.
      answers: what tokens after the prompt do in a layer that searches, in either place. full: they
        attend to everything. topk: each attends to sink and window, and to the blocks that its
        own query finds.
      sink: first tokens of the sequence that every query sees.
      window: tokens before a query that it sees; its own block is one of the window's blocks.
      last: for triangle and topk, how many last tokens of the prompt attend everywhere, as what
        follows the prompt does where `answers` does not say otherwise.
      blocks: for topk, in either place, key blocks besides sink and window.
      channels: for topk, in either place, channels of queries and keys by which a block is found,
        those that RoPE turns slowest; even. None for a quarter of a head's.
      block_q: queries a tile; divides block_kv.
      block_kv: keys a block.
      implementation: of block-sparse attention; None for the best one here.

    >>> SparseModeConfig(mode="sparse")
    Traceback (most recent call last):
    ValueError: sparse.mode is 'sparse'; accepted: streaming, triangle, topk.
    """

    mode: SparseMode = "streaming"
    retrieval: Retrieval = "full"
    answers: Answers = "full"
    sink: int = 128
    window: int = 1024
    last: int = 128
    blocks: int = 16
    channels: int | None = None
    block_q: int = 128
    block_kv: int = 128
    implementation: BlockImplementation | None = None

    def __post_init__(self):
        if self.mode not in get_args(SparseMode):
            raise ValueError(
                f"sparse.mode is {self.mode!r}; accepted: {', '.join(get_args(SparseMode))}."
            )
        if self.retrieval not in get_args(Retrieval):
            raise ValueError(
                f"sparse.retrieval is {self.retrieval!r}; accepted: "
                f"{', '.join(get_args(Retrieval))}."
            )
        if self.answers not in get_args(Answers):
            raise ValueError(
                f"sparse.answers is {self.answers!r}; accepted: {', '.join(get_args(Answers))}."
            )
        if self.answers == "topk" and not self.searches:
            raise ValueError(
                f"sparse.answers is 'topk', sparse.mode {self.mode!r} and sparse.retrieval "
                f"{self.retrieval!r}; one of the last two must be topk."
            )
        for name in ("sink", "window", "last", "blocks", "block_q", "block_kv"):
            if getattr(self, name) < 1:
                raise ValueError(f"sparse.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.block_kv % self.block_q:
            raise ValueError(
                f"sparse.block_q is {self.block_q}; it must divide sparse.block_kv = "
                f"{self.block_kv}."
            )
        if self.channels is not None and (self.channels < 2 or self.channels % 2):
            raise ValueError(
                f"sparse.channels is {self.channels}; it must be an even number, at least 2, or "
                "None."
            )
        if self.implementation not in (*get_args(BlockImplementation), None):
            raise ValueError(
                f"sparse.implementation is {self.implementation!r}; accepted: "
                f"{', '.join(get_args(BlockImplementation))}, None."
            )

    @classmethod
    def from_saved(cls, values: Mapping[str, Any]) -> "SparseModeConfig":
        """The config that a file holds, of this version or of one that found blocks otherwise.

        Blocks were once found by means of their keys (`means`), and by weights that were learned
        from so many queries (`taught`); no router knows by what they are found.

        Args:
          values: its fields.

        Raises:
          TypeError: a field that no version without learned weights had.

        >>> SparseModeConfig.from_saved({"blocks": 8, "means": 8, "taught": 0}).blocks
        8
        """
        old = {"means", *(["taught"] if not values.get("taught") else [])}
        return cls(**{name: value for name, value in values.items() if name not in old})

    @property
    def sink_blocks(self) -> int:
        """Key blocks of the sink.

        >>> SparseModeConfig(sink=130).sink_blocks
        2
        """
        return -(-self.sink // self.block_kv)

    @property
    def window_blocks(self) -> int:
        """Key blocks of the window, a query's own one included.

        >>> SparseModeConfig(window=1024).window_blocks
        8
        """
        return -(-self.window // self.block_kv)

    def channels_of(self, head_dim: int) -> int:
        """Channels by which blocks are found.

        Args:
          head_dim: H.

        Raises:
          ValueError: a head has fewer.

        >>> SparseModeConfig().channels_of(64), SparseModeConfig(channels=8).channels_of(64)
        (16, 8)
        """
        if self.channels is None:
            return max(2, head_dim // 8 * 2)
        if self.channels > head_dim:
            raise ValueError(
                f"sparse.channels is {self.channels}; it must be at most head_dim = {head_dim}."
            )
        return self.channels

    @property
    def reach(self) -> int:
        """Tokens of the longest prompt of which every query sees everything, in any mode.

        >>> SparseModeConfig(sink=128, window=1000).reach
        1152
        """
        return (self.sink_blocks + self.window_blocks) * self.block_kv

    @property
    def forgets(self) -> bool:
        """Whether, once a prompt is read, no later token needs more keys than sink and window.

        >>> SparseModeConfig().forgets, SparseModeConfig(mode="triangle").forgets
        (True, False)
        """
        return self.mode == "streaming"

    @property
    def rereads(self) -> bool:
        """Whether, once a prompt is read, some samples' tokens attend to everything.

        >>> SparseModeConfig().rereads
        True
        >>> SparseModeConfig(retrieval="topk", answers="topk").rereads
        False
        """
        return self.answers == "full" or self.retrieval == "full" or self.mode == "triangle"

    @property
    def searches(self) -> bool:
        """Whether some samples attend to blocks that score best.

        >>> SparseModeConfig().searches, SparseModeConfig(retrieval="topk").searches
        (False, True)
        """
        return "topk" in (self.mode, self.retrieval)

    def searched(self, dense: jax.Array) -> jax.Array:
        """Which samples attend to blocks that score best.

        Args:
          dense: bool, the samples routed to full attention.

        >>> SparseModeConfig(retrieval="topk").searched(jnp.array([True, False])).tolist()
        [True, False]
        """
        return jnp.where(dense, self.retrieval == "topk", self.mode == "topk")

    def searched_after(self, dense: jax.Array) -> jax.Array:
        """Which samples' tokens search by their own queries once the prompt is read.

        Args:
          dense: bool, the samples routed to full attention.

        >>> SparseModeConfig(retrieval="topk").searched_after(jnp.array([True, False])).tolist()
        [False, False]
        """
        return self.searched(dense) & (self.answers == "topk")


def streaming_table(config: SparseModeConfig, starts: jax.Array) -> BlockTable:
    """Sink and window of each tile, as arithmetic on where it starts.

    Args:
      config: sizes; its mode is not read.
      starts: [B,M] int32, where each tile's first query stands; multiples of block_q.

    Returns:
      A table with K = 1 and C = sink_blocks + window_blocks.

    >>> config = SparseModeConfig(sink=8, window=16, block_q=8, block_kv=8)
    >>> table = streaming_table(config, jnp.array([[0, 8, 24]]))
    >>> table.counts.tolist(), table.indices.tolist()
    ([[[1, 2, 3]]], [[[[0, 0, 0], [0, 1, 0], [0, 2, 3]]]])
    """
    chex.assert_rank(starts, 2)
    own = starts.astype(jnp.int32)[:, None] // config.block_kv
    low = jnp.maximum(own - config.window_blocks + 1, 0)
    sinks = jnp.minimum(low, config.sink_blocks)
    counts = sinks + own - low + 1
    capacity = config.sink_blocks + config.window_blocks
    slots = jnp.arange(capacity, dtype=jnp.int32)[None, None, None]
    after = (low - sinks)[..., None]
    blocks = slots + jnp.where(slots < sinks[..., None], 0, after)
    blocks = jnp.where(slots < counts[..., None], blocks, 0)
    return BlockTable(counts, blocks, config.block_q, config.block_kv)


def layer_table(
    config: SparseModeConfig,
    dense: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    scores: jax.Array | None = None,
) -> BlockTable:
    """Rows for one layer and a batch of which some samples attend fully and others sparsely.

    A sample's rows depend on `starts` tile by tile, so a chunk of a prompt, or the tile of a token
    that is decoded, has the rows that it has in the whole.

    Args:
      config: what sparse and full are.
      dense: [B] bool, the samples routed to full attention.
      starts: [B,M] or [1,M] int32, where each tile's first query stands.
      lengths: [B] int32, tokens of each prompt; what follows is the answer.
      scores: where `config.searches`, [B,K,M,J] float32 such as `search_scores`; −inf bars a
        block.

    Returns:
      A table with the B of `dense`, to be used as `block_sparse_attention` takes it; of positions
      past a sequence's last token, the kernel knows.

    Raises:
      ValueError: topk without scores, or scores without it.

    >>> config = SparseModeConfig(sink=8, window=8, block_q=8, block_kv=8)
    >>> dense, starts = jnp.array([True, False]), jnp.arange(0, 32, 8)[None]
    >>> layer_table(config, dense, starts, jnp.array([32, 30])).counts.tolist()
    [[[-1, -1, -1, -1]], [[1, 2, 2, 2]]]
    """
    chex.assert_rank([dense, starts, lengths], [1, 2, 1])
    if (scores is not None) != config.searches:
        given = "none" if scores is None else "some"
        raise ValueError(
            f"sparse.mode is {config.mode!r}, sparse.retrieval {config.retrieval!r}, and scores "
            f"are {given}; topk needs them."
        )
    ends = starts + config.block_q
    last = ends > (lengths - config.last)[:, None]
    last &= (starts < lengths[:, None]) | ~config.searched_after(dense)[:, None]
    whole = jnp.where(
        dense[:, None], (config.retrieval == "full") | last, (config.mode != "streaming") & last
    )
    if scores is None:
        table = streaming_table(config, starts)
    else:
        own = starts[:, None, :, None] // config.block_kv
        blocks = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None, None, None]
        near = blocks > own - config.window_blocks
        ranked = jnp.where(near, jnp.finfo(jnp.float32).max, scores)
        # A sample that does not search has room for sink and window, which outrank all others.
        least = config.sink_blocks + config.window_blocks
        room = least + jnp.where(config.searched(dense), config.blocks, 0)
        table = table_from_scores(
            ranked,
            least + config.blocks,
            block_q=config.block_q,
            block_kv=config.block_kv,
            sinks=config.sink_blocks,
            row_limits=room[:, None, None],
            tile_starts=jnp.broadcast_to(starts, (scores.shape[0], starts.shape[1])),
        ).table
    return with_dense_rows(table, whole[:, None])
