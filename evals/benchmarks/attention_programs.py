"""The steps that the attention benchmark times in jax: what each reads, does and writes."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from routing_jax.evals.benchmarks.attention_cases import (
    Case,
    dense_flops,
    flops,
    make_positions,
    make_table,
    page_bytes,
    random_pages,
    random_scores,
)
from routing_jax.evals.benchmarks.attention_config import AttentionBenchConfig, Part
from routing_jax.evals.benchmarks.mixing_inputs import normal
from routing_jax.evals.benchmarks.program import Program, differentiated
from routing_jax.evals.benchmarks.timing import State
from routing_jax.kernels import (
    block_sparse_attention,
    block_sparse_decode,
    compacted_attention,
    contiguous_pages,
    default_implementation,
    dense_attention,
    listed_pages,
    table_from_scores,
    transpose_table,
)


def attention_inputs(config: AttentionBenchConfig, case: Case, seed: int) -> State:
    """Random q, k, v and dy, the table, and what else the case has: positions, a bias."""
    T, S, H = case.queries, case.length, case.head_dim
    shapes = {"q": (T, case.num_heads), "k": (S, case.num_kv_heads), "v": (S, case.num_kv_heads)}
    if case.part != "forward":
        shapes["dy"] = shapes["q"]
    state: State = {
        name: normal(seed + i, (1, *shape, H), config.dtype)
        for i, (name, shape) in enumerate(shapes.items())
    }
    state["table"] = make_table(case, seed)
    positions = make_positions(case, config.seed)
    if positions is not None:
        state["positions"] = jnp.asarray(positions)
    if case.variant == "block_bias":
        state["bias"] = normal(seed + 9, state["table"].indices.shape, "float32")
    return state


def sparse_attention(
    implementation: str | None, state: State, *, deterministic: bool = True
) -> jax.Array:
    """Block-sparse attention over the state's table."""
    out = block_sparse_attention(
        state["q"],
        state["k"],
        state["v"],
        state["table"],
        block_bias=state.get("bias"),
        q_positions=state.get("positions"),
        deterministic=deterministic,
        implementation=implementation,
    )
    assert isinstance(out, jax.Array)  # no log-sum-exp was asked for
    return out


def full_attention(state: State) -> jax.Array:
    """Dense causal attention: of every query, or of compacted ones."""
    q, k, v = (state[name] for name in "qkv")
    if "positions" in state:
        return compacted_attention(q, k, v, state["positions"])
    return dense_attention(q, k, v)


def forward(attend: Callable[[State], jax.Array], state: State) -> State:
    """The state with y."""
    return state | {"y": attend(state)}


def forward_backward(attend: Callable[[State], jax.Array], state: State) -> State:
    """The state with y and its gradients by q, k, v and bias."""
    return differentiated(attend, ("q", "k", "v", "bias"), state)


def takes_fused(case: Case) -> bool:
    """Whether gradients that need not be deterministic are computed in another way."""
    backward = case.part in ("forward_backward", "agreement")
    return backward and case.head_dim <= min(case.block, 128) and case.variant != "block_bias"


def _attention(config: AttentionBenchConfig, case: Case, listed: int) -> list[Program]:
    inputs = functools.partial(attention_inputs, config, case)
    run = forward_backward if case.part == "forward_backward" else forward
    sparse = functools.partial(run, functools.partial(sparse_attention, config.implementation))
    found = [Program("block_sparse", flops(case, listed), sparse, inputs)]
    if takes_fused(case):
        attend = functools.partial(sparse_attention, config.implementation, deterministic=False)
        fused = functools.partial(run, attend)
        found.append(Program("fused", flops(case, listed), fused, inputs))
    if case.blocks == 0 and case.variant in (None, "few_queries", "group3"):

        def without_table(seed: int) -> State:
            return {name: leaf for name, leaf in inputs(seed).items() if name != "table"}

        work = flops(case, listed) if case.variant == "few_queries" else dense_flops(case)
        found.append(Program("dense", work, functools.partial(run, full_attention), without_table))
    return found


