"""The log-sum-exp of blocks in XLA: the reference, which runs anywhere."""

import jax
import jax.numpy as jnp

from routing_jax.kernels.block_lse.implementation import LseImplementation, LseInputs
from routing_jax.kernels.block_table import ceil_div
from routing_jax.kernels.padding import cut

_LOGITS = 2**28  # held at once, 1 GiB


def _run(scale: float, inputs: LseInputs) -> jax.Array:
    q, keys, pages, _, _ = inputs
    (B, M, N, R), (K, S) = q.shape, keys.shape[1:3]
    J = pages.shape[1]
    queries = q.reshape(B, M, K, N // K, R)
    precision = "highest" if q.dtype == jnp.float32 else None

    def add_up(pages: jax.Array) -> jax.Array:
        own = keys.at[pages].get(mode="clip")
        logits = jnp.einsum(
            "BMKGR,BJKSR->BMKGJS",
            queries,
            own,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return jax.nn.logsumexp(logits * scale, axis=-1)

    # So many blocks at a time that their logits are at most as many.
    parts = ceil_div(J, max(1, _LOGITS // (B * M * N * S)))
    found = jax.lax.map(add_up, jnp.moveaxis(cut(pages, 1, ceil_div(J, parts)), 1, 0))
    return jnp.moveaxis(found, 0, 4).reshape(B, M, N, -1)[..., :J]


XLA = LseImplementation("xla", lambda inputs: None, _run)
