"""Searching pages: the lists are the rows of a table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.attention.page_search import near_pages, search_pages
from routing_jax.attention.searched_answers import search_alone
from routing_jax.kernels import contiguous_pages
from routing_jax.routers import SparseModeConfig, layer_table, search_keys, search_scores

pytestmark = pytest.mark.usefixtures("compile_cache")

T, N, K, H, BLOCK = 24, 4, 2, 8, 2
BLOCKS = T // BLOCK
CONFIG = SparseModeConfig(
    retrieval="topk",
    answers="topk",
    sink=2,
    window=4,
    blocks=3,
    block_q=BLOCK,
    block_kv=BLOCK,
)
OWN_ROWS = dataclasses.replace(CONFIG, block_q=1)


def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (1, T, n, H)) for key, n in zip(keys, (N, K, K))]


def scores_of(cfg, q, k):
    """Of every token, as one pass has them."""
    pages, places = contiguous_pages(1, BLOCKS), jnp.arange(T)[None]
    return search_scores(cfg, q, search_keys(cfg, k), pages, places)


def rows(q, k, answer_from):
    """The rows that one pass gives the tokens from there on, all of which search."""
    starts = jnp.arange(T)[None]
    scores = scores_of(CONFIG, q, k)
    return layer_table(OWN_ROWS, jnp.array([True]), starts, jnp.array([answer_from]), scores)


@pytest.mark.parametrize(("sink", "window", "channels"), [(2, 2, 2), (4, 6, 4), (2, 2, None)])
def test_a_token_finds_what_its_row_in_one_pass_lists(sink, window, channels):
    cfg = dataclasses.replace(CONFIG, sink=sink, window=window, channels=channels)
    q, k, _ = arrays()
    scores = scores_of(cfg, q, k)
    own = dataclasses.replace(cfg, block_q=1)
    table = layer_table(own, jnp.array([True]), jnp.arange(T)[None], jnp.array([0]), scores)

    # As if each token were the newest of a sequence of its own, whose pages lie backwards.
    lengths, everyone = jnp.arange(1, T + 1), jnp.ones(T, bool)
    page_table = jnp.tile(BLOCKS - 1 - jnp.arange(BLOCKS)[None], (T, 1))
    narrow = search_keys(cfg, k)[::-1]

    @jax.jit
    def find(searches):
        near = near_pages(page_table, lengths, everyone, cfg)
        return near, search_pages(near, page_table, q[0], narrow, lengths, searches, cfg)

    near, found = find(everyone)
    assert found.pages.shape[2] == cfg.sink_blocks + cfg.window_blocks + cfg.blocks
    for t, head in np.ndindex(T, K):
        number = int(found.counts[t, head])
        blocks = np.asarray(found.blocks[t, head, :number])
        listed = np.asarray(table.indices[0, head, t, : int(table.counts[0, head, t])])
        assert sorted(blocks) == listed.tolist()
        np.testing.assert_array_equal(found.pages[t, head, :number], BLOCKS - 1 - blocks)
    assert (found.counts[-1] == found.pages.shape[2]).all()

    # Who does not search keeps the list of sink and window, for every head.
    _, other = find(~everyone)
    np.testing.assert_array_equal(other.counts, np.broadcast_to(near.counts, (T, K)))
    size = near.pages.shape[2]
    np.testing.assert_array_equal(other.pages[:, 1, :size], near.pages[:, 0])


def test_pages_that_nobody_holds_are_never_found():
    """What is not there may be anything."""
    q, k, _ = arrays()
    lengths, yes = jnp.array([20, 0]), jnp.array([True, True])
    table = jnp.where(jnp.arange(BLOCKS)[None] < 10, jnp.arange(BLOCKS)[None], -1)
    table = jnp.concatenate([table, jnp.full_like(table, -1)])
    held = jnp.arange(BLOCKS)[:, None, None, None] < 10
    narrow = jnp.where(held, search_keys(CONFIG, k), jnp.nan)
    near = near_pages(table, lengths, yes, CONFIG)
    found = search_pages(near, table, q[0, :2], narrow, lengths, yes, CONFIG)
    assert found.counts.tolist() == [[6, 6], [0, 0]]
    listed = np.asarray(found.blocks[0])
    assert all(len(set(row)) == 6 and max(row) == 9 for row in listed.tolist())
    np.testing.assert_array_equal(found.pages[0], listed)


def test_answers_have_the_gradients_of_attention_by_their_rows():
    q, k, v = arrays()
    start, dense = 21, jnp.array([True])
    chosen = jnp.arange(T)[None] >= start
    weight = jax.random.normal(jax.random.key(1), (1, T, N, H)) * chosen[..., None, None]

    def searched(q, k, v):
        found = search_alone(
            CONFIG,
            jnp.zeros_like(q),
            q,
            k,
            v,
            search_keys(CONFIG, k),
            dense,
            chosen,
            jnp.array([start]),
        )
        return jnp.sum(found * weight), found

    table = rows(q, k, start)
    seen = np.zeros((1, K, T, T), bool)
    for head, t in np.ndindex(K, T):
        for block in np.asarray(table.indices[0, head, t, : int(table.counts[0, head, t])]):
            seen[0, head, t, block * BLOCK : block * BLOCK + BLOCK] = True
    seen = (seen & np.tri(T, dtype=bool)).repeat(N // K, axis=1)

    def by_rows(q, k, v):
        k, v = (x.repeat(N // K, axis=2) for x in (k, v))
        logits = jnp.einsum("btnh,bsnh->bnts", q, k) / H**0.5
        weights = jax.nn.softmax(jnp.where(seen, logits, -1e30))
        found = jnp.einsum("bnts,bsnh->btnh", weights, v)
        return jnp.sum(found * weight), found

    got, want = (
        jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))(q, k, v) for f in (searched, by_rows)
    )
    np.testing.assert_allclose(got[1][:, start:], want[1][:, start:], rtol=1e-4, atol=1e-5)
    assert (got[1][:, :start] == 0).all()
    for ours, theirs in zip(got[0], want[0]):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
        assert np.abs(theirs).max() > 0.1
