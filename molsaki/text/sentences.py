"""Finds where the steps of a text end: by rules for sentences of many scripts, before numbers, at every period, line or
paragraph, after a number of words, by the package sentencex, or by a user-defined function."""

from __future__ import annotations

import functools
import itertools
import operator
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator

from molsaki.extras import regex, require
from molsaki.functions import is_named, named_function
from molsaki.text.numbers import find_numbers
from molsaki.text.spans import LINE_ENDS, shown


def _word_set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_STOP = r"[\p{SB=STerm}\p{SB=ATerm}…‥]+"  # Unicode's sentence terminals and full stops: .?! 。！？．｡ ؟۔ ।॥ ។ ።
_CLOSE = r"[\"'”’»)\]}」』）］｝〉》】*_]*(?: [)\]}”»]+)?"
# Thai and Lao have no full stops; a space between two of their letters ends a clause, but not before "and" or "or".
_GAP = r"(?<=[\p{Thai}\p{Lao}--[ๆໆ]]) +(?=(?!และ|หรือ|ແລະ|ຫຼື)[\p{Thai}\p{Lao}--[ๆໆฯຯ]])"
_BREAK = regex.compile(rf"(?P<stop>{_STOP}){_CLOSE}|(?P<space>{_GAP})|[{LINE_ENDS}]\s*", regex.V1)
_URL = re.compile(r"(?:https?://|www\.)[!-~]*[\w/=&#~+-]", re.ASCII)
_SPACE = re.compile(r"\s*")
_OPEN = re.compile(r"(?:[“«(\[{] ?|[\"'‘「『*_#¿¡])*")
_WORD = re.compile(r"[^\W\d_]*")
_NO_START = frozenset("=+-−–—*/×÷·<>≈≤≥^%,;:.?!…)]}”’»")  # may follow a space, but never starts a sentence
_MARKER = re.compile(
    r"[\s>#*•\"'(\[-]*(?:(?:step|part|case|phase|problem|question|example|option)\s+)?(?:\d{1,3}|[a-z]|[ivx]{1,4})",
    re.IGNORECASE,
)
_INITIALS = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")  # U.S, p.m: the last period is the stop itself

# Abbreviations: a sentence never ends after one of _NEVER_LAST, after one of _SELDOM_LAST only before a word of
# _STARTERS, and after one of _BEFORE_NUMBER only where no number follows.
_NEVER_LAST = _word_set(
    "mr mrs ms mx dr prof messrs capt sgt lt cmdr cpl pvt mt e.g i.e eg ie vs viz cf approx ca sq डॉ प्रो श्री"
)
_SELDOM_LAST = _word_set(
    "jr sr st ave blvd rd inc ltd co corp bros dept univ al est ph.d gen gov sen rep rev hon col maj adm pres"
)
_BEFORE_NUMBER = _word_set(
    """no nos fig figs eq eqs ch vol p pp ft lb lbs oz yd hr hrs min mins sec secs rs रु
    jan feb mar apr jun jul aug sep sept oct nov dec"""
)
_STARTERS = _word_set(
    """a after all also although an and another as at because before besides both but by calculate determine
    during each eventually every finally find first for from given he hence her here his how however i if in initially
    instead it its last later let many my next now of on once one only or our over second she similarly since so
    some solve still that the their then there therefore these they this those three thus to together two
    under until up we what when where whereas which while who whose why with without yes you your"""
)


# One letter with a period is an abbreviation in these scripts; in Chinese, Japanese and Korean it is a word.
_LETTER = regex.compile(r"[\p{Arabic}\p{Hebrew}\p{Thai}\p{Lao}\p{Devanagari}\p{Bengali}\p{Tamil}\p{Telugu}]")


