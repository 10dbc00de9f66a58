"""Cuts a question and its rationale into steps and finds the key words, in characters, before any tokenizer is met.

Both cuts are made once on the text, so that tokenizers that disagree still give maps of one shape (MoLSAKI,
arXiv 2604.15701, section 3: steps are the rows of a map, key words its columns).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Literal

Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Spans:
    """A text cut into steps and key words. All offsets are characters of ``text``, half-open.

    Attributes:
        text: the question, a space and the rationale (no space where one of the two is empty).
        steps: S pairs that tile the text; the white space after a step belongs to it. None holds characters of both
            the question and the rationale.
        words: W pairs, every occurrence of a key word, ascending and disjoint, none empty.
        question_end: ``text[:question_end]`` is the question, without the separator.

    Raises:
        TypeError: ``text`` is not a str.
        ValueError: the spans are not as described above; the message names the field and the entry.
    """

    text: str
    steps: tuple[Span, ...]
    words: tuple[Span, ...]
    question_end: int

    def __post_init__(self) -> None:
        _check_str("text", self.text)
        length = len(self.text)
        if not 0 <= self.question_end <= length:
            raise ValueError(f"question_end: expected 0 to {length} (the text's length), got {self.question_end}")
        end, rationale_start = 0, self.rationale_start
        for s, (start, stop) in enumerate(self.steps):
            if start != end or stop <= start:
                raise ValueError(f"steps[{s}]: expected a non-empty span that starts at {end}, got {start, stop}")
            if start < self.question_end and stop > rationale_start:
                raise ValueError(f"steps[{s}]: {start, stop} holds characters of both the question and the rationale")
            end = stop
        if end != length:
            raise ValueError(f"steps: expected them to tile the text, 0 to {length}, but they end at {end}")
        end = 0
        for w, (start, stop) in enumerate(self.words):
            if start < end or not start < stop <= length:
                raise ValueError(f"words[{w}]: expected a non-empty span within {end, length}, got {start, stop}")
            if start < self.question_end < stop:
                raise ValueError(f"words[{w}]: {start, stop} crosses the question's end at {self.question_end}")
            end = stop

    @property
    def rationale_start(self) -> int:
        """Where the rationale starts: the first character after the question that is no white space."""
        return len(self.text) - len(self.text[self.question_end :].lstrip())

    @property
    def question(self) -> str:
        return self.text[: self.question_end]

    @property
    def rationale(self) -> str:
        return self.text[self.rationale_start :]


def segment(
    question: str,
    rationale: str,
    key: Literal["numbers"] | Iterable[str] = "numbers",
    splitter: Literal["rules", "periods"] = "rules",
    number_words: bool = False,
) -> Spans:
    """Cut ``question + " " + rationale`` into steps and find its key words (the paper's critical words).

    White space around either text is dropped first. The question's end always ends a step, no step is blank, and
    nothing, number or keyword, reaches across the question's end.

    Numbers: thousands separators, decimals, a leading dot, exponents and fractions without spaces (``3/4``, also
    where it stands for a division, ``24/2=12``; ``1 1/2`` is one number). Two numbers in ``24 / 2``, ``1.5/2`` and
    ``8:30``. A sign belongs to its number where it touches it and is neither a minus between two numbers nor a hyphen
    in a word: ``-5``, ``= -5``, ``(-5)``, but ``7-5``, ``7 -5``, ``$5-$3`` and ``covid-19`` without. Currency,
    percent, units and ordinal endings stay outside (``$5``, ``5%``, ``5km``, ``5th``); digits that end a name are no
    number (``mp3``, ``x1``). GSM8K's calculator marks are text like any other: ``<<48/2=24>>24`` has three numbers.

    Args:
        question: the question.
        rationale: the rationale.
        key: ``"numbers"``, or keywords: each occurrence as a whole word in any case is a key word; of overlapping
            occurrences the longest wins, then the first. Any white space matches the white space inside a keyword.
        splitter: ``"rules"`` ends a step at ``. ? !`` and newlines, but not inside numbers, after abbreviations,
            initials and list markers, or before lower case. ``"periods"`` is the paper's: every run of periods ends
            one, also in ``3.14``, and nothing else does.
        number_words: numbers written out (``twenty-five``, ``a dozen``, ``two thirds``) are numbers too, also
            where ``one`` is a pronoun.

    Returns:
        The text with its steps and words in characters.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    _check_str("question", question)
    _check_str("rationale", rationale)
    if splitter not in ("rules", "periods"):
        raise ValueError(f'splitter: expected "rules" or "periods", got {splitter!r}')
    by_number = isinstance(key, str)
    if by_number and key != "numbers":
        raise ValueError(f'key: expected "numbers" or a list of keywords, got {key!r}')
    if number_words and not by_number:
        raise ValueError('number_words: needs key="numbers", got keywords')
    patterns = [] if by_number else _keyword_patterns(key)

    ends = _rule_ends if splitter == "rules" else _period_ends
    text, question_end = "", 0
    steps: list[Span] = []
    words: list[Span] = []
    for i, piece in enumerate((question.strip(), rationale.strip())):
        if text and piece:
            text += " "
            steps[-1] = (steps[-1][0], len(text))
        start = offset = len(text)
        for end in ends(piece):
            steps.append((start, offset + end))
            start = offset + end
        found = _numbers(piece, number_words) if by_number else _keywords(piece, patterns)
        words.extend((offset + a, offset + b) for a, b in found)
        text += piece
        if i == 0:
            question_end = len(text)
    return Spans(text, tuple(steps), tuple(words), question_end)


def _check_str(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str, got {type(value).__name__}")


def _word_set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_LINE_ENDS = "\n\r\v\f\x85\u2028\u2029"
_STOP = r"[.?!…。！？]+"
_CLOSE = r"[\"'”’»)\]}」』*_]*(?: [)\]}”»]+)?"
_BREAK = re.compile(rf"(?P<stop>{_STOP}){_CLOSE}|[{_LINE_ENDS}]\s*")
_SPACE = re.compile(r"\s*")
_OPEN = re.compile(r"(?:[“«(\[{] ?|[\"'‘「『*_#¿¡])*")
_WORD = re.compile(r"[^\W\d_]*")
_NO_START = frozenset("=+-−–—*/×÷·<>≈≤≥^%,;:.?!…)]}”’»")  # what follows a space but never starts a sentence
_MARKER = re.compile(
    r"[\s>#*•\"'(\[-]*(?:(?:step|part|case|phase|problem|question|example|option)\s+)?(?:\d{1,3}|[a-z]|[ivx]{1,4})",
    re.IGNORECASE,
)
_INITIALS = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")  # U.S, p.m: the last period is the stop itself

# Abbreviations by what may follow: never a new sentence, one only with a word of _STARTERS, one only without a number.
_NEVER_LAST = _word_set("mr mrs ms mx dr prof messrs capt sgt lt cmdr cpl pvt mt e.g i.e eg ie vs viz cf approx ca sq")
_SELDOM_LAST = _word_set(
    "jr sr st ave blvd rd inc ltd co corp bros dept univ al est ph.d gen gov sen rep rev hon col maj adm pres"
)
_BEFORE_NUMBER = _word_set(
    """no nos fig figs eq eqs ch vol p pp ft lb lbs oz yd hr hrs min mins sec secs
    jan feb mar apr jun jul aug sep sept oct nov dec"""
)
_STARTERS = _word_set(
    """a after all also although an and another as at because before besides both but by calculate determine
    during each eventually every finally find first for from given he hence her here his how however i if in initially
    instead it its last later let many my next now of on once one only or our over second she similarly since so
    some solve still that the their then there therefore these they this those three thus to together two
    under until up we what when where whereas which while who whose why with without yes you your"""
)


def _skip(pattern: re.Pattern, text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at


def _rule_ends(text: str) -> Iterator[int]:
    """The ends of the steps of a text that neither starts nor ends with white space."""
    start = 0
    for match in _BREAK.finditer(text):
        stop = match["stop"]
        end = match.end() if stop is None else _skip(_SPACE, text, match.end())
        if start < end < len(text) and (stop is None or _ends_step(text, start, match, end)):
            yield end
            start = end
    if text:
        yield len(text)


def _ends_step(text: str, start: int, match: re.Match, following: int) -> bool:
    """Whether the stop in ``match`` ends the step that began at ``start``; the next text begins at ``following``."""
    stop, gap = match["stop"], text[match.end() : following]
    if any(c in _LINE_ENDS for c in gap) or stop[-1] in "。！？":
        return True
    initial = _skip(_OPEN, text, following)
    head = text[initial : initial + 1]
    if not head or head.isspace() or head.islower() or head in _NO_START:
        return False
    if not gap and not _lacks_space(text, match, initial):
        return False
    return stop != "." or not _is_inner_period(text, start, match.start(), initial)


def _lacks_space(text: str, match: re.Match, initial: int) -> bool:
    """Whether only a forgotten space keeps the next sentence off, as in ``30 apples.Then she``."""
    before, head = text[match.start() - 1 : match.start()], text[initial : initial + 2]
    if match["stop"][-1] in "?!":
        return head[:1].isupper()
    return (before.islower() or before.isdigit() or before in ")]%") and head[:1].isupper() and head[1:].islower()


def _is_inner_period(text: str, start: int, period: int, following: int) -> bool:
    """Whether the single period at ``period`` belongs to an abbreviation, an initial or a list marker."""
    if period - start < 30 and _MARKER.fullmatch(text, start, period):
        return True
    first = period
    while first > max(start, period - 20) and (text[first - 1].isalnum() or text[first - 1] in ".'’"):
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
        return word.isupper() and (not before or before.isalpha() or before in ".,;:'’\"“(-&")
    return name in _SELDOM_LAST or _INITIALS.fullmatch(word) is not None


def _period_ends(text: str) -> Iterator[int]:
    for match in re.finditer(r"\.+\s*", text):
        if match.end() < len(text):
            yield match.end()
    if text:
        yield len(text)


_VULGAR = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
_NUMBER = re.compile(
    rf"""
    (?=\d) (?: (?<!\w) | (?<=[\W_]_) | (?<=[\d)%][xX]) | (?<=[\d)%]\ [xX]) )    # not in a name; 5x10 is a product
    (?:
        (?:\d{{1,3}}[ \u00a0])? (?<!\d/) [1-9]\d?[/⁄][1-9]\d? (?![\d/⁄]|[.,]\d)    # 1 1/2
      | (?<!\d/) \d+[/⁄]\d+ (?![\d/⁄]|[.,]\d)                                      # 3/4
      | \d+\ ?[{_VULGAR}]
      | (?:\d{{1,3}}(?:,\d{{3}})+(?!\d) | \d{{1,3}}(?:[\u2009\u202f]\d{{3}})+(?!\d) | \d+)
        (?:\.\d+)?
        (?:[eE][-+−]?\d+(?!\w))?
    )
  | (?<![\w.])\.\d+(?:[eE][-+−]?\d+(?!\w))?                            # .5
  | [{_VULGAR}]
    """,
    re.VERBOSE,
)
_SIGNS = frozenset("+-−–")
_BEFORE_SIGN = frozenset("([{=*/×÷·^<>≤≥≈:,;|`“‘~√")
_CURRENCY = frozenset("$€£¥₹¢")


def _numbers(text: str, number_words: bool) -> list[Span]:
    found = []
    for match in _NUMBER.finditer(text):
        start, stop = match.span()
        if start and text[start - 1] in _SIGNS and _is_sign(text, start - 1):
            start -= 1
        found.append((start, stop))
    if number_words:
        found = sorted(found + [match.span() for match in _NUMBER_WORD.finditer(text)])
    return found


def _is_sign(text: str, at: int) -> bool:
    """Whether the plus or minus at ``at``, which touches the number after it, is that number's sign."""
    i = at - 1
    while i >= 0 and text[i].isspace() and text[i] not in _LINE_ENDS:
        i -= 1
    if i < 0 or text[i] in _LINE_ENDS or text[i] in _BEFORE_SIGN:
        return True
    if text[i] in _CURRENCY:
        return i == 0 or not text[i - 1].isnumeric()
    if i < at - 1:
        return not (text[i].isnumeric() or text[i] in ")]}%°" or (text[at] == "+" and text[i].isalpha()))
    if text[i] in "\"'":
        return i == 0 or not text[i - 1].isalnum()
    return text[i] == "+" and text[at] != "+"


def _number_word_pattern() -> re.Pattern:
    ones = "one|two|three|four|five|six|seven|eight|nine"
    teens = "ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen"
    tens = "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
    parts = "hal(?:f|ves)|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?"
    scale = "thousand|million|billion|trillion"
    gap = r"(?:[ \u00a0]|-)"
    also = rf",?{gap}(?:and{gap})?"
    small = rf"(?:(?:{tens})(?:{gap}(?:{ones})\b)?|{teens}|{ones})\b"
    below_thousand = rf"(?:(?:{small}|an?){gap}hundred\b(?:{also}{small})?|{small})"
    large = rf"(?:{below_thousand}|an?){gap}(?:{scale})\b"
    return re.compile(
        rf"\b(?:{large}(?:{also}{large})*(?:{also}{below_thousand})?|(?:{ones}){gap}(?:{parts})\b|{below_thousand}"
        rf"|(?:zero|half|dozen|hundred|{scale})\b)",
        re.IGNORECASE,
    )


_NUMBER_WORD = _number_word_pattern()


def _keyword_patterns(key: Iterable[str]) -> list[re.Pattern]:
    if not isinstance(key, Iterable):
        raise TypeError(f'key: expected "numbers" or a list of keywords, got {type(key).__name__}')
    patterns = []
    for i, keyword in enumerate(key):
        _check_str(f"key[{i}]", keyword)
        parts = keyword.split()
        if not parts:
            raise ValueError(f"key[{i}]: expected a keyword, got {keyword!r}")
        before = r"(?<!\w)" if parts[0][0].isalnum() else ""
        after = r"(?!\w)" if parts[-1][-1].isalnum() else ""
        patterns.append(re.compile(before + r"\s+".join(map(re.escape, parts)) + after, re.IGNORECASE))
    return patterns


def _keywords(text: str, patterns: list[re.Pattern]) -> list[Span]:
    candidates = {match.span() for pattern in patterns for match in pattern.finditer(text)}
    taken, found = bytearray(len(text)), []
    for start, stop in sorted(candidates, key=lambda span: (span[0] - span[1], span[0])):
        if not any(taken[start:stop]):
            taken[start:stop] = b"\1" * (stop - start)
            found.append((start, stop))
    return sorted(found)
