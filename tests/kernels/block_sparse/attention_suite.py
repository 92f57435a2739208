"""The tests that every implementation of block-sparse attention passes: subclass and name it."""

import dataclasses
import functools
from typing import Any, ClassVar

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from routing_jax.kernels import (
    block_sparse_attention,
    dense_table,
    table_from_scores,
    window_table,
)
from routing_jax.kernels.block_sparse.reference import dense_mask, reference_attention

from ..random_tables import random_table


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes and features of one call."""

    B: int = 2
    T: int = 150
    S: int | None = None  # as T
    K: int = 2
    G: int = 2
    H: int = 64
    block_q: int = 64
    block_kv: int = 64
    capacity: int = 3
    dense: float = 0.2  # the share of dense rows
    causal: bool = True
    bias: bool = True
    positions: bool = False
    segments: bool = False
    one_table: bool = False  # B = K = 1, broadcast
    seed: int = 0


CASES = {
    "one query head a kv head": Case(K=3, G=1, T=190),
    "groups of 3, head dim 64": Case(G=3),
    "groups of 16, head dim 96": Case(B=1, K=1, G=16, H=96, T=100, segments=True),
    "blocks of 128, head dim 128": Case(H=128, block_q=128, block_kv=128, T=300, causal=False),
    "tall tiles, head dim 256": Case(H=256, block_q=128, T=170, dense=0.5),
    "wide blocks, more keys": Case(T=70, S=230, block_kv=128, causal=False, segments=True),
    "more queries than keys": Case(T=230, S=70),
    "compacted queries in segments": Case(
        T=130, S=200, G=3, block_kv=128, positions=True, segments=True, dense=0.5
    ),
    "few queries, many keys": Case(
        T=70, S=2100, H=128, block_q=128, block_kv=128, capacity=9, positions=True, dense=0.5
    ),
    "one table and bias for all, no dense row": Case(B=3, T=192, one_table=True, dense=0.0),
}
HALF_CASES = (
    ("groups of 3, head dim 64", "bfloat16"),
    ("compacted queries in segments", "float16"),
)


def make_inputs(case: Case, dtype: str = "float32") -> tuple[dict[str, Any], Any]:
    """The keyword arguments of a call, and random cotangents of its out and lse."""
    rng = np.random.default_rng(case.seed)
    S, N = case.S or case.T, case.K * case.G

    def normal(*shape, kind=dtype):
        return jnp.asarray(rng.normal(size=shape), kind)

    table = random_table(
        rng,
        batch=1 if case.one_table else case.B,
        heads=1 if case.one_table else case.K,
        tiles=-(-case.T // case.block_q),
        blocks=-(-S // case.block_kv),
        capacity=case.capacity,
        block_q=case.block_q,
        block_kv=case.block_kv,
        dense=case.dense,
        garbage=case.seed % 2 == 0,
    )
    q_positions = segment_ids = bias = None
    if case.positions:
        q_positions = np.full((case.B, case.T), -1)
        for row in q_positions:
            used = rng.integers(1, min(case.T, S) + 1)
            row[:used] = np.sort(rng.choice(S, used, replace=False))
        q_positions[-1] = -1  # one sequence without a single query
        q_positions = jnp.asarray(q_positions, jnp.int32)
    if case.segments:
        segment_ids = jnp.asarray(np.sort(rng.integers(0, 3, (case.B, S)), axis=1), jnp.int32)
    if case.bias:
        bias = normal(*table.indices.shape, kind="float32")
    arguments = {
        "q": normal(case.B, case.T, N, case.H),
        "k": normal(case.B, S, case.K, case.H),
        "v": normal(case.B, S, case.K, case.H),
        "table": table,
        "block_bias": bias,
        "q_positions": q_positions,
        "segment_ids": segment_ids,
        "causal": case.causal,
    }
    cotangents = normal(case.B, case.T, N, case.H), normal(case.B, case.T, N, kind="float32")
    return arguments, cotangents


def half_attention(q, k, v, table, *, block_bias, q_positions, segment_ids, causal):
    """Dense attention as usual in half precision: float32 softmax, the rest in q's dtype."""
    mask, bias = dense_mask(
        q.shape, k.shape, table, block_bias, q_positions, segment_ids, causal=causal
    )
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32)
    logits = jnp.where(mask, logits * q.shape[-1] ** -0.5 + bias, -1e30)
    some = mask.any(axis=-1)
    weights = jnp.where(some[..., None], jax.nn.softmax(logits, axis=-1), 0.0).astype(q.dtype)
    lse = jnp.where(some, jax.nn.logsumexp(logits, axis=-1), -jnp.inf)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, v), lse.transpose(0, 2, 1)


