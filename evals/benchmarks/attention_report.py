"""What the rows of the attention benchmark say together: ratios, break-even, a table."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from routing_jax.evals.benchmarks.running import missing_word
from routing_jax.evals.provenance import dated_versions, named_device

Row = dict[str, Any]

_LISTS = ("blocks", "block", "variant", "peer")
_SIZES = ("part", "batch", "length", "queries", "head_dim", "num_heads", "num_kv_heads")


def _key(row: Mapping[str, Any], *more: str) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in (*_SIZES, *more))


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """The rows with what each is beside the others.

    `ratio` holds, for each peer at the same sizes and lists, its milliseconds ÷ the row's: above 1
    the row is faster. 'dense' is attention to everything at the same sizes; 'unbiased', for a row
    with a block bias, the same without; 'forward', for the building of a table, the pass that
    uses it (its share of that pass is 1 ÷ this). `of_matmul` is the share of the measured matmul.

    >>> sizes = {"part": "forward", "length": 8, "variant": None, "block": 2, "unit": "TFLOP/s"}
    >>> fast = sizes | {"peer": "block_sparse", "blocks": 1, "milliseconds": 1.0, "rate": 3.0}
    >>> slow = sizes | {"peer": "dense", "blocks": 0, "milliseconds": 4.0, "rate": 2.0}
    >>> [row["ratio"] for row in with_ratios([fast, slow])]
    [{'dense': 4.0}, {}]
    """
    measured = [row for row in rows if row.get("milliseconds")]
    dense = {_key(row): row for row in measured if row["peer"] == "dense"}
    same = {_key(row, *_LISTS): row for row in measured}
    matmul = next((row["rate"] for row in measured if row["peer"] == "matmul"), None)

    def beside(row: Row) -> dict[str, float]:
        others = {"dense": dense.get(_key(row))} if row["peer"] != "dense" else {}
        for peer in ("block_sparse", "fused", "flex", "forward"):
            others[peer] = same.get(_key(row | {"peer": peer}, *_LISTS))
        if row.get("variant") == "block_bias":
            plain = row | {"variant": None}
            others["unbiased"] = same.get(_key(plain, *_LISTS))
        own = row["milliseconds"]
        return {
            peer: other["milliseconds"] / own
            for peer, other in others.items()
            if other and peer != row["peer"]
        }

    found = []
    for row in rows:
        if row.get("milliseconds"):
            of = row["rate"] / matmul if matmul and row["unit"] == "TFLOP/s" else None
            row = row | {"ratio": beside(row), "of_matmul": of}
        found.append(row)
    return found


def break_even(rows: Sequence[Row]) -> list[Row]:
    """The density below which block-sparse attention is faster than dense, where it was measured.

    Between two measured densities, milliseconds are taken to lie on a line. `density` is 1 where
    even every block listed costs no more than dense attention, and None where the sparsest that
    was measured costs more.

    >>> def row(peer, density, ms):
    ...     return {"part": "forward", "length": 8, "variant": None, "block": 2, "peer": peer,
    ...             "density": density, "milliseconds": ms}
    >>> listed = [row("block_sparse", 1.0, 4.0), row("block_sparse", 0.5, 2.0)]
    >>> break_even([row("dense", 1.0, 3.0), *listed])[0]["density"]
    0.75
    """
    measured = [row for row in rows if row.get("milliseconds")]
    found = []
    for dense in (row for row in measured if row["peer"] == "dense"):
        line = sorted(
            (row["density"], row["milliseconds"])
            for row in measured
            if row["peer"] == "block_sparse"
            and (_key(row), row["variant"]) == (_key(dense), dense["variant"])
        )
        if len(line) < 2:
            continue
        limit, density = dense["milliseconds"], None
        if line[0][1] <= limit:
            density = line[-1][0]
            for (low, fast), (high, slow) in itertools.pairwise(line):
                if slow > limit:
                    density = low + (high - low) * (limit - fast) / (slow - fast)
                    break
        sizes = {name: dense.get(name) for name in (*_SIZES, "variant")}
        found.append(sizes | {"density": density})
    return found


def _rate(row: Row) -> str:
    if not row.get("milliseconds"):
        return missing_word(row)
    return f"{row['rate']:.0f}" if row["rate"] and row["rate"] >= 10 else f"{row['rate']:.3g}"


def describe(row: Row) -> str:
    """A row in one line, for the terminal.

    >>> describe({"part": "ceiling", "peer": "copy", "milliseconds": 2.0, "spread": 0.1,
    ...           "rate": 3.0, "unit": "GB/s", "ratio": {}})
    'ceiling copy: 2 ms ± 0.1, 3 GB/s'
    """
    names = [row["part"], row.get("variant") or "", row["peer"]]
    sizes = {
        "T": row.get("queries"),
        "S": row.get("length"),
        "B": row.get("batch"),
        "H": row.get("head_dim"),
        "N": row.get("num_heads"),
        "K": row.get("num_kv_heads"),
        "blocks": row.get("blocks") or "all",
        "of": row.get("block"),
    }
    if row.get("length"):
        names.append(" ".join(f"{name}={value}" for name, value in sizes.items()))
    said = []
    if row.get("milliseconds"):
        said.append(f"{row['milliseconds']:.4g} ms ± {row['spread']:.2g}")
        said += [f"{_rate(row)} {row['unit']}"] if row["unit"] else []
        said += [f"{ratio:.3g}× {peer}" for peer, ratio in row["ratio"].items()]
    said += [f"{name} {value:.2g}" for name, value in row.get("difference", {}).items()]
    said += [row["error"]] if "error" in row else []
    return f"{' '.join(filter(None, names))}: {', '.join(said)}"


def _size(row: Row) -> str:
    """The first cells of a row's line."""
    length = str(row["length"])
    if row["part"] == "decode":
        length = f"{row['batch']}×{length}"
    elif row["variant"] == "few_queries":
        length = f"{row['queries']} of {length}"
    blocks = f"{row['blocks'] or 'all'} × {row['block']}"
    blocks += ", bias" if row["variant"] == "block_bias" else ""
    blocks += ", fused" if row["peer"] == "fused" else ""
    heads = f"{row['num_heads']}/{row['num_kv_heads']}"
    return f"| {length} | {heads} | {row['head_dim']} | {blocks} "


