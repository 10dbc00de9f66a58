"""Finds the numbers of a text, as digits and on request as words; `molsaki.segment` says what counts as a number."""

from __future__ import annotations

import re

from molsaki.text.sentences import LINE_ENDS
from molsaki.text.spans import Span

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


def find_numbers(text: str, number_words: bool) -> list[Span]:
    """The spans of all numbers, ascending and disjoint; those written out too if ``number_words``."""
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
    """Return whether the plus or minus at ``at``, which touches the number after it, is that number's sign."""
    i = at - 1
    while i >= 0 and text[i].isspace() and text[i] not in LINE_ENDS:
        i -= 1
    if i < 0 or text[i] in LINE_ENDS or text[i] in _BEFORE_SIGN:
        return True
    if text[i] in _CURRENCY:
        return i == 0 or not text[i - 1].isnumeric()
    if i < at - 1:
        return not (text[i].isnumeric() or text[i] in ")]}%°" or (text[at] == "+" and text[i].isalpha()))
    if text[i] in "\"'":
        return i == 0 or not text[i - 1].isalnum()
    return text[i] == "+" and text[at] != "+"


def _number_word_pattern() -> re.Pattern[str]:
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
