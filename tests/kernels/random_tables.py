"""Random block tables for tests."""

import jax.numpy as jnp
import numpy as np

from routing_jax.kernels import BlockTable


def random_table(
    rng: np.random.Generator,
    *,
    batch: int,
    heads: int,
    tiles: int,
    blocks: int,
    capacity: int,
    block_q: int,
    block_kv: int,
    dense: float = 0.0,
    garbage: bool = True,
) -> BlockTable:
    """Rows of 0 to `capacity` random blocks, in causal order or not; a share of them dense."""
    shape = (batch, heads, tiles)
    counts = rng.integers(0, min(capacity, blocks) + 1, shape)
    counts.flat[0] = 0  # always an empty row, and a full one
    counts.flat[-1] = min(capacity, blocks)
    # Slots past the count are ignored, so they hold what would be an error elsewhere.
    indices = np.full((*shape, capacity), blocks + 7 if garbage else 0)
    for row in np.ndindex(shape):
        chosen = rng.choice(blocks, counts[row], replace=False)
        indices[row][: counts[row]] = np.sort(chosen)
    counts = np.where(rng.random(shape) < dense, -1, counts)
    return BlockTable(
        jnp.asarray(counts, jnp.int32), jnp.asarray(indices, jnp.int32), block_q, block_kv
    )


def listed_sets(table: BlockTable) -> dict[tuple[int, ...], set[int]]:
    """(batch, head, tile) → the blocks that the row lists; nothing for dense rows."""
    counts, indices = np.asarray(table.counts), np.asarray(table.indices)
    return {
        row: set(indices[row][: max(counts[row], 0)].tolist()) for row in np.ndindex(counts.shape)
    }
