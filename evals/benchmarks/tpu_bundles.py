"""What the TPU compiler's final schedule of a kernel costs, by parts.

A schedule is a list of bundles, of which a core issues one a cycle unless it waits: for a copy,
above all, which no schedule shows. Loops are marked in it by depth, and branches by their targets.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:(LB|LH|LE|PB|PF|CT) ?)?: (>*) *\{(\}?)")
_BRANCH = re.compile(r"sbr\.rel \(!?%p\w+\) target = \$region(\d+)")
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_KERNEL = re.compile(r"\d+-(block_sparse_\w+|splash_\w+)(?:\.\d+)?-\d+-final_bundles")
_CAPACITY, _UTILIZATION = "MXU, XLU, VALU", "== UTILIZATION:"


@dataclasses.dataclass
class Region:
    """A kernel or a loop in it.

    Attributes:
      start: its first bundle.
      stop: past its last.
      branches: (first, past the last) of what may be skipped, with no loop or branch inside.
      loops: directly within it.
    """

    start: int
    stop: int
    branches: list[tuple[int, int]]
    loops: list["Region"]

    @property
    def own(self) -> int:
        """Bundles outside of loops and branches."""
        inner = sum(stop - start for start, stop in self.branches)
        return self.stop - self.start - inner - sum(x.stop - x.start for x in self.loops)


def read_regions(schedule: str) -> Region:
    """The regions of a schedule.

    Args:
      schedule: the text of a '…-final_bundles.txt'.

    >>> text = '''     0   :  { a }
    ...    0x1 LB: > { b } /* Start region 7 */
    ...    0x2   : > { %1 = sbr.rel (%p1_p0) target = $region9 }
    ...    0x3   : > { c }
    ...    0x4 PF: > { d } /* Start/End empty region 9 */
    ...    0x5   : > { %2 = sbr.rel (!%p2_p0) target = $region7 }
    ...    0x6   :  { e }'''
    >>> whole = read_regions(text)
    >>> whole.own, whole.loops[0].own, whole.loops[0].branches
    (2, 4, [(3, 4)])
    """
    depths: list[int] = []
    heads: set[int] = set()
    jumps: list[tuple[int, str]] = []
    regions: dict[str, int] = {}
    for line in schedule.splitlines():
        bundle = _BUNDLE.match(line)
        if bundle:
            if bundle[2] == "LB":
                heads.add(len(depths))
            # An empty one shows no depth.
            depths.append(depths[-1] if bundle[4] and depths else len(bundle[3]))
        place = len(depths) - 1  # a bundle's comments may run over several lines
        jumps += [(place, target) for target in _BRANCH.findall(line)]
        regions |= dict.fromkeys(_REGION.findall(line), place)

    def loops_in(start: int, stop: int, depth: int) -> list[Region]:
        found = []
        place = start
        while place < stop:
            if place in heads and depths[place] == depth:
                end = place + 1
                while end < stop and depths[end] >= depth:
                    if depths[end] == depth and end in heads:
                        break
                    end += 1
                found.append(Region(place, end, [], loops_in(place + 1, end, depth + 1)))
                place = end
            else:
                place += 1
        return found

    whole = Region(0, len(depths), [], loops_in(0, len(depths), 1))
    for place, target in sorted(jumps):
        _add_branch(whole, place + 1, regions.get(target, -1))
    return whole


def _add_branch(region: Region, start: int, stop: int) -> None:
    """Files a forward branch under the innermost loop that holds it all."""
    for loop in region.loops:
        if loop.start <= start and stop <= loop.stop:
            return _add_branch(loop, start, stop)
        if start < loop.stop and loop.start < stop:
            return None  # it skips a whole loop: loops are counted as entered
    if start < stop:
        inside = any(start <= first and last <= stop for first, last in region.branches)
        if not inside:
            region.branches = [
                span for span in region.branches if not (span[0] <= start and stop <= span[1])
            ] + [(start, stop)]
    return None


Parts = dict[str, list[tuple[int, int]]]


def row_parts(kernel: Region) -> Parts:
    """The parts of a kernel that loops over blocks, or over the tiles that attend to a block.

    Each of its loops takes half as many in a turn as the one before, the last takes one: their
    turns are 'turn_8', say, 'turn_4', 'turn_2' and 'turn_1'. 'program' is the rest. What may be
    skipped is counted as run.

    Raises:
      ValueError: a schedule of another form, of which no sum would be right.
    """
    (grid,) = _expect(kernel.loops, 1, "over programs")
    _expect([y for x in grid.loops for y in x.loops], 0, "within a loop over blocks")
    spans = [(loop.start, loop.stop) for loop in grid.loops]
    if not spans:
        raise ValueError("the schedule has no loop over blocks.")
    sizes = (1 << i for i in reversed(range(len(spans))))
    found = {f"turn_{size}": [span] for size, span in zip(sizes, spans)}
    return found | {"program": _rest(grid, spans)}


def grid_parts(kernel: Region) -> Parts:
    """The parts of a kernel whose grid's last axis goes over key blocks, as splash's does.

    'run' is the longest branch, taken where a block is visible; 'first' and 'last' are the longest
    ones before and after it, taken once a row; 'program' is all else, in every step of the grid.

    Raises:
      ValueError: as of `row_parts`.
    """
    (grid,) = _expect(kernel.loops, 1, "over programs")
    _expect(grid.loops, 0, "within a program")
    branches = sorted(grid.branches)
    at = branches.index(max(branches, key=_length))
    found = {"run": branches[at : at + 1]}
    for name, others in (("first", branches[:at]), ("last", branches[at + 1 :])):
        if others:
            found[name] = [max(others, key=_length)]
    return found | {"program": _rest(grid, [span for (span,) in found.values()])}


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def _rest(region: Region, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """What of a region lies between the spans."""
    cuts = [region.start, *sorted(x for span in spans for x in span), region.stop]
    return list(zip(cuts[::2], cuts[1::2]))


def _expect(found: list[Region], number: int, where: str) -> list[Region]:
    if len(found) != number:
        raise ValueError(f"the schedule has {len(found)} loops {where}; {number} was expected.")
    return found


def bundles(parts: Parts) -> dict[str, int]:
    """Bundles of each part.

    >>> bundles({"step": [(3, 5), (9, 10)]})
    {'step': 3}
    """
    return {name: sum(map(_length, spans)) for name, spans in parts.items()}


def slots(utilization: str, spans: list[tuple[int, int]]) -> dict[str, float]:
    """The share of each unit's slots that the bundles of `spans` fill.

    Args:
      utilization: the text of a '…-final_hlo-static-per-bundle-utilization.txt'.
      spans: (first, past the last).

    >>> text = '''== CAPACITY:
    ... MXU, XLU, VALU
    ...   2    1     4
    ... == UTILIZATION:
    ... 2 0 4
    ... 0 0 4'''
    >>> slots(text, [(0, 2)])
    {'MXU': 0.5, 'XLU': 0.0, 'VALU': 1.0}
    """
    lines = utilization.splitlines()
    names_at = next(i for i, line in enumerate(lines) if line.startswith(_CAPACITY))
    names = lines[names_at].split(", ")
    capacity = [int(x) for x in lines[names_at + 1].split()]
    first = lines.index(_UTILIZATION) + 1
    used = [
        [int(x) for x in line.split()] for a, b in spans for line in lines[first + a : first + b]
    ]
    totals = [sum(column) for column in zip(*used)]
    return {name: t / (c * len(used)) for name, t, c in zip(names, totals, capacity)}


def kernel_schedules(folder: Path) -> dict[str, dict[str, Any]]:
    """What the compiler wrote of our kernels and splash's, by name.

    Args:
      folder: where it dumped the final schedules.

    Returns:
      Kernel's name → {'bundles': part → how many, 'slots': unit → share filled in the part that
      does the work}.
    """
    found = {}
    for path in sorted(folder.glob("*-final_bundles.txt")):
        named = re.match(
            r"\d+-(block_sparse_\w+|splash_\w+?)(?:\.\d+)?-\d+-final_bundles", path.name
        )
        if not named:
            continue
        splash = named[1].startswith("splash")
        parts = (grid_parts if splash else row_parts)(read_regions(path.read_text()))
        stem = path.name.rsplit("-", 2)[0]
        (used,) = folder.glob(f"{stem}-*-final_hlo-static-per-bundle-utilization.txt")
        hot = parts["run" if splash else next(iter(parts))]
        found[named[1]] = {"bundles": bundles(parts), "slots": slots(used.read_text(), hot)}
    return found
