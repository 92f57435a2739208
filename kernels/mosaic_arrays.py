"""Arrays of Mosaic GPU kernels: shared memory that wgmma reads, and what loops carry."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp


def tiled_smem(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, columns: int | None = None
) -> pl.MemoryRef:
    """Shared memory that TMA writes and wgmma reads, in the widest swizzle that fits a row.

    Args:
      shape: the last dimension takes a multiple of 32 bytes.
      dtype: a float.
      columns: of the smallest part of a row that is read alone; None for the whole row.

    >>> tiled_smem((2, 64, 128), jnp.bfloat16).shape
    (2, 64, 128)
    """
    bits = jnp.finfo(dtype).bits
    swizzle = plgpu.find_swizzle((columns or shape[-1]) * bits)
    # Both classes leave a method unwritten, which type checkers take for an abstract one.
    tiling = plgpu.TilingTransform((8, 8 * swizzle // bits))  # type: ignore[abstract]
    swizzling = plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzling))


def row_vector(size: int, fill: float) -> jax.Array:
    """A float32 vector with one value a row of an accumulator, as a loop carries it.

    Args:
      size: rows.
      fill: every value.

    >>> jax.eval_shape(lambda: row_vector(64, 0.0)).shape
    (64,)
    """
    layout = plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full((size,), fill, jnp.float32), layout)


def accumulator(rows: int, columns: int) -> jax.Array:
    """Float32 zeros in the layout of a wgmma accumulator, as a loop carries it.

    Args:
      rows: a multiple of 64.
      columns: a multiple of 8.

    >>> jax.eval_shape(lambda: accumulator(64, 128)).shape
    (64, 128)
    """
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), plgpu.Layout.WGMMA)
