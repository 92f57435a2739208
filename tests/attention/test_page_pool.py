"""The page pool: no page has two owners, none is lost, and rings hold what the mask shows."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from routing_jax.attention.page_pool import (
    NO_PAGE,
    held_pages,
    new_pool,
    pages_needed,
    prompt_pages,
    return_pages,
    slot_of_block,
    take_pages,
)
from routing_jax.routers import SparseModeConfig, streaming_table

PAGES, SLOTS = 24, 5
take = jax.jit(take_pages, static_argnums=2)
give = jax.jit(return_pages)


@settings(max_examples=60)
@given(
    st.lists(
        st.one_of(st.lists(st.integers(0, SLOTS), min_size=3, max_size=3), st.integers(0, 2**20)),
        max_size=12,
    )
)
def test_a_page_is_free_or_in_one_table_and_never_lost(deeds):
    pool, rows = new_pool(PAGES), []
    for deed in deeds:
        if isinstance(deed, list):
            if sum(deed) > int(pool.available):
                with pytest.raises(ValueError, match="the pages wanted must be free"):
                    take_pages(pool, jnp.array(deed), SLOTS)
                continue
            pool, pages = take(pool, jnp.array(deed), SLOTS)
            assert ((np.asarray(pages) != NO_PAGE).sum(1) == deed).all()
            rows += list(np.asarray(pages))
        elif rows:
            pool = give(pool, jnp.asarray(rows.pop(deed % len(rows))))
        free = np.asarray(pool.free)[: int(pool.available)].tolist()
        held = [page for row in rows for page in row if page != NO_PAGE]
        assert sorted(free + held) == list(range(PAGES))


@pytest.mark.parametrize(("sink", "window"), [(2, 2), (6, 10)])
@pytest.mark.parametrize("whole", [True, False])
def test_a_sequence_that_grows_sees_what_the_mask_shows(sink, window, whole):
    blocks, sparse = 12, SparseModeConfig(sink=sink, window=window, block_q=2, block_kv=2)
    T = 2 * blocks
    table = streaming_table(sparse, jnp.arange(0, T, 2)[None])
    rows, counts_of_rows = np.asarray(table.indices)[0, 0], np.asarray(table.counts)[0, 0]
    # One sequence of each length, of the same pages.
    lengths, flags = jnp.arange(1, T + 1), jnp.full(T, whole)
    owned = jnp.tile(100 + jnp.arange(blocks)[None], (T, 1))
    held = [np.asarray(x)[:, 0] for x in held_pages(owned, lengths, flags, sparse)]
    kept = np.asarray(prompt_pages(owned, lengths, flags, blocks, sparse))
    slots = np.asarray(slot_of_block(jnp.arange(blocks), jnp.array([whole]), sparse))
    needed = np.asarray(pages_needed(lengths, flags, sparse))
    stored = {}  # page -> block whose keys lie there
    for length, count, pages, seen, prompt, need in zip(range(1, T + 1), *held, kept, needed):
        newest = (length - 1) // 2
        stored[100 + slots[newest]] = newest
        listed = range(newest + 1) if whole else rows[newest, : counts_of_rows[newest]]
        assert count == need
        assert sorted(seen[:count]) == list(listed)
        assert [stored[page] for page in pages[:count]] == seen[:count].tolist()
        # A prompt of this length leaves the same pages behind as growing to it does.
        left = {page: block for block, page in enumerate(prompt) if page != NO_PAGE}
        assert left == dict(zip(pages[:count], seen[:count]))
