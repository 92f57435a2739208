"""How attention runs: functions over arrays that know nothing of models."""

from routing_jax.kernels.attention import (
    AttentionImplementation,
    compacted_attention,
    default_implementation,
    dense_attention,
)
from routing_jax.kernels.block_lse import block_logsumexp
from routing_jax.kernels.block_patterns import (
    dense_table,
    global_table,
    sink_window_table,
    strided_table,
    window_table,
)
from routing_jax.kernels.block_selection import (
    Selection,
    best_blocks,
    table_from_blocks,
    table_from_scores,
    union_tables,
)
from routing_jax.kernels.block_sparse import ATTENTION, block_sparse_attention
from routing_jax.kernels.block_table import (
    BlockTable,
    check_table,
    density,
    row_lengths,
    with_dense_rows,
)
from routing_jax.kernels.block_transpose import TransposedTable, transpose_table
from routing_jax.kernels.causal_conv import causal_conv
from routing_jax.kernels.checks import checked
from routing_jax.kernels.compaction import capacity_ladder, compact, map_routed
from routing_jax.kernels.decode import (
    PageList,
    block_sparse_decode,
    contiguous_pages,
    decode_attention,
    decode_head_runs,
    dense_pages,
    listed_pages,
    where_pages,
    whole_pages,
)
from routing_jax.kernels.dropout import dropout
from routing_jax.kernels.products import float32_product
from routing_jax.kernels.rope import apply_rope, llama3_factors
from routing_jax.kernels.segments import segment_starts

__all__ = [
    "ATTENTION",
    "AttentionImplementation",
    "BlockTable",
    "PageList",
    "Selection",
    "TransposedTable",
    "apply_rope",
    "best_blocks",
    "block_logsumexp",
    "block_sparse_attention",
    "block_sparse_decode",
    "capacity_ladder",
    "causal_conv",
    "check_table",
    "checked",
    "compact",
    "compacted_attention",
    "contiguous_pages",
    "decode_attention",
    "decode_head_runs",
    "default_implementation",
    "dense_attention",
    "dense_pages",
    "dense_table",
    "density",
    "dropout",
    "float32_product",
    "global_table",
    "listed_pages",
    "llama3_factors",
    "map_routed",
    "row_lengths",
    "segment_starts",
    "sink_window_table",
    "strided_table",
    "table_from_blocks",
    "table_from_scores",
    "transpose_table",
    "union_tables",
    "where_pages",
    "whole_pages",
    "window_table",
    "with_dense_rows",
]
