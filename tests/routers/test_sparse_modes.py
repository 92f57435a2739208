"""Rows of sparse layers: against masks written token by token, and one call for a mixed batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.kernels import block_sparse_attention, contiguous_pages, sink_window_table
from routing_jax.routers import (
    SparseModeConfig,
    layer_table,
    search_keys,
    search_scores,
    streaming_table,
)

pytestmark = pytest.mark.usefixtures("compile_cache")

T, N, K, H, Q, KV = 64, 4, 2, 8, 4, 8
STARTS = jnp.arange(0, T, Q)[None]
LENGTHS = np.array([50, 64, 23])


def config(mode="streaming", retrieval="full", **changes):
    fields = {"sink": 8, "window": 16, "last": 6, "blocks": 2, "block_q": Q, "block_kv": KV}
    return SparseModeConfig(mode=mode, retrieval=retrieval, **(fields | changes))


def arrays(seed=0):
    q, k, v = (
        jax.random.normal(key, (3, T, heads, H))
        for key, heads in zip(jax.random.split(jax.random.key(seed), 3), (N, K, K))
    )
    pages, keys = contiguous_pages(3, T // KV), search_keys(config(), k)
    return q, k, v, search_scores(config(), q[:, ::Q], keys, pages, STARTS)


def listed(table):
    """[B,K,M,J] bool in NumPy, whole rows where they are dense."""
    counts, indices = np.asarray(table.counts), np.asarray(table.indices)
    out = np.zeros((*counts.shape, T // KV), bool)
    for at in np.ndindex(counts.shape):
        out[at][indices[at][: counts[at]]] = True
        if counts[at] == -1:
            out[at] = True
    return out


def wanted_blocks(cfg, scores, lengths, dense):
    """What each row should list, written from the docstring, tile by tile."""
    B, kv_heads = (len(dense), K if scores is not None else 1)
    out = np.zeros((B, kv_heads, T // Q, T // KV), bool)
    for b, k, m in np.ndindex(out.shape[:3]):
        own, row = m * Q // KV, out[b, k, m]
        rule = {"full": "dense"}.get(cfg.retrieval, cfg.retrieval) if dense[b] else cfg.mode
        last = m * Q + Q > lengths[b] - cfg.last
        if rule == cfg.answers == "topk":
            last &= m * Q < lengths[b]
        if rule == "dense" or (rule != "streaming" and last):
            row[:] = True
            continue
        row[: min(cfg.sink // KV, own + 1)] = True
        row[max(0, own + 1 - cfg.window // KV) : own + 1] = True
        if rule == "topk":
            rest = [j for j in range(own) if not row[j]]
            for j in sorted(rest, key=lambda j: -scores[b, k, m, j])[: cfg.blocks]:
                row[j] = True
    return out


RULES = [("streaming", "full"), ("triangle", "full"), ("topk", "full"),
         ("streaming", "topk"), ("triangle", "topk"), ("topk", "topk")]  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "retrieval", "answers"),
    [*((*rule, "full") for rule in RULES), *((*rule, "topk") for rule in RULES[2:])],
)
def test_rows_are_those_that_the_words_say(mode, retrieval, answers):
    cfg, dense = config(mode, retrieval, answers=answers), np.array([True, False, False])
    scores = arrays()[3] if cfg.searches else None
    table = layer_table(cfg, jnp.array(dense), STARTS, jnp.array(LENGTHS), scores)
    want = wanted_blocks(cfg, None if scores is None else np.asarray(scores), LENGTHS, dense)
    assert (listed(table) == want).all()
    assert (table.counts[0] == -1).all() == (retrieval == "full")
    assert (table.counts[1] == -1).any() == (mode != "streaming")
    # Of a prompt of 50 tokens, whose sample is routed to full attention, the answer's rows are few.
    assert (table.counts[0, :, 13:] == -1).all() == (retrieval == "full" or answers == "full")


def test_streaming_is_sink_and_window():
    theirs = sink_window_table(T, T, 1, sinks=1, block_q=Q, block_kv=KV)
    assert (listed(streaming_table(config(), STARTS)) == listed(theirs)).all()


@pytest.mark.parametrize(
    ("mode", "retrieval"), [("streaming", "full"), ("topk", "full"), ("streaming", "topk")]
)
def test_one_call_gives_each_sample_what_it_has_alone(mode, retrieval):
    cfg = config(mode, retrieval)
    q, k, v, scores = arrays()
    scores = scores if cfg.searches else None

    @jax.jit
    def attend(dense):
        return block_sparse_attention(
            q, k, v, layer_table(cfg, dense, STARTS, jnp.array(LENGTHS), scores)
        )

    rows = [attend(jnp.array(dense)) for dense in ([True] * 3, [False] * 3, [True, False, True])]
    everything, sparse, mixed = rows
    assert (mixed[0] == everything[0]).all()
    assert (mixed[1] == sparse[1]).all()
    assert (mixed[2] == everything[2]).all()
    assert jnp.abs(everything[1] - sparse[1]).max() > 0.01


@pytest.mark.parametrize(("mode", "retrieval"), RULES[:4])
def test_a_chunk_has_the_rows_that_it_has_in_the_whole(mode, retrieval):
    cfg, lengths = config(mode, retrieval), jnp.array(LENGTHS)
    dense = jnp.array([False, True, False])
    scores = arrays()[3] if cfg.searches else None
    whole = layer_table(cfg, dense, STARTS, lengths, scores)
    part = None if scores is None else scores[:, :, 5:9]
    chunk = jax.jit(lambda starts: layer_table(cfg, dense, starts, lengths, part))(STARTS[:, 5:9])
    assert (chunk.counts == whole.counts[:, :, 5:9]).all()
    assert (chunk.indices == whole.indices[:, :, 5:9]).all()


def test_scores_belong_to_topk_alone():
    for mode, scores in (("topk", None), ("streaming", arrays()[3])):
        said = f"sparse.mode is '{mode}', sparse.retrieval 'full', and scores are"
        with pytest.raises(ValueError, match=said):
            layer_table(config(mode), jnp.ones(3, bool), STARTS, jnp.array(LENGTHS), scores)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"retrieval": "dense"}, "sparse.retrieval is 'dense'; accepted: full, topk."),
        ({"answers": "dense"}, "sparse.answers is 'dense'; accepted: full, topk."),
        ({"answers": "topk"}, "sparse.mode 'streaming' and sparse.retrieval 'full'; one of the"),
        ({"window": 0}, "sparse.window is 0; it must be at least 1."),
        ({"channels": 3}, "sparse.channels is 3; it must be an even number, at least 2, or None."),
        ({"channels": 0}, "sparse.channels is 0; it must be an even number, at least 2, or None."),
        ({"block_q": 16}, "sparse.block_q is 16; it must divide sparse.block_kv = 8."),
        ({"implementation": "cudnn"}, "sparse.implementation is 'cudnn'; accepted: xla, "),
    ],
)
def test_what_will_not_do_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        config(**changes)