def caption(result: Mapping[str, Any]) -> str:
    """What an attention benchmark ran on, from its result file.

    Args:
      result: of `attention.run`.
    """
    config = result["config"]
    ptxas = f", ptxas {result['ptxas']}" if result.get("ptxas") else ""
    flex = f"; no FlexAttention: {result['flex']}" if result.get("flex") else ""
    return (
        f"{named_device(result)}{ptxas}, {config['dtype']}; dense by {result['dense']}"
        f"{flex}. Rates count listed blocks, and T²/2 pairs where every block is listed. Median of "
        f"{config['repeats']}, {dated_versions(result)}"
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown: a table a part, a line a size, with each peer's time and rate.

    >>> row = {"part": "forward", "variant": None, "batch": 1, "length": 8, "queries": 8}
    >>> row |= {"block": 2, "blocks": 0, "head_dim": 4, "num_heads": 2, "num_kv_heads": 1}
    >>> row |= {"peer": "block_sparse", "milliseconds": 2.0, "rate": 600.0, "unit": "TFLOP/s"}
    >>> row["ratio"] = {"dense": 1.5}
    >>> print(table([row]))
    **forward**, milliseconds (TFLOP/s)
    <BLANKLINE>
    | length | heads | head dim | blocks | routing_jax | × dense | × FlexAttention |
    | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
    | 8 | 2/1 | 4 | all × 2 | 2 (600) | 1.5 |  |
    """
    blocks = []
    for part in ("forward", "forward_backward", "decode"):
        ours = ("block_sparse", "fused")
        mine = [row for row in rows if row["part"] == part and row["peer"] in ours]
        if not mine:
            continue
        unit = "GB/s of keys and values listed" if part == "decode" else "TFLOP/s"
        lines = [
            f"**{part.replace('_', ' and ')}**, milliseconds ({unit})",
            "",
            "| length | heads | head dim | blocks | routing_jax | × dense | × FlexAttention |",
            "| ---: |" + " ---: |" * 6,
        ]
        for row in mine:
            ratio = row.get("ratio", {})
            cells = [f"{ratio[name]:.3g}" if name in ratio else "" for name in ("dense", "flex")]
            time = _rate(row)
            if row["milliseconds"]:
                time = f"{row['milliseconds']:.4g} ({time})"
            lines.append(f"{_size(row)}| {time} | {' | '.join(cells)} |")
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, *_remarks(rows)])


def _remarks(rows: Sequence[Row]) -> list[str]:
    """Sentences on what stands in no table: ceilings, break-even, table building."""
    said = [
        f"{row['peer']} alone: {_rate(row)} {row['unit']}."
        for row in rows
        if row["part"] == "ceiling" and row["milliseconds"]
    ]
    for row in break_even(rows):
        if row["part"] in ("forward", "forward_backward") and row["variant"] is None:
            share = "at no measured density" if row["density"] is None else f"{row['density']:.0%}"
            said.append(
                f"{row['part'].replace('_', ' and ')} at {row['length']}, head dim "
                f"{row['head_dim']}: as fast as dense at {share} of its blocks."
            )
    for row in rows:
        if row["part"] == "table" and "forward" in row.get("ratio", {}):
            said.append(
                f"{row['peer']} of {row['blocks']} blocks at {row['length']}: "
                f"{row['milliseconds']:.3g} ms, "
                f"{1 / row['ratio']['forward']:.1%} of the forward pass."
            )
    return ["\n".join(f"- {line}" for line in said)] if said else []
