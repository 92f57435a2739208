"""What the rows of `bench tpu-schedule` say together: ratios, and tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from routing_jax.evals.provenance import dated_versions

Row = dict[str, Any]

BLIND = (
    "Bundles are counted in the compiler's schedule, not measured: waiting for main memory does "
    "not show."
)


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["chip"], row["program"], row["head_dim"], row["length"]


def best_splash(rows: Sequence[Row]) -> dict[tuple[Any, ...], Row]:
    """(chip, kernel, head dim, length) → the row of the tiles with which splash needs least."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row["peer"] == "splash" and row.get("bundles"):
            best = found.setdefault(_key(row), row)
            if row["bundles"] < best["bundles"]:
                found[_key(row)] = row
    return found


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Our rows with what each is beside others of the same chip, kernel, head dim and length.

    `of_splash` is its bundles ÷ those of splash at its best tiles, for a dense table; `per_block`
    its bundles a listed block ÷ those of the dense table: 1 if work is proportional.

    >>> sizes = {"part": "schedule", "chip": "v5e", "head_dim": 64, "length": 256}
    >>> sizes["program"] = "forward"
    >>> splash = sizes | {"peer": "splash", "bundles": 80}
    >>> dense = sizes | {"peer": "block_sparse", "blocks": 0, "bundles": 100, "density": 1.0}
    >>> row = with_ratios([splash, dense, dense | {"blocks": 1, "bundles": 30, "density": 0.25}])[2]
    >>> row["of_splash"], row["per_block"]
    (None, 1.2)
    """
    splash = best_splash(rows)
    ours = [row for row in rows if row["peer"] == "block_sparse" and row.get("bundles")]
    dense = {_key(row): row for row in ours if not row["blocks"]}
    found = []
    for row in rows:
        if row["peer"] == "block_sparse" and row.get("bundles"):
            best, whole = splash.get(_key(row)), dense.get(_key(row))
            of_splash = row["bundles"] / best["bundles"] if best and not row["blocks"] else None
            share = row["bundles"] / whole["bundles"] / row["density"] if whole else None
            row = row | {"of_splash": of_splash, "per_block": share}
        found.append(row)
    return found


def _gibibytes(row: Row, name: str = "peak_bytes") -> str:
    return "failed" if row.get(name) is None else f"{row[name] / 2**30:.3g}"


_NAMES = {"forward": "forward", "query_gradients": "dq", "key_gradients": "dk, dv"}


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %"


def describe(row: Row) -> str:
    """A row in one line, for the terminal.

    >>> describe({"part": "memory", "chip": "v5e", "peer": "block_sparse", "program": "forward",
    ...           "length": 64, "head_dim": 8, "blocks": 0, "peak_bytes": 2**30, "seconds": 1.5})
    'memory v5e block_sparse forward T=64 H=8 blocks=all: 1 GiB, compiled in 1.5 s'
    """
    names = [row["part"], row["chip"], row["peer"], row["program"]]
    names += [f"T={row['length']}", f"H={row['head_dim']}"]
    if "tiles" in row:
        names.append("tiles=" + "×".join(map(str, row["tiles"])))
    elif "blocks" in row:
        names.append(f"blocks={row['blocks'] or 'all'}")
    if "error" in row:
        return f"{' '.join(names)}: {row['error']}"
    said = [f"{_gibibytes(row)} GiB", f"compiled in {row['seconds']} s"]
    if row.get("bundles"):
        parts = ", ".join(f"{name} {number}" for name, number in row["parts"].items())
        said.insert(0, f"{row['bundles'] / 1e6:.4g} M bundles ({parts})")
    said += [f"{row['of_splash']:.3g}× splash"] if row.get("of_splash") else []
    said += [f"{row['per_block']:.3g} a listed block"] if row.get("per_block") else []
    return f"{' '.join(names)}: {', '.join(said)}"


def _beside_splash(rows: Sequence[Row]) -> list[str]:
    splash = best_splash(rows)
    lines = [
        "| chip | head dim | routing_jax, M bundles | splash | its tiles | ratio "
        "| peak GiB | splash's |",
        "| ---: |" + " ---: |" * 7,
    ]
    found = []
    for row in rows:
        if row["peer"] != "block_sparse" or row.get("blocks") or _key(row) not in splash:
            continue
        best = splash[_key(row)]
        ours = f"{row['bundles'] / 1e6:.1f}" if row.get("bundles") else "failed"
        ratio = f"{row['of_splash']:.2f}" if row.get("of_splash") else ""
        found.append(
            f"| {row['chip']} | {row['head_dim']} | {ours} | {best['bundles'] / 1e6:.1f} "
            f"| {'×'.join(map(str, best['tiles']))} | {ratio} | {_gibibytes(row)} "
            f"| {_gibibytes(best)} |"
        )
    length = next((key[-1] for key in splash), None)
    title = f"**Dense causal attention over {length} tokens, forward**, beside splash attention"
    return ["\n".join([title, "", *lines, *found])] if found else []


def _by_density(rows: Sequence[Row]) -> list[str]:
    listed = [row for row in rows if row["peer"] == "block_sparse" and row.get("bundles")]
    lengths = {row["length"] for row in listed if row["blocks"]}
    listed = [row for row in listed if row["length"] in lengths]
    if not listed:
        return []
    blocks = list(dict.fromkeys(row["blocks"] for row in listed))
    share = {row["blocks"]: row["density"] for row in listed}
    head = " | ".join(f"{b or 'all'} ({_percent(share[b])})" for b in blocks)
    lines = [
        f"**Bundles a listed block over {max(lengths)} tokens** ÷ those where all are listed",
        "",
        f"| chip | kernel | head dim | {head} |",
        "| ---: | ---: | ---: |" + " ---: |" * len(blocks),
    ]
    for key in dict.fromkeys(_key(row) for row in listed):
        mine = {row["blocks"]: row["per_block"] for row in listed if _key(row) == key}
        cells = (f"{mine[b]:.3f}" if mine.get(b) else "" for b in blocks)
        chip, kernel, head_dim, _ = key
        lines.append(f"| {chip} | {_NAMES[kernel]} | {head_dim} | {' | '.join(cells)} |")
    return ["\n".join(lines)]


def _memory(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    compiled = sum("error" not in row for row in rows)
    lines = [
        f"**Peak memory, GiB**, dense rows / lists ({compiled} of {len(rows)} programs compiled)",
        "",
        "| chip | pass | head dim | " + " | ".join(map(str, lengths)) + " |",
        "| ---: | ---: | ---: |" + " ---: |" * len(lengths),
    ]
    keys = dict.fromkeys((row["chip"], row["program"], row["head_dim"]) for row in rows)
    for key in keys:
        mine = [row for row in rows if (row["chip"], row["program"], row["head_dim"]) == key]
        cells = [
            " / ".join(_gibibytes(row) for row in mine if row["length"] == length)
            for length in lengths
        ]
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(cells)} |")
    return ["\n".join(lines)]


def table(rows: Sequence[Row]) -> str:
    """Markdown: ours beside splash, work by blocks listed, and memory; those that were asked for.

    >>> row = {"part": "memory", "chip": "v5e", "peer": "block_sparse", "program": "forward",
    ...        "length": 64, "head_dim": 8, "blocks": 0, "peak_bytes": 2**30}
    >>> print(table([row, row | {"blocks": 4}]))
    **Peak memory, GiB**, dense rows / lists (2 of 2 programs compiled)
    <BLANKLINE>
    | chip | pass | head dim | 64 |
    | ---: | ---: | ---: | ---: |
    | v5e | forward | 8 | 1 / 1 |
    """
    schedule = [row for row in rows if row["part"] == "schedule"]
    memory = [row for row in rows if row["part"] == "memory"]
    blocks = [*_beside_splash(schedule), *_by_density(schedule)]
    return "\n\n".join([*blocks, *([BLIND] if blocks else []), *_memory(memory)])


def caption(result: Mapping[str, Any]) -> str:
    """What was compiled and with what, from a result file."""
    config, parts = result["config"], {row["part"] for row in result["rows"]}
    heads = []
    if "schedule" in parts:
        heads.append(f"{config['num_heads']} query and {config['num_kv_heads']} key/value heads")
    if "memory" in parts:
        heads.append(
            f"for memory {config['memory_heads']} query heads on one key/value head, lists of "
            f"{config['memory_blocks']} blocks a tile"
        )
    if any(row["program"] == "decode" for row in result["rows"]):
        heads.append("decoding: one query, as many pages")
    return (
        f"Compiled, not run: bfloat16, batch 1, {'; '.join(heads)}; blocks of {config['block']}. "
        f"{dated_versions(result)}"
    )
