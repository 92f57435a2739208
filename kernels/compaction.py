"""Compaction: run a function only on the tokens that were routed to it, losing none.

The routed tokens are gathered into the smallest of a few static capacities that holds them all,
so the shapes are known to the compiler while the work follows the count.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp


def capacity_ladder(length: int) -> tuple[int, ...]:
    """The static capacities that compaction chooses among: 0, a geometric ladder, everything.

    Two steps an octave from length/256 (at least 8) to length/4. Beyond a quarter, gathered
    queries against all keys cost as much as dense causal attention, so the next step is the whole.

    Args:
      length: T, the number of tokens of a sequence.

    >>> capacity_ladder(128)
    (0, 8, 12, 16, 24, 32, 128)
    """
    if length < 1:
        raise ValueError(f"length must be at least 1; it is {length}.")
    ladder = [0]
    step = max(8, 1 << max(0, (length // 256).bit_length() - 1))
    while step <= length // 4:
        ladder.append(step)
        if step + step // 2 <= length // 4:
            ladder.append(step + step // 2)
        step *= 2
    return (*ladder, length)


def compact(mask: jax.Array, capacity: int) -> jax.Array:
    """The positions of a mask's true entries, ascending, in `capacity` slots.

    Args:
      mask: [B,T] bool, with at most `capacity` true entries a row.
      capacity: C, a static number of slots.

    Returns:
      [B,C] int32 positions; unused slots come last and hold −1.

    >>> compact(jnp.array([[False, True, False, True]]), 3).tolist()
    [[1, 3, -1]]
    """
    chex.assert_rank(mask, 2)
    B, T = mask.shape
    slot = jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, capacity)
    rows = jnp.arange(B)[:, None]
    positions = jnp.full((B, capacity), -1, jnp.int32)
    source = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    return positions.at[rows, slot].set(source, mode="drop")


def map_routed(
    fn: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    mask: jax.Array,
    otherwise: jax.Array | None = None,
    ladder: tuple[int, ...] | None = None,
) -> jax.Array:
    """`where(mask, fn(x), otherwise)`, with `fn` run only on the routed tokens.

    `fn` must treat tokens one by one, given their positions (it may look at other tokens through
    arrays it closes over, as attention does). The branch is picked by the fullest row of this
    batch; with no routed token nothing runs at all. Call it outside `vmap`, and inside
    `shard_map` on a mesh, so that each device picks its own branch.

    Args:
      fn: (tokens [B,C,D], positions [B,C]) -> [B,C,E]; a position of −1 marks an unused slot.
      x: [B,T,D].
      mask: [B,T] bool, which tokens are routed.
      otherwise: [B,T,E], what the other tokens get; 0 when None. The routed ones are written over
        it, so that it is neither copied nor read.
      ladder: capacities, rising from 0 to T; `capacity_ladder(T)` when None.

    Returns:
      [B,T,E], equal to the masked computation within rounding.

    >>> x = jnp.arange(6.0).reshape(1, 6, 1)
    >>> map_routed(lambda x, _: 10 * x, x, x[..., 0] == 3).ravel().tolist()
    [0.0, 0.0, 0.0, 30.0, 0.0, 0.0]
    """
    chex.assert_shape(mask, x.shape[:2])
    B, T = mask.shape
    rows = jnp.arange(B)[:, None]
    ladder = ladder or capacity_ladder(T)

    if otherwise is None:
        out = jax.eval_shape(fn, x, jax.ShapeDtypeStruct(mask.shape, jnp.int32))
        otherwise = jnp.zeros(out.shape, out.dtype)
    others: jax.Array = otherwise

    def some(capacity: int) -> Callable[[jax.Array], jax.Array]:
        def run(others: jax.Array) -> jax.Array:
            positions = compact(mask, capacity)
            chosen = x[rows, jnp.maximum(positions, 0)]
            target = jnp.where(positions < 0, T, positions)
            found = fn(chosen, positions).astype(others.dtype)
            return others.at[rows, target].set(found, mode="drop")

        return run

    def everything(others: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        return jnp.where(mask[:, :, None], fn(x, positions).astype(others.dtype), others)

    branches = [lambda others: others, *(some(c) for c in ladder[1:-1]), everything]
    fullest = jnp.max(jnp.sum(mask, axis=1, dtype=jnp.int32))
    # The first step that holds them, by counting: searchsorted is a loop, of a dozen GPU kernels.
    step = jnp.sum(jnp.array(ladder) < fullest, dtype=jnp.int32)
    return jax.lax.switch(step, branches, others)
