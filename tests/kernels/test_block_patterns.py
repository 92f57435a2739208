import jax
import pytest

from routing_jax.kernels import (
    check_table,
    dense_table,
    global_table,
    sink_window_table,
    strided_table,
    window_table,
)

from .random_tables import listed_sets

SIZES = [(64, 64, 8, 8), (60, 60, 16, 8), (60, 60, 8, 16), (40, 70, 8, 8), (70, 40, 16, 8)]


def own_blocks(m, T, block_q, block_kv):
    return {t // block_kv for t in range(m * block_q, min(T, (m + 1) * block_q))}


def window_rule(own, j, causal):
    return min(own) - 2 <= j <= max(own) + (0 if causal else 2)


def sink_rule(own, j, causal):
    return window_rule(own, j, causal) or (j < 2 and (not causal or j <= max(own)))


def stride_rule(own, j, causal):
    return j in own or ((j - min(own)) % 3 == 0 and (not causal or j <= max(own)))


PATTERNS = {
    "window": (lambda *a, **k: window_table(*a, 2, **k), window_rule),
    "sink_window": (lambda *a, **k: sink_window_table(*a, 2, sinks=2, **k), sink_rule),
    "strided": (lambda *a, **k: strided_table(*a, 3, **k), stride_rule),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PATTERNS)
def test_rows_are_what_the_rule_says(name, size, causal):
    T, S, block_q, block_kv = size
    make, rule = PATTERNS[name]
    table = jax.jit(lambda: make(T, S, block_q=block_q, block_kv=block_kv, causal=causal))()
    check_table(table, T, S, batch=3, kv_heads=2)
    J = -(-S // block_kv)
    for (_, _, m), got in listed_sets(table).items():
        own = own_blocks(m, T, block_q, block_kv)
        assert got == {j for j in range(J) if rule(own, j, causal)}


@pytest.mark.parametrize("causal", [True, False])
def test_global_blocks_see_and_are_seen(causal):
    table = global_table(60, 60, [3, 0], block_q=16, block_kv=8, causal=causal)
    check_table(table, 60, 60, batch=1, kv_heads=1)
    assert table.counts[0, 0].tolist() == [-1, -1, 2, 2]
    for (_, _, m), got in listed_sets(table).items():
        if m >= 2:
            assert got == {0, 3}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda **k: window_table(8, 8, -1, **k), "window must be at least 0; it is -1"),
        (lambda **k: sink_window_table(8, 8, 1, sinks=0, **k), "sinks must be at least 1; it is 0"),
        (lambda **k: strided_table(8, 8, 0, **k), "stride must be at least 1; it is 0"),
        (lambda **k: dense_table(0, 8, **k), "num_queries must be at least 1; it is 0"),
        (lambda **k: global_table(8, 8, [1], **k), r"in \[0, 1\); it is \[1\]"),
        (lambda **k: global_table(8, 8, [], **k), r"in \[0, 1\); it is \[\]"),
    ],
)
def test_bad_patterns_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(block_q=8, block_kv=8)
