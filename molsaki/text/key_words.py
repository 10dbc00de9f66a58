"""The key-word selectors: `KEY_WORDS` has one entry per way to choose the key words of a text.

Besides these, the option ``key`` takes ``regex:PATTERN``, the matches of a regular expression (of its first group, if
it has one), and ``module:function``, a function of your own from a text to the spans of its key words. To add an entry,
write a function as `SelectKeyWords` describes; its docstring is its help text.
"""

from __future__ import annotations

import functools
import operator
import random
import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence

from molsaki.extras import regex
from molsaki.functions import is_named, named_function
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


def _random(keywords: Iterable[str], number_words: bool) -> FindKeyWords:
    """as many other words as there are numbers, chosen by a hash of the text (a control)"""

    def find(text: str) -> list[Span]:
        numbers = find_numbers(text, number_words)
        words = [match.span() for match in regex.finditer(r"\w+", text)]
        ends = sorted(stop for _, stop in numbers)
        starts = sorted(start for start, _ in numbers)  # as many start before a word's end as end before its start
        others = [w for w in words if bisect_left(starts, w[1]) == bisect_right(ends, w[0])]
        rng = random.Random(text)  # seeded by the text itself, equally in every process
        return sorted(rng.sample(others, min(len(numbers), len(others))))

    return find


def _words(keywords: Iterable[str], number_words: bool) -> FindKeyWords:
    """every word"""
    if number_words:
        raise ValueError('number_words: needs key="numbers", got words')
    return lambda text: [match.span() for match in _WORD.finditer(text)]


def _given(keywords: Iterable[str], number_words: bool) -> FindKeyWords:
    """the spans of each example's key_spans field"""
    raise AssertionError("`segment` takes the spans themselves")


KEY_WORDS: dict[str, SelectKeyWords] = {
    "numbers": _numbers,
    "keywords": _keywords,
    "random": _random,
    "words": _words,
    "given": _given,
}
PATTERN = "regex:"


def selector_of(key: str) -> SelectKeyWords:
    """The selector of a name of `KEY_WORDS`, ``regex:PATTERN`` or ``module:function``.

    Raises:
        ValueError: there is no such selector, the pattern is none, or the function cannot be imported.
    """
    return KEY_WORDS[key] if key in KEY_WORDS else _own_selector(key)


@functools.lru_cache
def _own_selector(key: str) -> SelectKeyWords:
    if key.startswith(PATTERN):
        try:
            pattern = regex.compile(key.removeprefix(PATTERN))
        except regex.error as error:
            raise ValueError(f"key: {key!r} is not a regular expression: {error}") from None
        group = min(pattern.groups, 1)

        def matches(text: str) -> list[Span]:
            found = (match.span(group) for match in pattern.finditer(text))
            return _checked_spans(key, [(start, stop) for start, stop in found if stop > start], text)

        return _without_number_words(key, matches)
    if not is_named(key):
        raise ValueError(f"key: expected one of {', '.join(KEY_WORDS)}, {PATTERN}PATTERN or module:name, got {key!r}")
    function = named_function("key", key)

    def find(text: str) -> list[Span]:
        try:
            found = [(operator.index(start), operator.index(stop)) for start, stop in function(text)]
        except (TypeError, ValueError) as error:
            raise TypeError(f"key: expected pairs of ints (start, stop) from {key}: {error}") from error
        return _checked_spans(key, found, text)

    return _without_number_words(key, find)


def _without_number_words(key: str, find: FindKeyWords) -> SelectKeyWords:
    def select(keywords: Iterable[str], number_words: bool) -> FindKeyWords:
        if number_words:
            raise ValueError(f'number_words: needs key="numbers", got {key}')
        return find

    return select


def _checked_spans(key: str, found: list[Span], text: str) -> list[Span]:
    end = 0
    for start, stop in found:
        if not end <= start < stop <= len(text):
            raise ValueError(
                f"key: expected ascending, disjoint spans within 0 to {len(text)} that are not empty from {key}, "
                f"got {found[:10]}"
            )
        end = stop
    return found


# A word; one character of a script that puts no spaces between words, with what belongs to it.
_WORD = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]\p{M}*"
    r"|[\w--[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]]+(?:['’][\w]+)*",
    regex.V1,
)

# Scripts in which a word may follow another without a space: there every occurrence counts. In Korean particles follow
# a word so, but nothing precedes it.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_is_spaced = regex.compile(rf"[\w--[{_UNSPACED}]]", regex.V1).match
_may_be_followed = regex.compile(rf"[{_UNSPACED}\p{{Hangul}}\W]").match


def _keyword_patterns(keywords: Iterable[str]) -> list[re.Pattern[str]]:
    patterns = []
    for i, keyword in enumerate(keywords):
        check_str(f"key[{i}]", keyword)
        parts = normalized(keyword)[0].split()
        if not parts:
            raise ValueError(f"key[{i}]: expected a keyword, got {keyword!r}")
        patterns.append(re.compile(r"\s+".join(map(re.escape, parts)), re.IGNORECASE))
    return patterns


def _find_keywords(text: str, patterns: list[re.Pattern[str]]) -> list[Span]:
    normal, starts, stops = normalized(text)
    candidates = {(starts[a], stops[b - 1]) for pattern in patterns for a, b in _whole_words(pattern, normal)}
    taken, found = bytearray(len(text)), []
    for start, stop in sorted(candidates, key=lambda span: (span[0] - span[1], span[0])):
        if not any(taken[start:stop]):
            taken[start:stop] = b"\1" * (stop - start)
            found.append((start, stop))
    return sorted(found)


def _whole_words(pattern: re.Pattern[str], text: str) -> Iterator[Span]:
    """The matches that neither start nor end within a word."""
    at = 0
    while match := pattern.search(text, at):
        start, stop = match.span()
        following = text[stop : stop + 1]
        splits_word = start > 0 and _is_spaced(text[start]) and _is_spaced(text[start - 1])
        if _may_be_followed(text[stop - 1]):
            splits_word = splits_word or unicodedata.category(following or " ")[0] == "M"
        else:
            splits_word = splits_word or _is_spaced(following)
        if not splits_word:
            yield start, stop
        at = start + 1 if splits_word else stop


# Full-width and half-width forms and what they are forms of: one character for one.
WIDTHS = {c: int(unicodedata.decomposition(chr(c)).split()[1], 16) for c in (0x3000, *range(0xFF01, 0xFFEF))
           if unicodedata.decomposition(chr(c))}  # fmt: skip


def normalized(text: str) -> tuple[str, Sequence[int], Sequence[int]]:
    """The text in Unicode's NFC and one width, and where each of its characters starts and stops in ``text``."""
    folded = text if text.isascii() else text.translate(WIDTHS)
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