def outputs_and_gradients(function, arguments, cotangents) -> dict[str, np.ndarray]:
    """Out, lse, and the gradients of q, k, v and the bias, as float64."""
    wanted = [name for name in ("q", "k", "v", "block_bias") if arguments[name] is not None]
    rest = {name: value for name, value in arguments.items() if name not in wanted}
    static = {"causal": rest.pop("causal")}

    @jax.jit
    def run(learned, rest, cotangents):
        def call(learned):
            return function(**learned, **rest, **static)

        (out, lse), pull_back = jax.vjp(call, learned)
        (gradients,) = pull_back((cotangents[0].astype(out.dtype), cotangents[1]))
        return {"out": out, "lse": lse} | {f"d_{name}": gradients[name] for name in wanted}

    results = run({name: arguments[name] for name in wanted}, rest, cotangents)
    return {name: np.asarray(value, np.float64) for name, value in results.items()}


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """‖got − expected‖ / ‖expected‖, over what is finite in both."""
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(got), finite)
    size = np.linalg.norm(expected[finite])
    return np.linalg.norm(got[finite] - expected[finite]) / (size if size > 0 else 1.0)


class AttentionSuite:
    """Subclass it, name the implementation, and say which dtypes it takes, the finest first."""

    implementation: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]]

    def attend(self, **arguments):
        return block_sparse_attention(
            **arguments, implementation=self.implementation, return_lse=True
        )

    def check_against_oracle(self, case: Case, dtype: str) -> None:
        arguments, cotangents = make_inputs(case, dtype)
        got = outputs_and_gradients(self.attend, arguments, cotangents)
        expected = outputs_and_gradients(reference_attention, arguments, cotangents)
        usual = (
            None
            if dtype == "float32"
            else outputs_and_gradients(half_attention, arguments, cotangents)
        )
        for name, value in got.items():
            limit = 1e-5
            if usual is not None:
                limit = 2 * relative_error(usual[name], expected[name]) + 1e-6
                if name in ("out", "d_q", "d_k", "d_v"):  # rounded: of one key, the usual is exact
                    limit = max(limit, float(jnp.finfo(dtype).eps))
            assert relative_error(value, expected[name]) <= limit, name

    @pytest.mark.parametrize("name", CASES)
    def test_equals_masked_dense_attention(self, name):
        self.check_against_oracle(CASES[name], self.dtypes[0])

    @pytest.mark.parametrize(("name", "dtype"), HALF_CASES)
    def test_errs_at_most_twice_as_much_as_dense_half_precision(self, name, dtype):
        assert dtype in self.dtypes
        self.check_against_oracle(CASES[name], dtype)

    # Every example compiles: one that fails is not worth making smaller.
    @hypothesis.settings(
        max_examples=4,
        phases=[hypothesis.Phase.generate],
        # Each implementation is a class with this test; nothing is replayed from a database.
        suppress_health_check=[hypothesis.HealthCheck.differing_executors],
    )
    @hypothesis.given(
        case=st.builds(
            Case,
            B=st.integers(1, 3),
            T=st.integers(1, 260),
            S=st.integers(1, 260),
            K=st.integers(1, 3),
            G=st.integers(1, 5),
            H=st.sampled_from([64, 128]),
            block_q=st.sampled_from([64, 128]),
            block_kv=st.sampled_from([64, 128]),
            capacity=st.integers(1, 6),
            dense=st.sampled_from([0.0, 0.5, 1.0]),
            causal=st.booleans(),
            bias=st.booleans(),
            positions=st.booleans(),
            segments=st.booleans(),
            seed=st.integers(0, 99),
        )
    )
    def test_equals_masked_dense_attention_at_any_shape(self, case):
        self.check_against_oracle(case, self.dtypes[0])

    def test_dense_rows_are_causal_attention(self):
        arguments, _ = make_inputs(Case(T=200, dense=0.0, bias=False), self.dtypes[0])
        q, k, v = (arguments[name] for name in "qkv")
        table = dense_table(200, 200, block_q=64, block_kv=64)
        out, _ = jax.jit(lambda: self.attend(q=q, k=k, v=v, table=table))()
        expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        limit = 1e-6 if self.dtypes[0] == "float32" else 1e-2
        assert relative_error(np.asarray(out, float), np.asarray(expected, float)) < limit

    def test_blocks_that_no_row_lists_are_never_read(self):
        arguments, (d_out, _) = make_inputs(
            Case(T=192, S=256, dense=0.0, causal=False, bias=False), self.dtypes[0]
        )
        q, k, v = (arguments[name] for name in "qkv")
        table = dataclasses.replace(
            window_table(192, 256, 0, block_q=64, block_kv=64),
            indices=jnp.array([[[[1, 0], [1, 2], [2, 0]]]]),
            counts=jnp.array([[[1, 2, 0]]]),
        )
        unread = jnp.isin(jnp.arange(256) // 64, jnp.array([0, 3]))[None, :, None, None]

        @jax.jit
        def run(k, v):
            out, pull_back = jax.vjp(
                lambda q, k, v: self.attend(q=q, k=k, v=v, table=table, causal=False)[0], q, k, v
            )
            return out, pull_back(d_out)

        out, gradients = run(k, v)
        poisoned = run(jnp.where(unread, jnp.nan, k), jnp.where(unread, jnp.nan, v))
        jax.tree.map(np.testing.assert_array_equal, (out, gradients), poisoned)
        assert float(jnp.abs(jnp.where(unread, gradients[1], 0)).max()) == 0.0
        assert float(jnp.abs(gradients[1]).max()) > 0.0

    def test_gradients_are_bitwise_repeatable(self):
        arguments, (d_out, _) = make_inputs(Case(T=300, K=1, dense=0.3), self.dtypes[-1])
        learned = [arguments.pop(name) for name in ("q", "k", "v", "block_bias")]

        def loss(q, k, v, block_bias):
            out, _ = self.attend(q=q, k=k, v=v, block_bias=block_bias, **arguments)
            return (out * d_out).sum()

        gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
        first = gradients(*learned)
        for _ in range(3):
            jax.tree.map(np.testing.assert_array_equal, first, gradients(*learned))

    def test_no_gradient_reaches_a_later_key(self):
        arguments, _ = make_inputs(Case(B=1, K=1, bias=False), self.dtypes[0])
        q, k, v = (arguments[name] for name in "qkv")
        # Rows list future blocks on purpose: what a query sees is decided from positions.
        table = window_table(150, 150, 2, block_q=64, block_kv=64, causal=False)

        @jax.jit
        def seen(t):
            return jax.grad(lambda v: self.attend(q=q, k=k, v=v, table=table)[0][0, t].sum())(v)

        for t in (0, 70, 149):
            reached = np.asarray(jnp.abs(seen(t)).sum(axis=(0, 2, 3)) > 0)
            assert reached.tolist() == [s <= t for s in range(150)]

    def test_a_bias_of_minus_infinity_hides_the_block(self):
        arguments, cotangents = make_inputs(Case(dense=0.0), self.dtypes[0])
        bias = arguments["block_bias"]
        arguments["block_bias"] = jnp.where(bias < 0, -jnp.inf, bias)
        got = outputs_and_gradients(self.attend, arguments, cotangents)
        expected = outputs_and_gradients(reference_attention, arguments, cotangents)
        for name, value in got.items():
            limit = 1e-5 if self.dtypes[0] == "float32" else 2e-2
            assert relative_error(value, expected[name]) < limit, name

    def test_a_router_learns_through_the_bias_inside_jit(self):
        arguments, (d_out, _) = make_inputs(Case(T=256, dense=0.0), self.dtypes[0])
        q, k, v = (arguments[name] for name in "qkv")
        scores = jnp.asarray(np.random.default_rng(9).normal(size=(2, 2, 4, 4)), jnp.float32)

        def loss(scores, attend):
            table, _ = table_from_scores(scores, 3, block_q=64, block_kv=64, sinks=1)
            gates = jnp.take_along_axis(jax.nn.log_sigmoid(scores), table.indices, axis=3)
            out, _ = attend(q=q, k=k, v=v, table=table, block_bias=gates)
            return (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum()

        got, expected = (
            np.asarray(jax.jit(jax.grad(functools.partial(loss, attend=attend)))(scores))
            for attend in (self.attend, reference_attention)
        )
        limit = 1e-5 if self.dtypes[0] == "float32" else 2e-2
        assert relative_error(got, expected) < limit
        assert (np.abs(got).max(axis=3)[:, :, 1:] > 0).all()

    def test_vmap_is_a_batch(self):
        arguments, _ = make_inputs(Case(dense=0.3, segments=True), self.dtypes[0])
        del arguments["q_positions"], arguments["causal"]
        out, lse = jax.jit(lambda arguments: self.attend(**arguments))(arguments)
        single = jax.tree.map(lambda x: x[:, None], arguments)
        mapped = jax.jit(jax.vmap(lambda arguments: self.attend(**arguments)))(single)
        limit = 1e-6 if self.dtypes[0] == "float32" else 1e-2
        assert relative_error(np.asarray(mapped[0][:, 0], float), np.asarray(out, float)) < limit
        assert relative_error(np.asarray(mapped[1][:, 0]), np.asarray(lse)) < limit
