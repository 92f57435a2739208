"""How far each peer of the attention benchmark is from float32: that all compute the same thing."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from routing_jax.evals.benchmarks import attention_flex
from routing_jax.evals.benchmarks.attention_cases import Case
from routing_jax.evals.benchmarks.attention_config import AttentionBenchConfig, Peer
from routing_jax.evals.benchmarks.attention_programs import (
    attention_inputs,
    forward_backward,
    full_attention,
    sparse_attention,
    takes_fused,
)
from routing_jax.evals.benchmarks.timing import State
from routing_jax.kernels.block_sparse.reference import reference_attention


def agreeing_peers(config: AttentionBenchConfig, case: Case) -> list[Peer]:
    """Those of the config's peers that can compute the case here."""

    def can(peer: Peer) -> bool:
        if peer == "flex":
            return attention_flex.takes(config, case)
        if peer == "fused":
            return takes_fused(case)
        return peer != "dense" or (not case.blocks and case.variant != "blocks64")

    return [peer for peer in config.peers if can(peer)]


def _exact(state: State) -> jax.Array:
    out, _ = reference_attention(
        state["q"],
        state["k"],
        state["v"],
        state["table"],
        block_bias=state.get("bias"),
        q_positions=state.get("positions"),
    )
    return out


def _difference(got: Any, want: Any) -> float:
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    difference = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    if not np.isfinite(difference):
        raise FloatingPointError("an output holds nan or inf.")
    return difference


def differences(config: AttentionBenchConfig, case: Case, peer: Peer) -> dict[str, float]:
    """‖out − want‖ / ‖want‖ of y and of each gradient, against dense float32 with a mask.

    Args:
      config: sizes, dtype and implementation.
      case: of part 'agreement'.
      peer: one of `agreeing_peers`.

    Raises:
      FloatingPointError: an output is not finite.
    """
    state = attention_inputs(config, case, config.seed)
    if peer == "flex":
        got: Any = attention_flex.flex_outputs(config, case, state)
    else:
        sparse = functools.partial(
            sparse_attention, config.implementation, deterministic=peer != "fused"
        )
        attend: Callable[[State], jax.Array] = full_attention if peer == "dense" else sparse
        got = jax.jit(functools.partial(forward_backward, attend))(state)
    exact = state | {name: state[name].astype(jnp.float32) for name in ("q", "k", "v", "dy")}
    want = jax.jit(functools.partial(forward_backward, _exact))(exact)
    names = [name for name in ("y", "dq", "dk", "dv", "dbias") if name in got]
    return {name: _difference(got[name], want[name]) for name in names}
