"""The key-word selectors: `KEY_WORDS` has one entry per way to choose the key words of a text.

To add one, write a function as `SelectKeyWords` describes and enter it in `KEY_WORDS` under the name that the option
``key`` takes. Its docstring is its help text.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence

import regex

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


# Scripts in which a word may follow another without a space: there every occurrence counts. In Korean particles follow
# a word so, but nothing precedes it.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_STARTS_WORD = regex.compile(rf"[\w--[{_UNSPACED}]]", regex.V1).match
_ENDS_WORD = regex.compile(rf"[\w--[{_UNSPACED}\p{{Hangul}}]]", regex.V1).match


def _keyword_patterns(keywords: Iterable[str]) -> list[regex.Pattern[str]]:
    patterns = []
    for i, keyword in enumerate(keywords):
        check_str(f"key[{i}]", keyword)
        parts = _normalized(keyword)[0].split()
        if not parts:
            raise ValueError(f"key[{i}]: expected a keyword, got {keyword!r}")
        before = rf"(?<![\w--[{_UNSPACED}]])" if _STARTS_WORD(parts[0][0]) else ""
        after = rf"(?![\w--[{_UNSPACED}]])" if _ENDS_WORD(parts[-1][-1]) else r"(?!\p{M})"
        words = r"\s+".join(map(regex.escape, parts))
        patterns.append(regex.compile(before + words + after, regex.IGNORECASE | regex.V1))
    return patterns


def _find_keywords(text: str, patterns: list[regex.Pattern[str]]) -> list[Span]:
    normal, starts, stops = _normalized(text)
    matches = (match.span() for pattern in patterns for match in pattern.finditer(normal))
    candidates = {(starts[start], stops[stop - 1]) for start, stop in matches}
    taken, found = bytearray(len(text)), []
    for start, stop in sorted(candidates, key=lambda span: (span[0] - span[1], span[0])):
        if not any(taken[start:stop]):
            taken[start:stop] = b"\1" * (stop - start)
            found.append((start, stop))
    return sorted(found)


# Full-width and half-width forms and what they are forms of: one character for one.
_WIDTHS = {c: int(unicodedata.decomposition(chr(c)).split()[1], 16) for c in (0x3000, *range(0xFF01, 0xFFEF))
           if unicodedata.decomposition(chr(c))}  # fmt: skip


def _normalized(text: str) -> tuple[str, Sequence[int], Sequence[int]]:
    """The text in Unicode's NFC and one width, and where each of its characters starts and stops in ``text``."""
    folded = text if text.isascii() else text.translate(_WIDTHS)
    if unicodedata.is_normalized("NFC", folded):
        return folded, range(len(text)), range(1, len(text) + 1)
    pieces: list[str] = []
    starts: list[int] = []
    stops: list[int] = []
    for match in regex.finditer(r"\X", folded):  # per user-perceived character: nothing composes across them
        piece = unicodedata.normalize("NFC", match[0])
        pieces.append(piece)
        starts += [match.start()] * len(piece)
        stops += [match.end()] * len(piece)
    return "".join(pieces), starts, stops
