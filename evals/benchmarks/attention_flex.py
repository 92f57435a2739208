"""FlexAttention as a peer: the same lists as a PyTorch BlockMask, timed by CUDA events.

PyTorch is imported only when something here is called. What stands in a mask is decided in numpy
(`flex_lists`), so that it is tested without it.
"""

import functools
import importlib.util
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from routing_jax.evals.benchmarks.attention_cases import (
    Case,
    listed_blocks,
    make_positions,
    make_table,
    page_bytes,
    random_pages,
)
from routing_jax.evals.benchmarks.attention_config import AttentionBenchConfig
from routing_jax.evals.benchmarks.running import set_memory_fraction
from routing_jax.evals.benchmarks.timing import State, Timing
from routing_jax.kernels import BlockTable


class FlexLists(NamedTuple):
    """What `BlockMask.from_kv_blocks` takes: the blocks to mask, and those that are all visible.

    It reads J, the number of key blocks, off the width of the indices.

    Attributes:
      counts: [B,K,M] int32, partly visible blocks of each tile.
      indices: [B,K,M,J] int32, which; slots past the count hold any block.
      full_counts: [B,K,M] int32, wholly visible blocks.
      full_indices: [B,K,M,J] int32, which.
    """

    counts: np.ndarray
    indices: np.ndarray
    full_counts: np.ndarray
    full_indices: np.ndarray