def _skip(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at


def rule_ends(text: str) -> Iterator[int]:
    """The ends of the steps of a text without outer white space."""
    urls = [match.span() for match in _URL.finditer(text)]
    start = 0
    for match in _BREAK.finditer(text):
        stop = match["stop"]
        end = match.end() if stop is None else _skip(_SPACE, text, match.end())
        url = urls[bisect_right(urls, (match.start(), len(text))) - 1] if urls else (0, 0)
        if url[0] <= match.start() < url[1]:
            continue
        if start < end < len(text) and (stop is None or _ends_step(text, start, match, end)):
            yield end
            start = end
    if text:
        yield len(text)


def _ends_step(text: str, start: int, match: regex.Match[str], following: int) -> bool:
    """Return whether the stop in ``match`` ends the step from ``start``; the next text is at ``following``."""
    stop, gap = match["stop"], text[match.end() : following]
    if any(c in LINE_ENDS for c in gap):
        return True
    initial = _skip(_OPEN, text, following)
    head = text[initial : initial + 1]
    if stop[-1] == "．" and (head.isdigit() or _is_inner_period(text, start, match.end("stop") - 1, initial)):
        return False  # ３．１４, and the marker of a list
    if stop[-1] not in ".?!…‥":
        return not (text[match.end() - 1] in "」』" and text.startswith(("と", "って"), following))  # speech goes on
    if not head or head.isspace() or head.islower() or head in _NO_START:
        return False
    if not gap and not _lacks_space(text, match, initial):
        return False
    return stop != "." or not _is_inner_period(text, start, match.start(), initial)


def _lacks_space(text: str, match: regex.Match[str], initial: int) -> bool:
    """Return whether the next sentence follows without the usual space, as in ``30 apples.Then she``."""
    before, head = text[match.start() - 1 : match.start()], text[initial : initial + 2]
    if match["stop"][-1] in "?!":
        return head[:1].isupper() or _has_no_case(head[:1])
    if _has_no_case(head[:1]):  # 苹果.他
        return match["stop"] == "." and (before.isdigit() or before in ")]%" or _has_no_case(before))
    return (before.islower() or before.isdigit() or before in ")]%") and head[:1].isupper() and head[1:].islower()


def _has_no_case(character: str) -> bool:
    return bool(character) and unicodedata.category(character) in ("Lo", "Mn", "Mc")


def _is_inner_period(text: str, start: int, period: int, following: int) -> bool:
    """Return whether the single period at ``period`` belongs to an abbreviation, an initial or a list marker."""
    if period - start < 30 and _MARKER.fullmatch(text, start, period):
        return True
    first = period
    while first > max(start, period - 20) and (_is_word(text[first - 1]) or text[first - 1] in ".'’"):
        first -= 1
    word = text[first:period].lstrip(".'’")
    name = word.lower()
    if name in _NEVER_LAST:
        return True
    if name in _BEFORE_NUMBER:
        return text[following].isdigit()
    following_word = text[following : _skip(_WORD, text, following)]
    if following_word.lower() in _STARTERS:
        return False
    if name in ("a.m", "p.m"):
        return not following_word[1:2].islower() or following_word.endswith("day")
    if len(word) == 1:
        if text[following].isdigit():
            return False
        before = text[max(start, first - 10) : first].rstrip()[-1:]
        may_be_initial = word.isupper() or _LETTER.match(word) is not None
        return may_be_initial and (not before or before.isalpha() or before in ".,;:'’\"“(-&")
    return name in _SELDOM_LAST or _INITIALS.fullmatch(word) is not None


def _is_word(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character) in ("Mn", "Mc")


def period_ends(text: str) -> Iterator[int]:
    """The ends of the steps, one after every run of periods, as in the paper."""
    for match in re.finditer(r"\.+\s*", text):
        if match.end() < len(text):
            yield match.end()
    if text:
        yield len(text)


def number_ends(text: str) -> Iterator[int]:
    """The ends of the steps by rules, and additional ends before every number, which then begins a step."""
    starts = {start for start, _ in find_numbers(text, number_words=False)}
    yield from sorted(starts.union(rule_ends(text)) - {0})


def line_ends(text: str) -> Iterator[int]:
    """The ends of the steps, one per line that is not blank."""
    yield from _ends_after(re.compile(rf"[{LINE_ENDS}]\s*"), text)


def paragraph_ends(text: str) -> Iterator[int]:
    """The ends of the steps, one per paragraph: blank lines end them."""
    line_end = rf"(?:\r\n|(?!\r\n)[{LINE_ENDS}])(?<!\r(?=\n))"
    yield from _ends_after(re.compile(rf"{line_end}[^\S{LINE_ENDS}]*{line_end}\s*"), text)


def _ends_after(pattern: re.Pattern[str], text: str) -> Iterator[int]:
    for match in pattern.finditer(text):
        if match.end() < len(text):
            yield match.end()
    if text:
        yield len(text)


# The splitters by name. Each returns the ends of the steps of a text without outer white space.
SPLITTERS: dict[str, Callable[[str], Iterator[int]]] = {
    "rules": rule_ends,
    "periods": period_ends,
    "numbers": number_ends,
    "lines": line_ends,
    "paragraphs": paragraph_ends,
}
WORDS, SENTENCEX = "words:", "sentencex:"


def splitter_of(name: str) -> Callable[[str], Iterator[int]]:
    """The ends of steps by a name of `SPLITTERS`, ``words:N``, ``sentencex:LANGUAGE`` or ``module:function``.

    Raises:
        ValueError: there is no such splitter, or the function cannot be imported.
        ImportError: the package sentencex is not installed.
    """
    if not isinstance(name, str):
        raise TypeError(f"splitter: expected a name, got {type(name).__name__}")
    return SPLITTERS[name] if name in SPLITTERS else _own_splitter(name)


@functools.lru_cache
def _own_splitter(name: str) -> Callable[[str], Iterator[int]]:
    if name.startswith(WORDS):
        budget = name.removeprefix(WORDS)
        if not budget.isdecimal() or int(budget) < 1:
            raise ValueError(f"splitter: expected words:N with N of at least 1, got {name!r}")
        return functools.partial(_every, int(budget))
    if name.startswith(SENTENCEX):
        require("languages", by=f"splitter: {name}")
        language = name.removeprefix(SENTENCEX)
        if not re.fullmatch("[a-z]{2,3}", language):
            raise ValueError(f"splitter: expected sentencex:LANGUAGE with a code such as de, got {name!r}")
        return functools.partial(_sentencex_ends, language)
    if not is_named(name):
        known = f"{', '.join(SPLITTERS)}, {WORDS}N, {SENTENCEX}LANGUAGE or module:name"
        raise ValueError(f"splitter: expected one of {known}, got {name!r}")
    return functools.partial(_checked_ends, name, named_function("splitter", name))


def _every(words: int, text: str) -> Iterator[int]:
    """The ends of the steps, one after every N words separated by white space."""
    starts = [match.start() for match in re.finditer(r"\S+", text)]
    yield from starts[words::words]
    if text:
        yield len(text)


# The paragraph ends of sentencex. In texts of more than about 10,000 characters it drops some of these line ends and
# finds no more sentences from there on, so it is called for one paragraph at a time.
_SENTENCEX_PARAGRAPH = re.compile(r"\n\r?\n\s*")


def _sentencex_ends(language: str, text: str) -> Iterator[int]:
    import sentencex

    start = 0
    ends: list[int] = []
    for stop in _ends_after(_SENTENCEX_PARAGRAPH, text):
        paragraph = text[start:stop].rstrip()
        sentences = list(sentencex.segment(language, paragraph))
        if "".join(sentences) != paragraph:
            raise ValueError(f"splitter: sentencex changes the text {shown(paragraph)}")
        ends += itertools.accumulate(map(len, sentences), initial=start)
        start = stop
    yield from _with_space([*ends, len(text)], text)


def _checked_ends(name: str, function: Callable[[str], Iterable[int]], text: str) -> Iterator[int]:
    try:
        ends = [operator.index(end) for end in function(text)] if text else []
    except TypeError as error:
        raise TypeError(f"splitter: expected the ends of the steps, ints, from {name}: {error}") from error
    if ends != sorted(set(ends)) or (ends and not 0 < ends[0] <= ends[-1] <= len(text)):
        raise ValueError(f"splitter: expected ascending ends within 1 to {len(text)} from {name}, got {ends[:10]}")
    yield from _with_space([*ends, len(text)], text)


def _with_space(ends: Iterable[int], text: str) -> Iterator[int]:
    """The same ends, each moved after the following white space; blank steps are dropped."""
    start = 0
    for end in ends:
        end = _skip(_SPACE, text, end)
        if end > start:
            yield end
            start = end
