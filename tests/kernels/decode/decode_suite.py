"""The tests that every implementation of block-sparse decoding passes: subclass and name it."""

import dataclasses
from typing import Any, ClassVar

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from routing_jax.kernels import (
    PageList,
    block_sparse_attention,
    block_sparse_decode,
    contiguous_pages,
    dense_pages,
    listed_pages,
    table_from_scores,
    where_pages,
)
from routing_jax.kernels.decode.reference import reference_decode


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes and features of one call."""

    B: int = 3
    T: int = 1
    K: int = 2
    G: int = 2
    H: int = 64
    page_size: int = 64
    capacity: int = 4
    blocks: int = 6  # J, of the longest sequence
    bias: bool = True
    one_list: bool = False  # K = 1, broadcast
    seed: int = 0


CASES = {
    "one query, groups of 3": Case(G=3),
    "eight queries, head dim 128": Case(T=8, H=128, B=2),
    "pages of 128, one list for all heads": Case(page_size=128, one_list=True, T=3),
    "groups of 16, head dim 256": Case(K=1, G=16, H=256, B=2),
    "head dim 96, more pages than a piece": Case(H=96, K=1, capacity=20, blocks=24, bias=False),
}


def make_inputs(case: Case, dtype: str = "float32") -> dict[str, Any]:
    """A pool whose pages are shuffled, with garbage where no sequence has written."""
    rng = np.random.default_rng(case.seed)
    J, size = case.blocks, case.page_size
    lengths = rng.integers(1, J * size + 1, case.B)
    lengths[0] = 0  # a sequence to skip
    lengths[-1] = rng.integers(1, 4)  # and one that has just begun: some queries before its start
    pool_size = case.B * J + 3
    page_table = rng.permutation(pool_size)[: case.B * J].reshape(case.B, J)
    rows = (case.B, 1 if case.one_list else case.K)
    counts = np.zeros(rows, int)
    blocks = np.full((*rows, case.capacity), -5)
    pages = np.full((*rows, case.capacity), pool_size + 9)
    for b, k in np.ndindex(rows):
        filled = max(1, -(-int(lengths[b]) // size))
        counts[b, k] = rng.integers(k == 0, min(case.capacity, filled) + 1)
        chosen = rng.choice(filled, counts[b, k], replace=False)  # in any order
        blocks[b, k, : counts[b, k]] = chosen
        pages[b, k, : counts[b, k]] = page_table[b, chosen]

    def normal(*shape, kind=dtype):
        return rng.normal(size=shape).astype(np.float32).astype(jnp.dtype(kind))

    pools = [normal(pool_size, size, case.K, case.H) for _ in range(2)]
    written = np.zeros((pool_size, size), bool)
    for b, j in np.ndindex(case.B, J):
        written[page_table[b, j]] = np.arange(j * size, (j + 1) * size) < lengths[b]
    for pool in pools:
        pool[~written] = np.nan
    bias = normal(case.B, case.K, case.capacity, kind="float32") if case.bias else None
    return {
        "q": jnp.asarray(normal(case.B, case.T, case.K * case.G, case.H)),
        "k_pool": jnp.asarray(pools[0]),
        "v_pool": jnp.asarray(pools[1]),
        "pages": PageList(*(jnp.asarray(x, jnp.int32) for x in (counts, pages, blocks))),
        "lengths": jnp.asarray(lengths, jnp.int32),
        "block_bias": None if bias is None else jnp.asarray(bias),
    }


def clean(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same call with zeros in place of the garbage."""
    pools = {name: jnp.nan_to_num(arguments[name]) for name in ("k_pool", "v_pool")}
    return arguments | pools


