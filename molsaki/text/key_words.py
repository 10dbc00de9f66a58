"""The key-word selectors: `KEY_WORDS` has one entry per way to choose the key words of a text.

Besides these, the option ``key`` takes ``regex:PATTERN``, the matches of a regular expression (of its first group, if
it has one), and ``module:function``, a function of your own from a text to the spans of its key words. A new entry is a
`Selector`.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import random
import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence

from molsaki.extras import regex, require
from molsaki.functions import is_named, named_function
from molsaki.text.numbers import find_numbers
from molsaki.text.spans import Span, check_str

FindKeyWords = Callable[[str], list[Span]]
"""The key words of a question or a rationale: ascending, disjoint spans of its characters, none empty."""


@dataclasses.dataclass(frozen=True)
class Selector:
    """One way to choose the key words of a text.

    Attributes:
        help: what it chooses, for the help text of ``--key``.
        select: from the example's own key words and the option ``number_words``, the function that finds the key words
            of a question or a rationale; None where the example itself has the spans (``key_spans``).
        number_words: whether it follows the option ``number_words``; if not, the option is refused.
    """

    help: str
    select: Callable[[Iterable[str], bool], FindKeyWords] | None
    number_words: bool = False


def _numbers(keywords: Iterable[str], number_words: bool) -> FindKeyWords:
    return lambda text: find_numbers(text, number_words)


def _keywords(keywords: Iterable[str], number_words: bool) -> FindKeyWords:
    patterns = _keyword_patterns(keywords)
    return lambda text: _find_keywords(text, patterns)


def find_keywords(text: str, keywords: Iterable[str]) -> list[Span]:
    """The spans of these words and phrases in a text, whatever their case and width; the longest where they overlap."""
    return _find_keywords(text, _keyword_patterns(keywords))


def _random(keywords: Iterable[str], number_words: bool) -> FindKeyWords:
    def find(text: str) -> list[Span]:
        numbers = find_numbers(text, number_words)
        words = [match.span() for match in regex.finditer(r"\w+", text)]
        ends = sorted(stop for _, stop in numbers)
        starts = sorted(start for start, _ in numbers)  # as many start before a word's end as end before it: no overlap
        others = [w for w in words if bisect_left(starts, w[1]) == bisect_right(ends, w[0])]
        rng = random.Random(text)  # seeded by the text, so the same in every process
        return sorted(rng.sample(others, min(len(numbers), len(others))))

    return find


def _words(keywords: Iterable[str], number_words: bool) -> FindKeyWords:
    return lambda text: [match.span() for match in _WORD.finditer(text)]


KEY_WORDS = {
    "numbers": Selector("every number", _numbers, number_words=True),
    "keywords": Selector("each example's own keywords field", _keywords),
    "random": Selector(
        "as many other words as there are numbers, chosen by a hash of the text (a control)", _random, number_words=True
    ),
    "words": Selector("every word", _words),
    "given": Selector("the spans of each example's key_spans field", None),
}
PATTERN = "regex:"


def selector_of(key: str, number_words: bool = False, option: str = "key") -> Selector:
    """The selector of a name of `KEY_WORDS`, ``regex:PATTERN`` or ``module:function``.

    Raises:
        ValueError: there is no such selector, the pattern is invalid, the function cannot be imported, or
            ``number_words`` is set for a selector that does not follow it. The message begins with ``option``.
    """
    selector = KEY_WORDS[key] if key in KEY_WORDS else _own_selector(key, option)
    if number_words and not selector.number_words:
        needed = " or ".join(f'{option}="{name}"' for name, one in KEY_WORDS.items() if one.number_words)
        raise ValueError(f"number_words: needs {needed}, got {key}")
    return selector


@functools.lru_cache
def _own_selector(key: str, option: str) -> Selector:
    if key.startswith(PATTERN):
        require("train", "regex")
        try:
            pattern = regex.compile(key.removeprefix(PATTERN))
        except regex.error as error:
            raise ValueError(f"{option}: {key!r} is not a regular expression: {error}") from None
        group = min(pattern.groups, 1)

        def matches(text: str) -> list[Span]:
            found = (match.span(group) for match in pattern.finditer(text))
            return _checked_spans(option, key, [(start, stop) for start, stop in found if stop > start], text)

        return Selector(f"the matches of {key}", lambda keywords, number_words: matches)
    if not is_named(key):
        raise ValueError(
            f"{option}: expected one of {', '.join(KEY_WORDS)}, {PATTERN}PATTERN or module:name, got {key!r}"
        )
    function = named_function(option, key)

    def find(text: str) -> list[Span]:
        try:
            found = [(operator.index(start), operator.index(stop)) for start, stop in function(text)]
        except (TypeError, ValueError) as error:
            raise TypeError(f"{option}: expected pairs of ints (start, stop) from {key}: {error}") from error
        return _checked_spans(option, key, found, text)

    return Selector(f"the spans of {key}", lambda keywords, number_words: find)


def _checked_spans(option: str, key: str, found: list[Span], text: str) -> list[Span]:
    end = 0
    for start, stop in found:
        if not end <= start < stop <= len(text):
            raise ValueError(
                f"{option}: expected ascending, disjoint spans within 0 to {len(text)} that are not empty from {key}, "
                f"got {found[:10]}"
            )
        end = stop
    return found


# A word, or one character of a script without spaces between words, with its combining marks.
_WORD = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]\p{M}*"
    r"|[\w--[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]]+(?:['’][\w]+)*",
    regex.V1,
)

# Scripts in which words may follow each other without a space: every occurrence counts. In Korean, particles follow a
# word directly, but nothing precedes it.
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


# Full-width and half-width forms and their base characters, one to one.
WIDTHS = {c: int(unicodedata.decomposition(chr(c)).split()[1], 16) for c in (0x3000, *range(0xFF01, 0xFFEF))
           if unicodedata.decomposition(chr(c))}  # fmt: skip


def normalized(text: str) -> tuple[str, Sequence[int], Sequence[int]]:
    """The text in Unicode's NFC and one width, and the start and stop of each of its characters in ``text``."""
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
