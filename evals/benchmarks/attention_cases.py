"""The cases of the attention benchmark: their sizes, their tables, and how much work they are."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from routing_jax.evals.benchmarks.attention_config import AttentionBenchConfig, Part, Variant
from routing_jax.kernels import BlockTable, dense_table, row_lengths, table_from_scores


class Case(NamedTuple):
    """One size to measure.

    Attributes:
      part: of the benchmark.
      variant: what is special about it; None for nothing.
      batch: B.
      length: S, keys.
      queries: T; fewer than S for compacted queries and for decoding.
      blocks: key blocks listed a tile or, in decoding, a sequence; 0 for every visible one.
      block: queries a tile and keys a block.
      head_dim: H.
      num_heads: N.
      num_kv_heads: K.
    """

    part: Part
    variant: Variant | None
    batch: int
    length: int
    queries: int
    blocks: int
    block: int
    head_dim: int
    num_heads: int
    num_kv_heads: int

    @property
    def num_blocks(self) -> int:
        """J, key blocks."""
        return -(-self.length // self.block)


def _case(config: AttentionBenchConfig, part: Part, length: int, blocks: int, **other) -> Case:
    plain = Case(
        part,
        None,
        1,
        length,
        length,
        blocks,
        config.block,
        config.head_dims[0],
        config.num_heads,
        config.num_kv_heads,
    )
    return plain._replace(**other)


def _variants(config: AttentionBenchConfig, part: Part, length: int) -> list[Case]:
    changes: dict[Variant, dict] = {
        "few_queries": {"queries": min(config.few_queries, length)},
        "block_bias": {},
        "group3": {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64},
        "blocks64": {"block": config.block // 2},
    }
    return [
        _case(config, part, length, blocks, variant=name, **changes[name])
        for name in config.variants
        for blocks in ((0,) if name == "few_queries" else config.variant_blocks)
        if blocks or name != "block_bias"  # dense rows have no bias
    ]


def cases(config: AttentionBenchConfig, part: Part) -> list[Case]:
    """The cases of one part, the more important first, so that a time limit cuts the others.

    Args:
      config: sizes.
      part: any but 'ceiling', which has no attention in it.

    >>> config = AttentionBenchConfig(lengths=(1024,), head_dims=(64,), blocks=(0, 2), variants=())
    >>> [case.blocks for case in cases(config, "forward")]
    [0, 2]
    """
    if part == "decode":
        return [
            _case(config, part, config.decode_length, pages, batch=batch, queries=1)
            for batch in config.decode_batches
            for pages in config.decode_pages
            if pages < config.decode_length // config.block
        ]
    if part == "table":
        return [_case(config, part, config.table_length, config.table_blocks)]
    if part == "agreement":
        sparse = [blocks for blocks in config.blocks if blocks]
        short = dataclasses.replace(config, variant_blocks=(min(sparse, default=0),))
        length = config.agreement_length
        blocks_of = dict.fromkeys((0, *short.variant_blocks))
        plain = [_case(config, part, length, blocks) for blocks in blocks_of]
        return [*plain, *_variants(short, part, length)]
    longest = config.backward_up_to if part == "forward_backward" else max(config.lengths)
    found = [
        _case(config, part, length, blocks, head_dim=head_dim)
        for head_dim in config.head_dims
        for length in config.lengths
        for blocks in config.blocks
        if length <= longest and blocks < length // config.block
        if blocks or length <= config.dense_up_to
    ]
    if config.lengths[0] > longest:
        return found
    first = [c for c in found if (c.length, c.head_dim) == (config.lengths[0], config.head_dims[0])]
    rest = [case for case in found if case not in first]
    return [*first, *_variants(config, part, config.lengths[0]), *rest]


@functools.partial(jax.jit, static_argnums=1)
def random_scores(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """What a router might give: independent uniform numbers, float32."""
    return jax.random.uniform(jax.random.key(seed, impl="rbg"), shape)


@functools.partial(jax.jit, static_argnums=0)
def make_table(case: Case, seed: int) -> BlockTable:
    """The table of a case: dense rows, or for each tile its own block and random earlier ones.

    Args:
      case: see `Case`; each of its kv heads has lists of its own.
      seed: another one gives other lists.

    >>> case = cases(AttentionBenchConfig(lengths=(1024,), blocks=(2,), variants=()), "forward")[0]
    >>> make_table(case, 0).counts[0, 0].tolist()
    [1, 2, 2, 2, 2, 2, 2, 2]
    """
    if not case.blocks:
        return dense_table(case.queries, case.length, block_q=case.block, block_kv=case.block)
    shape = (1, case.num_kv_heads, -(-case.queries // case.block), case.num_blocks)
    scores = random_scores(seed, shape)
    return table_from_scores(scores, case.blocks, block_q=case.block, block_kv=case.block).table


def make_positions(case: Case, seed: int) -> np.ndarray | None:
    """Where compacted queries stand [1,T], ascending; None where each stands at its own index."""
    if case.queries in (1, case.length):
        return None
    chosen = np.random.default_rng(seed).permutation(case.length)[: case.queries]
    return np.sort(chosen).astype(np.int32)[None]


def random_pages(case: Case, seed: int) -> tuple[jax.Array, jax.Array]:
    """The blocks that each sequence and kv head reads: counts [B,K] and blocks [B,K,C], int32."""
    shape = (case.batch, case.num_kv_heads)
    pages = case.blocks or case.num_blocks
    _, blocks = jax.lax.top_k(random_scores(seed, (*shape, case.num_blocks)), pages)
    return jnp.full(shape, pages, jnp.int32), jnp.sort(blocks, axis=-1).astype(jnp.int32)


@functools.cache
def listed_blocks(case: Case, seed: int) -> int:
    """How many pairs of a query tile and a key block are listed, over all sequences and kv heads.

    A partly visible block counts whole.
    """
    if case.part == "decode":
        return case.batch * case.num_kv_heads * (case.blocks or case.num_blocks)
    table, positions = make_table(case, seed), make_positions(case, seed)
    at = None if positions is None else jnp.asarray(positions)
    lengths = row_lengths(table, case.queries, case.length, q_positions=at)
    return int(np.asarray(lengths, np.int64).sum()) * (case.num_kv_heads // lengths.shape[1])


def flops(case: Case, listed: int) -> float:
    """Floating-point operations on the listed blocks of every query head.

    A forward pass has two products of 2·block²·H each a block; forward and backward have seven.
    """
    products = 7 if case.part == "forward_backward" else 2
    group = case.num_heads // case.num_kv_heads
    return 2.0 * products * case.block**2 * case.head_dim * group * listed


def dense_flops(case: Case) -> float:
    """The same of causal attention by its T²/2 pairs of a query and a key."""
    products = 7 if case.part == "forward_backward" else 2
    return float(products) * case.length**2 * case.head_dim * case.num_heads


def page_bytes(case: Case, pages: int, itemsize: int) -> int:
    """Bytes of keys and values in so many pages of one kv head."""
    return 2 * pages * case.block * case.head_dim * itemsize
