"""The page pool: no page has two owners, none is lost, and rings hold what the mask shows."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from routing_jax.attention.page_pool import (
    NO_PAGE,
    SinkWindow,
    held_pages,
    new_pool,
    pages_needed,
    prompt_pages,
    return_pages,
    slot_of_block,
    take_pages,
)
from routing_jax.kernels import sink_window_table

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


@pytest.mark.parametrize("sparse", [SinkWindow(1, 0), SinkWindow(3, 4)])
@pytest.mark.parametrize("dense", [True, False])
def test_a_sequence_that_grows_sees_what_the_mask_shows(sparse, dense):
    page_size, blocks = 2, 12
    T = page_size * blocks
    table = sink_window_table(
        T, T, sparse.window, sinks=sparse.sinks, block_q=page_size, block_kv=page_size
    )
    rows, counts_of_rows = np.asarray(table.indices)[0, 0], np.asarray(table.counts)[0, 0]
    # One sequence of each length, of the same pages.
    lengths, flags = jnp.arange(1, T + 1), jnp.full(T, dense)
    owned = jnp.tile(100 + jnp.arange(blocks)[None], (T, 1))
    held = [np.asarray(x)[:, 0] for x in held_pages(owned, lengths, flags, page_size, sparse)]
    kept = np.asarray(prompt_pages(owned, lengths, flags, blocks, page_size, sparse))
    slots = np.asarray(slot_of_block(jnp.arange(blocks), jnp.array([dense]), sparse))
    needed = np.asarray(pages_needed(lengths, flags, page_size, sparse))
    stored = {}  # page -> block whose keys lie there
    for length, count, pages, seen, prompt, need in zip(range(1, T + 1), *held, kept, needed):
        newest = (length - 1) // page_size
        stored[100 + slots[newest]] = newest
        listed = range(newest + 1) if dense else rows[newest, : counts_of_rows[newest]]
        assert count == need
        assert sorted(seen[:count]) == list(listed)
        assert [stored[page] for page in pages[:count]] == seen[:count].tolist()
        # A prompt of this length leaves the same pages behind as growing to it does.
        left = {page: block for block, page in enumerate(prompt) if page != NO_PAGE}
        assert left == dict(zip(pages[:count], seen[:count]))


def test_a_window_without_its_own_block_is_refused():
    with pytest.raises(ValueError, match=r"sinks and window are 0 and 2 blocks"):
        SinkWindow(0, 2)
