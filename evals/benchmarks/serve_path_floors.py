"""The least time of a row of the serving benchmark, at rates that long kernels reach on an H100.

Prefill is bound by products and attention, decoding by the bytes of weights, of keys and values and
of what pages are found by. Launches, routers, tables, norms and the embedding are left out.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from routing_jax.evals.benchmarks.serve_path_cases import Size, decisions, searched_bytes
from routing_jax.evals.benchmarks.serve_path_config import Part, ServePathConfig, Who
from routing_jax.generate import DENSE

FLOORS_OF = "H100"


class Rates(NamedTuple):
    """What an H100 reaches in 16 bits, with long inputs; its peak is 989e12 operations a second.

    Attributes:
      attention: operations a second of dense attention.
      products: operations a second of matrix products.
      memory: bytes a second.
    """

    attention: float = 577e12
    products: float = 650e12
    memory: float = 3e12


_H100 = Rates()


def _visited(config: ServePathConfig, who: Who, dense: bool, blocks: int) -> np.ndarray:
    """[J], blocks that each tile of a prompt visits in one layer."""
    sparse = config.model_of(who).sparse
    everything = np.arange(blocks) + 1
    rule = sparse.retrieval if dense else sparse.mode
    if rule == "full":
        return everything
    most = sparse.sink_blocks + sparse.window_blocks + sparse.blocks * (rule == "topk")
    last = everything * sparse.block_kv > blocks * sparse.block_kv - sparse.last
    return np.where(last & (rule != "streaming"), everything, np.minimum(everything, most))


def _read(config: ServePathConfig, who: Who, dense: bool, blocks: int) -> tuple[int, int]:
    """Blocks whose keys and values a decoded token reads in one layer, and those that compete."""
    sparse = config.model_of(who).sparse
    rule = sparse.retrieval if dense else sparse.mode
    near = min(blocks, sparse.sink_blocks + sparse.window_blocks)
    if rule == sparse.answers == "topk":
        return min(blocks, near + sparse.blocks), blocks - near
    return (near if rule == "streaming" else blocks), 0


def least_milliseconds(
    config: ServePathConfig, part: Part, size: Size, who: Who, rates: Rates = _H100
) -> float | None:
    """The least time of a prefill or of a step of decoding; None for a router's.

    Args:
      config: the model's shape and what its layers attend to.
      part: what is measured.
      size: of which sequences.
      who: with which layers.
      rates: of the device.

    >>> config, size = ServePathConfig(), Size(1, 131_072, 0.75)
    >>> [round(least_milliseconds(config, "decode", size, who), 1)
    ...  for who in ("dense", "routed", "composed")]
    [10.7, 6.5, 5.3]
    >>> [round(least_milliseconds(config, "prefill", size, who))
    ...  for who in ("dense", "routed", "composed")]
    [10620, 4863, 3008]
    """
    if part == "router":
        return None
    model = config.model_of(who)
    N, K, H = model.num_heads, model.num_kv_heads, model.head_dim
    weights = model.width * (2 * (N + K) * H + 3 * model.mlp_width) * len(model.mixers)
    head = model.width * model.vocab_size
    whole = who in ("dense", "kernels")
    dense = [whole or decision == DENSE for decision in decisions(config, size)]
    block = config.block
    blocks = -(-size.length // block)
    if part == "decode":
        token = 2 * K * H * jnp.dtype(model.dtype).itemsize
        read = np.array([_read(config, who, one, blocks) for one in dense]).sum(axis=0)
        past = size.batch * (int(read[0]) * block * token + int(read[1]) * searched_bytes(model))
        held = (weights + head) * jnp.dtype(model.dtype).itemsize
        return 1000 * (held + past) / rates.memory
    visited = sum(int(_visited(config, who, one, blocks).sum()) for one in dense)
    # Of a tile's own block half is hidden.
    pairs = visited * block**2 - len(dense) * blocks * block * (block - 1) // 2
    attention = 4 * N * H * pairs * size.batch
    products = 2 * size.batch * (weights * size.length + head)
    return 1000 * (attention / rates.attention + products / rates.products)
