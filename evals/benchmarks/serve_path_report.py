"""What the rows of the serving benchmark say together: speed-ups, memory, tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from routing_jax.evals.benchmarks.running import missing_word
from routing_jax.evals.benchmarks.serve_path_config import PATTERNED
from routing_jax.evals.provenance import dated_versions, named_device

Row = dict[str, Any]

_NAMES = {  # in the order of their columns
    "dense": "dense",
    "routed": "routed",
    "composed": "composed",
    "kernels": "all dense, our kernels",
}
_BESIDE_DENSE = ("routed", "composed")  # of all columns, whose memory and tokens are shown
_TITLES = {
    "prefill": "**Prefill**, milliseconds from tokens to logits",
    "decode": "**Decode**, milliseconds a step",
}


def _size(row: Mapping[str, Any]) -> tuple[int, int]:
    return row["length"], row["batch"]


def _column(row: Mapping[str, Any]) -> str:
    name = _NAMES[row["who"]]
    if row["who"] not in PATTERNED:
        return name
    search = ""
    if row["blocks"]:
        search = f" (best {row['blocks']} blocks by {found_by(row)})"
    return f"{name}{search}, {100 * row['sparse_share']:.3g} % sparse"


def found_by(row: Mapping[str, Any]) -> str:
    """What blocks were found by, of a row of a search.

    >>> found_by({"channels": 32}), found_by({"means": 8}), found_by({})
    ('32 channels', '8 means', '1 mean')
    """
    if "channels" in row:
        return f"{row['channels']} channels"
    means = row.get("means", 1)  # of when a block was found by means of its keys, one at first
    return f"{means} mean{'s' * (means > 1)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cell(row: Row | None, dense: Row | None) -> str:
    if row is None:
        return ""
    if row["milliseconds"] is None:
        return missing_word(row)
    text = _number(row["milliseconds"])
    if row["who"] != "dense" and dense is not None and dense["milliseconds"]:
        text += f" ({dense['milliseconds'] / row['milliseconds']:.2f}×)"
    return text


def _held(row: Row) -> int | None:
    """Bytes that keys and values take: as the device counts, or else by what was asked of it."""
    return row["device_bytes"] or row["kv_bytes"]


def _memory(row: Row | None, dense: Row | None) -> str:
    if row is None or not (held := _held(row)):
        return ""
    text = f"{held / 2**30:.3g}"
    if row["who"] != "dense" and dense is not None and (beside := _held(dense)):
        text += f" ({held / beside:.2f}×)"
    return text


def _most_tokens(rows: Sequence[Row]) -> str:
    """By length, the tokens a second of the batch in which each makes the most."""
    said = []
    for length in sorted({row["length"] for row in rows}):
        best: dict[str, tuple[float, int]] = {}
        for row in rows:
            if row["length"] == length and row["milliseconds"]:
                rate = 1000 * row["batch"] / row["milliseconds"], row["batch"]
                best[_column(row)] = max(rate, best.get(_column(row), rate))
        if len(best) > 1:
            dense = best.get("dense")
            parts = [
                f"{column} {_number(rate)} (batch {batch}"
                + (f", {rate / dense[0]:.2f}×)" if dense and column != "dense" else ")")
                for column, (rate, batch) in sorted(best.items())
            ]
            said.append(f"of {length} tokens: {'; '.join(parts)}")
    return f"Most tokens a second in all, for sequences {', '.join(said)}." if said else ""


def _floors(rows: Sequence[Row]) -> str:
    """A line a size: the least time of each, and how much of that speed was reached."""
    timed = [row for row in rows if row["milliseconds"] and row["least"]]
    if not timed:
        return ""
    columns = _columns(timed)
    heads = ["", "tokens", "batch", *columns]
    lines = [
        "**Least** milliseconds at rates that long kernels reach on an H100, and the share of that "
        "speed that was reached",
        "",
        f"| {' | '.join(heads)} |",
        "| --- |" + " ---: |" * (len(heads) - 1),
    ]
    found = {(row["part"], _size(row), _column(row)): row for row in timed}
    for part, size in sorted({(part, size) for part, size, _ in found}):
        here = [found.get((part, size, column)) for column in columns]
        cells = [
            f"{_number(row['least'])} ({100 * row['least'] / row['milliseconds']:.0f} %)"
            if row
            else ""
            for row in here
        ]
        lines.append(f"| {' | '.join([part, str(size[0]), str(size[1]), *cells])} |")
    return "\n".join(lines)


def _columns(rows: Sequence[Row]) -> list[str]:
    by_name = sorted(rows, key=lambda row: (list(_NAMES).index(row["who"]), _column(row)))
    return list(dict.fromkeys(map(_column, by_name)))


def table(rows: Sequence[Row]) -> str:
    """Markdown: for prefill and decode a line a size, then floors and the routers' own time.

    Ratios of times are speed-ups over dense; those of memory are shares of it. Tokens a second
    are of all sequences of the batch.

    >>> size = {"part": "decode", "length": 8, "batch": 2, "sparse_share": 0.5, "spread": 0.0,
    ...         "blocks": None, "device_bytes": None}
    >>> dense = size | {"who": "dense", "milliseconds": 4.0, "least": 3.0, "kv_bytes": 2**31}
    >>> fast = size | {"who": "routed", "milliseconds": 2.0, "least": 1.8, "kv_bytes": 2**30}
    >>> print(table([fast, dense]))
    **Decode**, milliseconds a step
    <BLANKLINE>
    | tokens | batch | dense | routed, 50 % sparse | tokens/s, dense | tokens/s, routed | KV GiB, \
