"""Fills the marked parts of a page, and writes tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

_PART = re.compile(r"<!-- generated: (.+?) -->\n.*?<!-- end: (.+?) -->", re.DOTALL)


def filled(text: str, parts: Mapping[str, Callable[[], str]], page: Path) -> str:
    """The text with each marked part written again.

    Raises:
        ValueError: there is no part of a name, or a mark has no end.
    """

    def fill(found: re.Match[str]) -> str:
        name = found[1]
        if name != found[2]:
            raise ValueError(f"{page}: expected <!-- end: {name} -->, got <!-- end: {found[2]} -->")
        if name not in parts:
            raise ValueError(f"{page}: no generated part {name}; expected one of {', '.join(sorted(parts))}")
        return f"<!-- generated: {name} -->\n\n{parts[name]().strip()}\n\n<!-- end: {name} -->"

    result, count = _PART.subn(fill, text)
    if count != text.count("<!-- generated:"):
        raise ValueError(f"{page}: expected an end for each <!-- generated: NAME -->")
    return result


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table.

    Raises:
        ValueError: a row has another number of cells than the head.
    """
    lines = [head, ["---"] * len(head), *rows]
    for line in lines:
        if len(line) != len(head):
            raise ValueError(f"row: expected {len(head)} cells, got {line}")
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
