"""The key-word selectors: `KEY_WORDS` has one entry per way to choose the key words of a text.

To add one, write a function as `SelectKeyWords` describes and enter it in `KEY_WORDS` under the name that the option
``key`` takes. Its docstring is its help text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from molsaki.text.numbers import find_numbers
from molsaki.text.spans import Span, check_str

FindKeyWords = Callable[[str], list[Span]]
"""The key words of a question or a rationale: ascending, disjoint spans of its characters, none empty."""

SelectKeyWords = Callable[[Iterable[str], bool], FindKeyWords]
"""Takes the example's own key words and the option ``number_words``; refuses those that it cannot use."""


def _numbers(keywords: Iterable[str], number_words: bool) -> FindKeyWords:
    """every number"""
    return lambda text: find_numbers(text, number_words)


def _keywords(keywords: Iterable[str], number_words: bool) -> FindKeyWords:
    """each example's own keywords field"""
    if number_words:
        raise ValueError('number_words: needs key="numbers", got keywords')
    patterns = _keyword_patterns(keywords)
    return lambda text: _find_keywords(text, patterns)


KEY_WORDS: dict[str, SelectKeyWords] = {"numbers": _numbers, "keywords": _keywords}


def _keyword_patterns(keywords: Iterable[str]) -> list[re.Pattern[str]]:
    patterns = []
    for i, keyword in enumerate(keywords):
        check_str(f"key[{i}]", keyword)
        parts = keyword.split()
        if not parts:
            raise ValueError(f"key[{i}]: expected a keyword, got {keyword!r}")
        before = r"(?<!\w)" if parts[0][0].isalnum() else ""
        after = r"(?!\w)" if parts[-1][-1].isalnum() else ""
        patterns.append(re.compile(before + r"\s+".join(map(re.escape, parts)) + after, re.IGNORECASE))
    return patterns


def _find_keywords(text: str, patterns: list[re.Pattern[str]]) -> list[Span]:
    candidates = {match.span() for pattern in patterns for match in pattern.finditer(text)}
    taken, found = bytearray(len(text)), []
    for start, stop in sorted(candidates, key=lambda span: (span[0] - span[1], span[0])):
        if not any(taken[start:stop]):
            taken[start:stop] = b"\1" * (stop - start)
            found.append((start, stop))
    return sorted(found)