dense | KV GiB, routed |
    | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
    | 8 | 2 | 4 | 2 (2.00×) | 500 | 1,000 | 2 | 1 (0.50×) |
    <BLANKLINE>
    Most tokens a second in all, for sequences of 8 tokens: dense 500 (batch 2); routed, 50 % \
sparse 1,000 (batch 2, 2.00×).
    <BLANKLINE>
    **Least** milliseconds at rates that long kernels reach on an H100, and the share of that \
speed that was reached
    <BLANKLINE>
    |  | tokens | batch | dense | routed, 50 % sparse |
    | --- | ---: | ---: | ---: | ---: |
    | decode | 8 | 2 | 3 (75 %) | 1.8 (90 %) |
    """
    blocks = []
    for part, title in _TITLES.items():
        mine = [row for row in rows if row["part"] == part]
        if not mine:
            continue
        found = {(_size(row), _column(row)): row for row in mine}
        columns = _columns(mine)
        first = [next((c for c in columns if c.startswith(n)), None) for n in _BESIDE_DENSE]
        shown = [c for c in ("dense", *first) if c is not None]
        short = [c.split(",")[0] for c in shown]
        rate = "tokens/s, "
        heads = ["tokens", "batch", *columns]
        heads += [rate + name for name in short] if part == "decode" else []
        heads += [f"KV GiB, {name}" for name in short]
        lines = [title, "", f"| {' | '.join(heads)} |", "|" + " ---: |" * len(heads)]
        for size in sorted(set(map(_size, mine))):
            dense = found.get((size, "dense"))
            here = [found.get((size, column)) for column in columns]
            cells = [str(size[0]), str(size[1]), *(_cell(row, dense) for row in here)]
            picked = [found.get((size, column)) for column in shown]
            if part == "decode":
                cells += [
                    _number(1000 * size[1] / row["milliseconds"])
                    if row is not None and row["milliseconds"]
                    else ""
                    for row in picked
                ]
            cells += [_memory(row, dense) for row in picked]
            lines.append(f"| {' | '.join(cells)} |")
        blocks.append("\n".join(lines))
    decoded = [row for row in rows if row["part"] == "decode"]
    blocks += filter(None, [_most_tokens(decoded), _floors(rows)])
    routers = [row for row in rows if row["part"] == "router" and row["milliseconds"]]
    if routers:
        said = ", ".join(
            f"{row['milliseconds']:.3g} at {row['length']}"
            + (f" × {row['batch']}" if row["batch"] > 1 else "")
            for row in sorted(routers, key=_size)
        )
        blocks.append(f"**Router**, milliseconds a layer, contained above: {said}.")
    return "\n\n".join(blocks)


def describe(row: Row) -> str:
    """A row in one line, for the terminal.

    >>> describe({"part": "decode", "who": "dense", "length": 8, "batch": 2, "sparse_share": 0.0,
    ...           "milliseconds": 2.0, "spread": 0.1, "samples": 3, "kv_bytes": 2**30,
    ...           "blocks": None, "device_bytes": None, "peak_bytes": 2**31})
    'decode 2×8 dense: 2 ms ± 0.1, KV 1 GiB, peak 2.0 GiB'
    """
    name = f"{row['part']} {row['batch']}×{row['length']} {_column(row)}"
    if row["milliseconds"] is None:
        return f"{name}: {row['error']}"
    count = row["samples"]
    times = f"{row['milliseconds']:.4g} ms" + (f" ± {row['spread']:.2g}" if count > 1 else "")
    held = f", KV {size / 2**30:.3g} GiB" if (size := _held(row)) else ""
    peak = f", peak {row['peak_bytes'] / 2**30:.1f} GiB" if row["peak_bytes"] else ""
    return f"{name}: {times}{held}{peak}"


def _composition(result: Mapping[str, Any]) -> str:
    if not any(row["who"] == "composed" for row in result["rows"]):
        return ""
    return (
        "; composed: the other layers see the same and the best blocks of "
        f"{result['config']['block']} keys, for each tile of the prompt and for each token"
    )


def caption(result: Mapping[str, Any]) -> str:
    """What a serving benchmark ran on, from its result file.

    Args:
      result: of `serve_path.run`.
    """
    config = result["config"]
    return (
        f"{named_device(result)}: the shape of {config['model']} with random weights; dense "
        f"layers attend by {result['attention']}; sparse ones ({config['mode']}) see "
        f"{config['sink']} first tokens and a window of {config['window']}, in a fixed pattern, "
        f"the routers computed{_composition(result)}. Median of up to {config['repeats']} samples, "
        f"a decode sample being {config['steps']} tokens. "
        f"{dated_versions(result)}"
    )