def error(got, expected) -> float:
    """‖got − expected‖ / ‖expected‖, over what is finite in both."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(got), finite)
    norm = np.linalg.norm(expected[finite])
    return np.linalg.norm(got[finite] - expected[finite]) / (norm if norm > 0 else 1.0)


class DecodeSuite:
    """Subclass it, name the implementation, and say which dtypes it takes, the finest first."""

    implementation: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]]

    def decode(self, **arguments):
        return jax.jit(
            lambda arguments: block_sparse_decode(
                **arguments, implementation=self.implementation, return_lse=True
            )
        )(arguments)

    def limit(self, dtype: str) -> float:
        return {"float32": 3e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype]

    def check_against_oracle(self, case: Case, dtype: str) -> None:
        arguments = make_inputs(case, dtype)
        out, lse = self.decode(**arguments)
        expected_out, expected_lse = reference_decode(**clean(arguments))
        assert out.dtype == arguments["q"].dtype
        assert error(out, expected_out) < self.limit(dtype)
        assert error(lse, expected_lse) < 3e-6
        assert (np.asarray(out[0], float) == 0).all()
        assert (np.asarray(lse[0]) == -np.inf).all()

    @pytest.mark.parametrize("name", CASES)
    def test_equals_attention_to_the_pages_put_in_order(self, name):
        self.check_against_oracle(CASES[name], self.dtypes[0])

    def test_takes_its_other_dtypes(self):
        for dtype in self.dtypes[1:]:
            self.check_against_oracle(CASES["one query, groups of 3"], dtype)

    # Every example compiles: one that fails is not worth making smaller.
    @hypothesis.settings(max_examples=4, phases=[hypothesis.Phase.generate])
    @hypothesis.given(
        case=st.builds(
            Case,
            B=st.integers(2, 4),
            T=st.integers(1, 8),
            K=st.integers(1, 3),
            G=st.integers(1, 5),
            page_size=st.sampled_from([64, 128]),
            capacity=st.integers(1, 6),
            blocks=st.integers(1, 5),
            bias=st.booleans(),
            one_list=st.booleans(),
            seed=st.integers(0, 99),
        )
    )
    def test_equals_attention_to_the_pages_at_any_shape(self, case):
        self.check_against_oracle(case, self.dtypes[0])

    def test_continues_what_training_computes(self):
        """A tile's row and bias, kept for decoding, give what block-sparse attention gives."""
        rng = np.random.default_rng(0)
        B, S, N, K, H, size = 2, 256, 6, 2, 64, 64
        q, k, v = (
            jnp.asarray(rng.normal(size=(B, S, heads, H)), self.dtypes[0]) for heads in (N, K, K)
        )
        scores = jnp.asarray(rng.normal(size=(B, K, 4, 4)), jnp.float32)
        table, _ = table_from_scores(scores, 3, block_q=64, block_kv=size, sinks=1)
        bias = jnp.asarray(rng.normal(size=table.indices.shape), jnp.float32)
        whole = jax.jit(block_sparse_attention)(q, k, v, table, block_bias=bias)

        lengths = jnp.array([200, 250])  # both in the last tile
        pages = listed_pages(contiguous_pages(B, 4), table.counts[:, :, 3], table.indices[:, :, 3])
        pools = {"k_pool": k.reshape(-1, size, K, H), "v_pool": v.reshape(-1, size, K, H)}
        newest = jnp.stack([q[b, n - 4 : n] for b, n in enumerate((200, 250))])
        out, _ = self.decode(
            q=newest, **pools, pages=pages, lengths=lengths, block_bias=bias[:, :, 3]
        )
        expected = jnp.stack([whole[b, n - 4 : n] for b, n in enumerate((200, 250))])
        assert error(out, expected) < self.limit(self.dtypes[0])

    def test_dense_and_sparse_sequences_share_a_call(self):
        arguments = make_inputs(Case(bias=False, B=4, seed=3), self.dtypes[0])
        sparse = arguments["pages"]
        page_table = jnp.asarray(np.random.default_rng(5).permutation(27)[:24].reshape(4, 6))
        dense = dense_pages(page_table, arguments["lengths"], 64)
        is_dense = jnp.array([False, True, False, True])
        mixed = clean(arguments) | {"pages": where_pages(is_dense, dense, sparse)}
        alone = clean(arguments) | {"pages": sparse}, clean(arguments) | {"pages": dense}
        (out, _), (out_sparse, _), (out_dense, _) = (self.decode(**one) for one in (mixed, *alone))
        picked = is_dense[:, None, None, None]
        assert error(out, jnp.where(picked, out_dense, out_sparse)) < 1e-6
        assert error(out_dense, reference_decode(**alone[1])[0]) < self.limit(self.dtypes[0])
