"""Every sharding rule of the library: the mesh, and where each tensor dimension lives on it.

One mesh with axes `data` (copies), `fsdp` (parameters and batch split) and `tensor` (heads, MLP
columns and vocabulary split). Parameters are plain arrays; their layout follows from their names.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))


@dataclass(frozen=True)
class ShardingRules:
    """The mesh axis of each logical dimension; None keeps it whole."""

    width: str | None = "fsdp"
    heads: str | None = "tensor"
    kv_heads: str | None = "tensor"
    head_dim: str | None = None
    mlp: str | None = "tensor"
    vocab: str | None = "tensor"


# The logical dimensions of each parameter that is worth splitting; all others are replicated.
_DIMENSIONS: dict[str, tuple[str, ...]] = {
    "embedding": ("vocab", "width"),
    "head": ("width", "vocab"),
    "head_bias": ("vocab",),
    "mixer/query": ("width", "heads", "head_dim"),
    "mixer/key": ("width", "kv_heads", "head_dim"),
    "mixer/value": ("width", "kv_heads", "head_dim"),
    "mixer/query_bias": ("heads", "head_dim"),
    "mixer/key_bias": ("kv_heads", "head_dim"),
    "mixer/value_bias": ("kv_heads", "head_dim"),
    "mixer/out": ("heads", "head_dim", "width"),
    "mlp/gate": ("width", "mlp"),
    "mlp/up": ("width", "mlp"),
    "mlp/down": ("mlp", "width"),
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """The one mesh, over all devices of all processes.

    Args:
      data: copies of the model; −1 takes the devices that the other axes leave.
      fsdp: devices that share parameters and batch; −1 likewise.
      tensor: devices that share heads, MLP columns and vocabulary; −1 likewise.

    Raises:
      ValueError: the axes do not multiply to the number of devices.

    >>> make_mesh().axis_names
    ('data', 'fsdp', 'tensor')
    """
    devices = jax.device_count()
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    fixed = abs(int(np.prod([s for s in sizes.values() if s != -1]))) or 1
    sizes = {name: devices // fixed if size == -1 else size for name, size in sizes.items()}
    if min(sizes.values()) < 1 or int(np.prod(list(sizes.values()))) != devices:
        raise ValueError(
            f"mesh is data={data}, fsdp={fsdp}, tensor={tensor}; the axes must multiply to the "
            f"{devices} device(s) here."
        )
    # Auto axes: parameters are plain arrays, and the partitioner fills in what is not said.
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3)


def parameter_spec(
    path: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh, rules: ShardingRules
) -> P:
    """Where one leaf of a parameter (or optimizer) tree lives, from its name and shape.

    A dimension that its axis does not divide stays whole.

    Args:
      path: the leaf's key path, as `jax.tree_util.tree_map_with_path` gives it.
      shape: the leaf's shape; a leading dimension more than the rule names is the scan's.
      mesh: the mesh.
      rules: axis of each logical dimension.
    """
    names = [str(getattr(k, "key", getattr(k, "name", ""))) for k in path]
    dims = _DIMENSIONS.get("/".join(names[-2:])) or _DIMENSIONS.get(names[-1] if names else "")
    if dims is None or len(shape) - len(dims) not in (0, 1):
        return P()
    spec: list[str | None] = [None] * (len(shape) - len(dims))
    for size, dim in zip(shape[len(spec) :], dims):
        axis = getattr(rules, dim)
        spec.append(axis if axis and size % mesh.shape[axis] == 0 else None)
    return P(*spec)


def tree_shardings(tree: Any, mesh: Mesh, rules: ShardingRules | None = None) -> Any:
    """A NamedSharding for every leaf of a train state (arrays or shapes).

    >>> import jax.numpy as jnp
    >>> tuple(tree_shardings({"embedding": jnp.zeros((8, 4))}, make_mesh())["embedding"].spec)
    ('tensor', 'fsdp')
    """
    rules = rules or ShardingRules()
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, parameter_spec(path, leaf.shape, mesh, rules)), tree
    )


def batch_sharding(mesh: Mesh, batch_size: int) -> NamedSharding:
    """How the leading dimension of a batch is split: over `data` and `fsdp`.

    Raises:
      ValueError: the batch does not divide among the devices.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % parts:
        raise ValueError(
            f"a batch of {batch_size} sequences does not divide among mesh.data × mesh.fsdp = "
            f"{parts} devices; change batch_tokens or the mesh."
        )
    return NamedSharding(mesh, BATCH)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Each process's rows of a batch (numpy, [B_local, …]) as one global array a leaf."""
    processes = jax.process_count()

    def put(rows: np.ndarray) -> jax.Array:
        sharding = batch_sharding(mesh, rows.shape[0] * processes)
        return jax.make_array_from_process_local_data(sharding, rows)

    return jax.tree.map(put, batch)
