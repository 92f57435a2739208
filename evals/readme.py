"""Generated blocks in a markdown file: what stands between two comments that name the block.

<!-- table: NAME -->
everything here is replaced
<!-- end: NAME -->
"""

import re
from collections.abc import Mapping

_MARKER = re.compile(r"^<!-- (table|end): (.+?) -->$", re.MULTILINE)


def _spans(markdown: str) -> dict[str, tuple[int, int]]:
    """Name → where its content begins and ends."""
    spans: dict[str, tuple[int, int]] = {}
    opened: tuple[str, int] | None = None
    for marker in _MARKER.finditer(markdown):
        kind, name = marker.groups()
        if kind == "table":
            if opened is not None:
                raise _unclosed(opened[0])
            if name in spans:
                raise ValueError(f"Block {name!r} stands there twice; its name must be unique.")
            opened = (name, marker.end())
        else:
            if opened is None:
                raise ValueError(
                    f"'<!-- end: {name} -->' closes nothing; '<!-- table: {name} -->' must stand "
                    "before it."
                )
            if name != opened[0]:
                raise _unclosed(opened[0])
            spans[name] = (opened[1], marker.start())
            opened = None
    if opened is not None:
        raise _unclosed(opened[0])
    return spans


def _unclosed(name: str) -> ValueError:
    return ValueError(
        f"Block {name!r} is not closed; '<!-- end: {name} -->' must follow before another marker."
    )


def update_blocks(markdown: str, blocks: Mapping[str, str]) -> str:
    """The text with the content of the named blocks replaced; all else stays as it is.

    Raises:
      ValueError: a block that is missing, not closed or there twice, or content with a marker.

    >>> text = "<!-- table: speed -->" + chr(10) + "old" + chr(10) + "<!-- end: speed -->"
    >>> print(update_blocks(text, {"speed": "new"}))
    <!-- table: speed -->
    new
    <!-- end: speed -->
    """
    spans = _spans(markdown)
    for name, content in blocks.items():
        if name not in spans:
            raise ValueError(
                f"Block {name!r} is missing; '<!-- table: {name} -->' and '<!-- end: {name} -->' "
                "must each stand on a line of their own."
            )
        if _MARKER.search(content):
            raise ValueError(f"The content of block {name!r} must not hold a block's marker.")
    # From the back, so that a replacement moves no span still to come.
    for name in sorted(blocks, key=lambda name: spans[name], reverse=True):
        start, stop = spans[name]
        content = blocks[name].strip("\n")
        markdown = f"{markdown[:start]}\n{content}\n{markdown[stop:]}"
    return markdown


def stale_blocks(markdown: str, blocks: Mapping[str, str]) -> list[str]:
    """Names of the blocks in the text that differ from `blocks`, or that it does not give.

    Raises:
      ValueError: as update_blocks.

    >>> text = "<!-- table: speed -->" + chr(10) + "old" + chr(10) + "<!-- end: speed -->"
    >>> stale_blocks(text, {"speed": "new"}), stale_blocks(text, {"speed": "old"})
    (['speed'], [])
    """
    updated = update_blocks(markdown, blocks)
    old, new = _spans(markdown), _spans(updated)
    return [
        name
        for name in old
        if name not in blocks or markdown[slice(*old[name])] != updated[slice(*new[name])]
    ]
