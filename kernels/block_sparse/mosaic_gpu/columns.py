"""The work of the kernels that walk table columns: which queries attend to a program's keys."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from routing_jax.kernels.block_sparse.mosaic_gpu.call import Geometry, at
from routing_jax.kernels.hopper import WARPGROUP_ROWS


class Column:
    """The query tiles that see one key block of one kv head, in chunks of 64 rows, in a kernel.

    Steps go through the tiles that list the block, then through those of dense rows that see it,
    each in ascending order; and within a tile through the chunks of its heads.

    Attributes:
      batch: the sequence; this and the next two are the program's place in the grid.
      kv_head: the kv head.
      block: the key block.
      steps: chunks to visit.
    """

    def __init__(self, geometry: Geometry, inputs, columns, heads: int, part: jax.Array | int = 0):
        """A column of `heads` heads of the group, those from part·heads on."""
        self._geometry, self._inputs, self._columns = geometry, inputs, columns
        self._first_head = part * heads
        self._chunks = heads * geometry.block_q // WARPGROUP_ROWS  # a tile
        self.batch, self.kv_head, self.block = (
            lax.axis_index(name) for name in ("batch", "kv_head", "block")
        )
        self._table = at(inputs.indices.shape, self.batch, self.kv_head)
        self._first_entry = columns.offsets[(*self._table, self.block)]
        self._listed = columns.offsets[(*self._table, self.block + 1)] - self._first_entry
        runs = (*at(columns.dense_counts.shape, self.batch, self.kv_head), self.block)
        self._first_dense = columns.first_dense[runs]
        self.steps = (self._listed + columns.dense_counts[runs]) * self._chunks

    def entry(self, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The tile of a step and the block's slot in its row; C for a dense row."""
        geometry = self._geometry
        nth = lax.div(step, self._chunks)
        place = jnp.minimum(self._first_entry + nth, geometry.M * geometry.C - 1)
        nth_dense = jnp.clip(self._first_dense + nth - self._listed, 0, geometry.M - 1)
        entry = self._columns.entries[(*self._table, place)]
        tile = self._columns.dense_tiles[(*self._table, nth_dense)]
        is_listed = nth < self._listed
        tile = jnp.where(is_listed, lax.div(entry, geometry.C), tile)
        return tile, jnp.where(is_listed, lax.rem(entry, geometry.C), geometry.C)

    def chunk(self, step: jax.Array, tile: jax.Array) -> tuple[jax.Array, pl.Slice]:
        """The query head and the rows of T of a step in its tile."""
        geometry = self._geometry
        head, offset = geometry.place(lax.rem(step, self._chunks))
        rows = pl.ds(tile * geometry.block_q + offset, WARPGROUP_ROWS)
        return self.kv_head * geometry.G + self._first_head + head, rows

    def fetch(self, chunk: tuple[jax.Array, pl.Slice], output, rings, stage, full) -> None:
        """Starts copying a chunk's queries, d_out, lse and δ to a stage of their rings.

        Args:
          chunk: its head and rows.
          output: what the forward pass left, as references.
          rings: four, in this order, in shared memory.
          stage: of the rings.
          full: barriers of four arrivals, one a stage.
        """
        head, rows = chunk
        for source, ring in zip(
            (
                self._inputs.q.at[self.batch, rows, head],
                output.d_out.at[self.batch, rows, head],
                output.lse.at[self.batch, head, rows],
                output.delta.at[self.batch, head, rows],
            ),
            rings,
            strict=True,
        ):
            plgpu.copy_gmem_to_smem(source, ring.at[stage], full.at[stage])

    def bias(self, tile: jax.Array, slot: jax.Array) -> jax.Array:
        """The bias of the block in a tile's row; dense rows have none."""
        geometry = self._geometry
        slot_in_row = jnp.minimum(slot, geometry.C - 1)
        bias = self._inputs.bias[self.batch, self.kv_head, tile, slot_in_row]
        return jnp.where(slot < geometry.C, bias, 0.0)
