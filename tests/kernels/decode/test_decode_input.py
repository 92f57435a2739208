import jax
import jax.numpy as jnp
import pytest

from routing_jax.kernels import PageList, block_sparse_decode, checked, dense_pages, listed_pages
from routing_jax.kernels.decode.api import IMPLEMENTATIONS

from ..refusals import check_refused_alike

PAGES = PageList(
    counts=jnp.array([[2, 1], [0, 2]]),
    pages=jnp.array([[[4, 1], [4, 9]], [[9, 9], [0, 3]]]),
    blocks=jnp.array([[[0, 2], [0, 9]], [[9, 9], [1, 0]]]),
)


def call(**changes):
    arguments = {
        "q": jnp.ones((2, 1, 4, 8)),
        "k_pool": jnp.ones((5, 16, 2, 8)),
        "v_pool": jnp.ones((5, 16, 2, 8)),
        "pages": PAGES,
        "lengths": jnp.array([40, 20]),
    }
    return block_sparse_decode(**(arguments | changes))


BAD_INPUTS = {
    "rank": ({"q": jnp.ones((2, 4, 8))}, r"q \[B,T,N,H\] must have shape \(B, T, N, H\); it has"),
    "queries": (
        {"q": jnp.ones((2, 9, 4, 8))},
        r"at most 8 queries a sequence; it is \(2, 9, 4, 8\)",
    ),
    "head dim": (
        {"k_pool": jnp.ones((5, 16, 2, 16))},
        r"k_pool \[P,S,K,H\] must have shape \(P, S, K, 8\); it has shape \(5, 16, 2, 16\)",
    ),
    "pools": ({"v_pool": jnp.ones((4, 16, 2, 8))}, r"v_pool .* must have shape \(5, 16, 2, 8\)"),
    "groups": ({"q": jnp.ones((2, 1, 3, 8))}, "multiple of k_pool's heads K"),
    "dtypes": ({"q": jnp.ones((2, 1, 4, 8), jnp.bfloat16)}, "k_pool must have dtype bfloat16"),
    "no list": ({"pages": PAGES.pages}, "pages must be a PageList; it is a "),
    "batch": (
        {"pages": jax.tree.map(lambda x: x[:1], PAGES)},
        r"pages.counts \[B,K\] must have shape \(2, K\); it has shape \(1, 2\)",
    ),
    "heads": (
        {"pages": jax.tree.map(lambda x: jnp.concatenate([x, x], 1), PAGES)},
        r"pages' K must be 1 or that of the pool, 2; .* shape \(2, 4\)",
    ),
    "list dtype": (
        {"pages": PAGES._replace(blocks=jnp.ones((2, 2, 2)))},
        "pages.blocks must have dtype int32; it has float32",
    ),
    "count": (
        {"pages": PAGES._replace(counts=PAGES.counts + 1)},
        r"pages.counts must lie in \[0, 2\]; row \(0, 0\) counts 3",
    ),
    "dense count": (
        {"pages": PAGES._replace(counts=PAGES.counts - 1)},
        r"pages.counts must lie in \[0, 2\]; row \(1, 0\) counts -1",
    ),
    "page": (
        {"pages": PAGES._replace(pages=PAGES.pages + 1)},
        r"pages.pages must lie in \[0, 5\); row \(0, 0\) lists \[5, 2\]",
    ),
    "block": (
        {"pages": PAGES._replace(blocks=PAGES.blocks - 1)},
        r"distinct and not negative; row \(0, 0\) lists \[-1, 1\]",
    ),
    "repeat": (
        {"pages": PAGES._replace(blocks=jnp.ones((2, 2, 2), int))},
        r"distinct and not negative; row \(0, 0\) lists \[1, 1\]",
    ),
    "lengths": ({"lengths": jnp.ones((3,), int)}, r"lengths \[B\] must have shape \(2\)"),
    "lengths' dtype": ({"lengths": jnp.ones(2)}, "lengths must have dtype int32; it has float32"),
    "bias": (
        {"block_bias": jnp.ones((2, 2, 3))},
        r"block_bias \[B,K,C\] must have shape \(2, 2, 2\), or 1 for B or K",
    ),
    "scale": ({"scale": "1"}, "scale must be a finite Python number; it is '1'"),
    "implementation": ({"implementation": "cuda"}, r"None or one of \[.*'xla'.*\]; it is 'cuda'"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_refused_in_one_sentence_whoever_is_named(name):
    changes, sentence = BAD_INPUTS[name]
    check_refused_alike(call, IMPLEMENTATIONS, sentence, **changes)


def test_lists_refuse_other_shapes():
    table = jnp.zeros((2, 6), int)
    with pytest.raises(ValueError, match=r"lengths \[B\] must have shape"):
        dense_pages(table, jnp.ones((3,), int), 16)
    with pytest.raises(ValueError, match=r"blocks \[B,K,C\] must have shape \(2, 3, C\)"):
        listed_pages(table, jnp.ones((2, 3), int), jnp.ones((2, 2, 4), int))


def test_traced_values_are_checked_where_asked():
    run = jax.jit(checked(lambda pages: call(pages=pages)))
    assert run(PAGES)[0].get() is None
    message = run(PAGES._replace(pages=PAGES.pages + 1))[0].get()
    assert "pages.pages must lie in [0, 5); some row breaks this" in (message or "")
