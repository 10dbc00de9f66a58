"""Thinking traces: the ``<think>`` blocks of reasoning models' replies."""

from __future__ import annotations

import re
from typing import Literal

OPEN, CLOSE = "<think>", "</think>"
NOT_CLOSED = "thinking trace without its end </think>"
UNBALANCED = "<think> and </think> do not match"
_TAG = re.compile(r"</?think>")
_TRACE = re.compile(r"(\s*<think>\s*)(.*?)\s*</think>\s*", re.DOTALL)

State = Literal["none", "whole", "not closed", "not opened", "unbalanced"]


def state_of(text: str) -> State:
    """Whether the thinking traces of a reply are complete.

    Returns:
        ``"none"``: it has no tags. ``"whole"``: one or several blocks, each opened and closed. ``"not closed"``: the
        last block has no end, as in a truncated reply. ``"not opened"``: a single ``</think>``, as in replies to a
        prompt that ends in ``<think>``. ``"unbalanced"``: anything else.
    """
    tags = _TAG.findall(text)
    if not tags:
        return "none"
    if tags == [CLOSE]:
        return "not opened"
    if tags[::2] != [OPEN] * len(tags[::2]) or tags[1::2] != [CLOSE] * len(tags[1::2]):
        return "unbalanced"
    return "not closed" if len(tags) % 2 else "whole"


def with_opening(text: str) -> tuple[str, int]:
    """The reply, with the ``<think>`` of its prompt added if it is missing, and the number of characters added."""
    if state_of(text) != "not opened":
        return text, 0
    start = f"{OPEN}\n"
    return start + text, len(start)


def without_traces(text: str) -> str:
    """The text without its thinking traces, including one whose start or end is missing."""
    text = re.sub(r"\A(?:(?!<think>).)*?</think>", "", text, flags=re.DOTALL)
    return re.sub(r"<think>.*?(?:</think>|\Z)", "", text, flags=re.DOTALL).strip()


def split_trace(text: str) -> tuple[tuple[int, int], int] | None:
    """The span of the trace with which a reply begins, and the start of the rest; None if there is no such trace, or
    several."""
    match = _TRACE.match(text)
    if match is None or _TAG.search(text, match.end()):
        return None
    return match.span(2), match.end()


def tags_of(text: str) -> list[tuple[int, int]]:
    """The spans of the tags."""
    return [match.span() for match in _TAG.finditer(text)]