def flex_lists(table: BlockTable, positions: np.ndarray, num_keys: int) -> FlexLists:
    """A causal table's rows, split into partly and wholly visible blocks; invisible ones dropped.

    Args:
      table: of numpy or jax arrays; dense rows list every block.
      positions: [T] int, ascending: where each query stands.
      num_keys: S.

    >>> table = BlockTable(np.array([[[1, 2]]]), np.array([[[[0, 0], [0, 1]]]]), 8, 8)
    >>> lists = flex_lists(table, np.arange(16), 16)
    >>> lists.counts.tolist(), lists.full_counts.tolist()
    ([[[1, 1]]], [[[0, 1]]])
    >>> lists.indices[0, 0, :, 0].tolist(), lists.full_indices[0, 0, 1, 0].tolist()
    ([0, 1], 0)
    """
    J = -(-num_keys // table.block_kv)
    counts, indices = np.asarray(table.counts), np.asarray(table.indices)[..., :J]
    indices = np.pad(indices, [(0, 0)] * 3 + [(0, J - indices.shape[-1])])
    dense = (counts < 0)[..., None]
    slots = np.arange(J, dtype=np.int32)
    indices = np.where(dense, slots, indices).astype(np.int32)
    listed = dense | (slots < counts[..., None])
    starts = np.arange(counts.shape[2]) * table.block_q
    first = positions[starts][:, None]
    last = positions[np.minimum(starts + table.block_q, len(positions)) - 1][:, None]
    full = listed & ((indices + 1) * table.block_kv - 1 <= first)
    partial = listed & ~full & (indices * table.block_kv <= last)

    def packed(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Rows ascend, so what is chosen is one run of slots: it moves to the front.
        count, start = chosen.sum(-1, dtype=np.int32), chosen.argmax(-1)[..., None]
        moved = np.take_along_axis(indices, np.minimum(start + slots, J - 1), axis=-1)
        return count, moved

    return FlexLists(*packed(partial), *packed(full))


def flex_refusal() -> str | None:
    """Why FlexAttention cannot run here; None where it can."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed"
    import torch

    return None if torch.cuda.is_available() else "PyTorch finds no CUDA device"


def takes(config: AttentionBenchConfig, case: Case) -> bool:
    """Whether the case is measured with FlexAttention here.

    It has no slot to look the bias of a listed block up by.
    """
    wanted = "flex" in config.peers and case.variant != "block_bias"
    return wanted and flex_refusal() is None


def leave_memory_for_torch() -> None:
    """Halves the GPU memory that jax takes at its start, where PyTorch will want some too."""
    if importlib.util.find_spec("torch"):
        set_memory_fraction(0.5)


@functools.cache
def _flex_attention() -> Callable[..., Any]:
    import torch
    import torch._dynamo
    from torch.nn.attention.flex_attention import flex_attention

    # Past this limit a shape would run uncompiled; with fullgraph it raises instead.
    torch._dynamo.config.recompile_limit = 1024
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _causal(batch, head, q_index, kv_index):
    return q_index >= kv_index


def _causal_at(positions: Any) -> Callable[..., Any]:
    def visible(batch, head, q_index, kv_index):
        return positions[q_index] >= kv_index

    return visible


def _mask(config: AttentionBenchConfig, case: Case, seed: int) -> Any:
    """The case's BlockMask, where the query heads of a group repeat the lists of their kv head.

    In decoding a group's heads stand as the rows of one tile, and every block is wholly visible.
    """
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    mask_mod: Callable[..., Any] | None = _causal
    group, rows = case.num_heads // case.num_kv_heads, case.queries
    if case.part == "decode":
        counts, blocks = (np.asarray(x)[:, :, None] for x in random_pages(case, seed))
        blocks = np.pad(blocks, [(0, 0)] * 3 + [(0, case.num_blocks - blocks.shape[-1])])
        lists = FlexLists(np.zeros_like(counts), np.zeros_like(blocks), counts, blocks)
        mask_mod, group, rows = None, 1, group
    else:
        positions = make_positions(case, config.seed)
        if positions is not None:
            mask_mod = _causal_at(torch.from_numpy(positions[0]).cuda())
        at = np.arange(case.queries) if positions is None else positions[0]
        lists = flex_lists(jax.device_get(make_table(case, seed)), at, case.length)
    repeat = 1 if lists.counts.shape[1] == 1 else group  # one list stands for all heads
    on_device = (torch.from_numpy(x.copy()).cuda() for x in lists)
    return BlockMask.from_kv_blocks(
        *(x.repeat_interleave(repeat, dim=1).contiguous() for x in on_device),
        BLOCK_SIZE=(case.block, case.block),
        mask_mod=mask_mod,
        seq_lengths=(rows, case.length),
    )


def _kernel_options(block: int) -> dict[str, int] | None:
    """Tiles that divide a block shorter than FlexAttention's own tiles; None leaves them to it."""
    if block >= 128:
        return None
    half = block // 2
    return {
        "BLOCK_M": block,
        "BLOCK_N": block,
        "BLOCK_M1": half,
        "BLOCK_N1": block,
        "BLOCK_M2": block,
        "BLOCK_N2": half,
    }


def _random_tensors(config: AttentionBenchConfig, case: Case, seed: int) -> dict[str, Any]:
    """q, k, v and dy [B,heads,T,H] on the GPU; in decoding q is [B,K,G,H]."""
    import torch

    B, H, K = case.batch, case.head_dim, case.num_kv_heads
    q = (B, case.num_heads, case.queries, H)
    if case.part == "decode":
        q = (B, K, case.num_heads // K, H)
    kv = (B, K, case.length, H)
    generator = torch.Generator("cuda").manual_seed(seed)
    dtype = getattr(torch, config.dtype)
    return {
        name: torch.randn(shape, generator=generator, device="cuda", dtype=dtype)
        for name, shape in {"q": q, "k": kv, "v": kv, "dy": q}.items()
        if name != "dy" or case.part == "forward_backward"
    }


def _call(case: Case, tensors: dict[str, Any], mask: Any) -> Callable[[], dict[str, Any]]:
    """One forward pass, with the gradients where the tensors hold dy."""
    import torch

    q, k, v = (tensors[name].requires_grad_("dy" in tensors) for name in "qkv")
    grouped = q.shape[1] != k.shape[1]
    options = _kernel_options(case.block)

    def run() -> dict[str, Any]:
        y = _flex_attention()(q, k, v, block_mask=mask, enable_gqa=grouped, kernel_options=options)
        if "dy" not in tensors:
            return {"y": y}
        gradients = torch.autograd.grad(y, (q, k, v), tensors["dy"])
        return {"y": y, **dict(zip(("dq", "dk", "dv"), gradients))}

    return run


def flex_outputs(config: AttentionBenchConfig, case: Case, state: State) -> dict[str, np.ndarray]:
    """What FlexAttention makes of a state's q, k, v and dy: y, dq, dk and dv [B,T,heads,H].

    Args:
      config: for the dtype and the seed, with which the state was made.
      case: not of decoding.
      state: from `attention_inputs`.
    """
    import torch

    def to_torch(x: jax.Array) -> Any:
        host = torch.from_numpy(np.array(x, np.float32)).to("cuda", getattr(torch, config.dtype))
        return host.transpose(1, 2).contiguous()

    tensors = {name: to_torch(state[name]) for name in ("q", "k", "v", "dy")}
    found = _call(case, tensors, _mask(config, case, config.seed))()
    return {
        name: tensor.detach().transpose(1, 2).float().cpu().numpy()
        for name, tensor in found.items()
    }


def _device_ms(run: Callable[[], Any]) -> float:
    """Milliseconds on the device, by CUDA events."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _time_calls(
    config: AttentionBenchConfig, calls: Sequence[Callable[[], Any]], *, as_graph: bool
) -> Timing:
    """Milliseconds of one of the calls, which are made in turn."""
    import torch

    def rounds(count: int) -> None:
        for _ in range(count):
            for call in calls:
                call()

    rounds(2)  # compiles, then warms
    once = _device_ms(lambda: rounds(1))
    count = int(max(1, min(config.chain // len(calls), config.target_ms / once)))
    replay: Callable[[], None] = functools.partial(rounds, count)
    if as_graph:  # a short call would wait for the host
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            rounds(count)
        replay = graph.replay
        replay()
    samples = [_device_ms(replay) / (count * len(calls)) for _ in range(config.repeats)]
    low, _, high = np.percentile(samples, [25, 50, 75])
    return Timing(round(statistics.median(samples), 6), round(float(high - low), 6))


def time_flex(config: AttentionBenchConfig, case: Case) -> Timing:
    """Times FlexAttention on the tables that `programs` gives this library at the same seeds.

    Args:
      config: timing.
      case: of 'forward', 'forward_backward' or 'decode'.

    Raises:
      RuntimeError: PyTorch or its GPU is missing.
    """
    refusal = flex_refusal()
    if refusal:
        raise RuntimeError(f"FlexAttention cannot run: {refusal}.")
    import torch

    tensors = _random_tensors(config, case, config.seed)
    reads = sum(x.numel() * x.element_size() for x in tensors.values())
    if case.part == "decode":
        pages = listed_blocks(case, config.seed)
        reads = page_bytes(case, pages, tensors["q"].element_size())
    calls = []
    for i in range(1 + config.cache_bytes // reads):
        seed = config.seed + 10 * i
        tensors = tensors if i == 0 else _random_tensors(config, case, seed)
        calls.append(_call(case, tensors, _mask(config, case, seed)))
    del tensors
    try:
        with torch.set_grad_enabled(case.part == "forward_backward"):
            return _time_calls(config, calls, as_graph=case.part == "decode")
    finally:
        calls.clear()
        torch.cuda.empty_cache()