def _decode(config: AttentionBenchConfig, case: Case, listed: int) -> list[Program]:
    B, S, N, K, H = case.batch, case.length, case.num_heads, case.num_kv_heads, case.head_dim
    itemsize = jnp.dtype(config.dtype).itemsize

    def cache(shape: tuple[int, ...], seed: int) -> State:
        return {
            "q": normal(seed, (B, 1, N, H), config.dtype),
            "k": normal(seed + 1, shape, config.dtype),
            "v": normal(seed + 2, shape, config.dtype),
        }

    def pool(seed: int) -> State:
        table = contiguous_pages(B, case.num_blocks)
        return cache((B * case.num_blocks, case.block, K, H), seed) | {
            "pages": listed_pages(table, *random_pages(case, seed)),
            "lengths": jnp.full(B, S, jnp.int32),
        }

    def sparse(state: State) -> State:
        operands = (state[name] for name in ("q", "k", "v", "pages", "lengths"))
        return state | {"y": block_sparse_decode(*operands, implementation=config.implementation)}

    def dense(state: State) -> State:
        implementation = default_implementation(jnp.dtype(config.dtype))
        operands = (state[name] for name in "qkv")
        y = jax.nn.dot_product_attention(*operands, implementation=implementation)
        return state | {"y": y}

    read = page_bytes(case, listed, itemsize)
    found = [Program("block_sparse", read, sparse, pool, read)]
    if case.blocks == 0:
        found.append(Program("dense", read, dense, functools.partial(cache, (B, S, K, H))))
    return found


def _table(config: AttentionBenchConfig, case: Case, listed: int) -> list[Program]:
    """Selection from scores, its transpose, both together, and the forward pass beside them."""
    M = J = case.num_blocks

    def scores(seed: int) -> State:
        return {"scores": random_scores(seed, (1, case.num_kv_heads, M, J))}

    def select(state: State) -> State:
        table = table_from_scores(
            state["scores"], case.blocks, block_q=case.block, block_kv=case.block
        ).table
        return state | {"table": table}

    def transpose(state: State) -> State:
        return state | {"transposed": transpose_table(state["table"], J)}

    def both(state: State) -> State:
        return transpose(select(state))

    forward_case = case._replace(part="forward")
    (attention, *_) = _attention(config, forward_case, listed)
    return [
        attention._replace(peer="forward"),
        Program("selection", 0, select, scores),
        Program("transpose", 0, transpose, lambda seed: {"table": make_table(case, seed)}),
        Program("selection and transpose", 0, both, scores),
    ]


def ceilings(config: AttentionBenchConfig) -> list[Program]:
    """What the device reaches on the simplest work: a square matmul, and reading and writing."""
    size = config.matmul_size
    count = config.copy_bytes // jnp.dtype(config.dtype).itemsize

    def matrices(seed: int) -> State:
        return {name: normal(seed + i, (size, size), config.dtype) for i, name in enumerate("ab")}

    def negated(state: State) -> State:
        return state | {"y": -state["x"]}  # not a copy, which the compiler could elide

    return [
        Program("matmul", 2.0 * size**3, lambda s: s | {"y": s["a"] @ s["b"]}, matrices),
        Program(
            "copy",
            2 * config.copy_bytes,
            negated,
            lambda seed: {"x": normal(seed, (count,), config.dtype)},
        ),
    ]


def programs(config: AttentionBenchConfig, case: Case, listed: int) -> list[Program]:
    """The jax programs of a case that the config's peers ask for; dense attention only at blocks 0.

    Args:
      config: sizes and peers.
      case: of any part but 'agreement' and 'ceiling'.
      listed: what `listed_blocks` says of it.
    """
    build: dict[Part, Callable] = {"decode": _decode, "table": _table}
    found = build.get(case.part, _attention)(config, case, listed)
    return [p for p in found if p.peer in config.peers or case.part == "table"]
