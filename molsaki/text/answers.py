"""Finds the answer in a text and compares answers: numbers by value, choices and other texts by their words."""

from __future__ import annotations

import re
from collections.abc import Sequence

from molsaki.text.numbers import find_numbers, parse_number
from molsaki.text.segment import segment


def find_number(text: str, last: bool = False) -> str | None:
    """The first or last number of a text as it is written there, by the rules of :func:`molsaki.segment`."""
    found = [text[start:stop] for start, stop in find_numbers(text, number_words=False)]
    return found[-1 if last else 0] if found else None


def find_choice(text: str, choices: Sequence[str], last: bool = False) -> str | None:
    """The first or last choice that a text names by its words or, if none, by its letter as in ``(b)``."""
    spans = segment("", text, key=choices)
    if spans.words:
        start, stop = spans.words[-1 if last else 0]
        return next(c for c in choices if same_text(c, spans.text[start:stop]))
    letters = re.findall(r"\(([a-z])\)|^\W*([a-z])\W*$", text.strip().lower())
    found = [i for i in (ord(a or b) - ord("a") for a, b in letters) if i < len(choices)]
    return choices[found[-1 if last else 0]] if found else None


def same_answer(a: str, b: str) -> bool:
    """Return whether two answers are the same number or, where one of them is no number, the same words."""
    x, y = parse_number(a), parse_number(b)
    return same_text(a, b) if x is None or y is None else x == y


def same_text(a: str, b: str) -> bool:
    """Return whether two texts have the same words, whatever the case and the quotes and periods around them."""
    return _normalized(a) == _normalized(b)


def _normalized(text: str) -> str:
    return " ".join(text.casefold().strip(" .\"'").split())

