"""Finds the numbers of a text and their values; `molsaki.segment` says what counts as a number."""

from __future__ import annotations

import functools
import unicodedata
from fractions import Fraction

from molsaki.extras import regex
from molsaki.text.spans import LINE_ENDS, Span

_VULGAR = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
_CASED = r"[\p{Lu}\p{Ll}\p{Lt}]"  # digits after such a letter end a name (mp3); scripts without case have no such names
_SEPARATOR = r",(?:\\!)? | \{,\} | \\, | [\u2009\u202f٬'’] | (?<=[０-９])，(?=[０-９])"
_POINT = r"[.．٫]"
_SCALES = {"百": 2, "백": 2, "千": 3, "천": 3, "万": 4, "萬": 4, "만": 4, "亿": 8, "億": 8, "억": 8}
_NUMBER = regex.compile(
    rf"""
    (?=\d) (?: (?<! {_CASED}\p{{M}}* | [\p{{Nd}}\p{{Nl}}_⁰¹²³⁴-⁹₀-₉{_VULGAR}])    # not in a name
             | (?<=[\W_]_) | (?<=[\d)%][xX]) | (?<=[\d)%]\ [xX]) )                 # 5x10 is a product
    (?:
        (?:\d{{1,3}}[ \u00a0])? (?<!\d[/／]) (?!0)\d{{1,2}}[/⁄／](?!0)\d{{1,2}} (?![\d/⁄／]|[.,]\d)    # 1 1/2
      | (?<!\d[/／]) \d+[/⁄／]\d+ (?![\d/⁄／]|[.,]\d)                                                  # 3/4
      | \d+[ ]?[{_VULGAR}]
      | \d+\s*\\[cdt]?frac\s* (?&parts)
      | (?P<scaled> (?: (?:\d{{1,3}}(?:,\d{{3}})+|\d+)(?:{_POINT}\d+)?          # 3万, 1万2千, 2万3000
            (?: [十百千십백천]?[万萬亿億만억] | [千천](?![米克瓦卡帕伏焦赫字升公]) | [百백](?!分) ) )+
            (?:\d{{2,4}}(?![\d.,]))? )
      | (?<!\d[.,]) (?P<european> \d{{1,3}} (?: (?:\.\d{{3}}){{2,}}(?:,\d+)?                          # 1.234.567
            | (?:\.\d{{3}})+,\d\d | (?:[\u00a0\u2009\u202f]\d{{3}})+,\d{{1,2}} ) (?![.,]?\d) )         # 1.234,56
      | (?: (?<!\d,) \d{{1,2}}(?:,\d\d)+,\d{{3}}(?!,?\d)                                              # 1,00,000
          | \d{{1,3}} (?P<separator>{_SEPARATOR})\d{{3}} (?:(?P=separator)\d{{3}})* (?!\d)             # 1,000
          | \d+ )
        (?:{_POINT}\d+)?
        (?:[eE][-+−]?\d+(?! {_CASED} | [\d_]))?
    )
  | (?<![\w.])\.\d+(?:[eE][-+−]?\d+(?! {_CASED} | [\d_]))?                            # .5
  | [{_VULGAR}]
  | \\[cdt]?frac\s* (?P<parts> (?: \{{ \s*[-−]?\d+(?:\.\d+)?\s* \}} | \d ) \s* (?: \{{ \s*\d+(?:\.\d+)?\s* \}} | \d ))
    """,
    regex.VERBOSE,
)
_MINUS = frozenset("-−–－﹣")
_SIGNS = _MINUS | frozenset("+＋")
_BEFORE_SIGN = frozenset("([{=*/×÷·^<>≤≥≈:,;|`“‘~√（［｛＝＊／＜＞：，；、。｜～「『،؛")
_LETTERS_BEFORE_SIGN = frozenset("是为為成到得于於至从從和与與约約加减減乘除以はがをにと")  # no unit, as in 5元-3元
_AFTER_NUMBER = frozenset(")]}%°）］｝％")
_IS_CURRENCY = regex.compile(r"\p{Sc}").match


def find_numbers(text: str, number_words: bool) -> list[Span]:
    """The spans of all numbers, ascending and disjoint; with ``number_words`` also numbers written as words."""
    found = []
    for match in _NUMBER.finditer(text):
        start, stop = match.span()
        sign = start - 1
        while sign > 0 and _IS_CURRENCY(text[sign]):  # -$5, -\$5
            sign -= 2 if text[sign - 1] == "\\" else 1
        if sign >= 0 and text[sign] in _SIGNS and _is_sign(text, sign):
            start = sign
        found.append((start, stop))
    if number_words:
        found = sorted(found + [match.span() for match in _NUMBER_WORD.finditer(text)])
    return found


@functools.lru_cache(maxsize=10_000)  # small numbers repeat often
def parse_number(text: str) -> Fraction | None:
    """The exact value of a text that is one number as `find_numbers` finds it, else None.

    White space, currency and percent signs, a final period and the dollar signs of LaTeX around it are ignored.
    """
    text = regex.sub(r"^[\s$\p{Cf}]*|(?:[\s$\p{Sc}\p{Cf}%％٪.。．]|\\[%$)])*$", "", text)
    head = regex.match(r"(?:\\?\p{Sc})*([-+−–－＋﹣]?)\s*(?:\\?\p{Sc})*\s*", text)
    match = _NUMBER.fullmatch(text, head.end())
    if match is None or regex.search(r"[eE][-+−]?\d{4}", text):
        return None  # the exact value of such an exponent would not fit in memory
    try:
        value = _value(match)
    except (ValueError, ZeroDivisionError):
        return None
    return -value if value is not None and head[1] in _MINUS else value


def _value(match: regex.Match[str]) -> Fraction | None:
    text = match[0]
    if match["scaled"]:
        total = Fraction(0)
        for digits, scale in regex.findall(r"([\d,.．٫]+)(\D*)", text):
            zeros = sum(1 if c in "十십" else _SCALES[c] for c in scale)
            total += _fraction(digits) * 10**zeros
        return total
    if match["european"]:
        return Fraction(regex.sub(r"[.\u00a0\u2009\u202f]", "", text).replace(",", "."))
    text = regex.sub(r"\\[cdt]?frac\s*(?:\{\s*([^{}]*?)\s*\}|(\d))\s*(?:\{\s*([^{}]*?)\s*\}|(\d))", r" \1\2/\3\4", text)
    pieces = regex.findall(rf"[{_VULGAR}]|[^\s{_VULGAR}]+", text)  # 1½ is 1 and ½
    values = [_fraction(piece) for piece in pieces]
    is_mixed = len(values) == 2 and 0 < values[1] < 1
    return sum(values, Fraction(0)) if len(values) == 1 or is_mixed else None


def _fraction(text: str) -> Fraction:
    if text in _VULGAR:
        return Fraction(unicodedata.numeric(text)).limit_denominator(10)
    text = regex.sub(_SEPARATOR, "", text, flags=regex.VERBOSE).replace("−", "-")
    above, _, below = regex.sub(_POINT, ".", text).translate({ord("⁄"): "/", ord("／"): "/"}).partition("/")
    return Fraction(above) / Fraction(below or 1)


def _is_sign(text: str, at: int) -> bool:
    """Return whether the plus or minus at ``at``, which touches the number after it, is that number's sign."""
    i = at - 1
    while i >= 0 and (text[i].isspace() or unicodedata.category(text[i]) == "Cf") and text[i] not in LINE_ENDS:
        i -= 1
    if i < 0 or text[i] in LINE_ENDS or text[i] in _BEFORE_SIGN:
        return True
    if _IS_CURRENCY(text[i]):
        return i == 0 or not text[i - 1].isnumeric()
    if text[i] in _LETTERS_BEFORE_SIGN:
        return True
    if i < at - 1:
        return not (text[i].isnumeric() or text[i] in _AFTER_NUMBER or (text[at] in "+＋" and text[i].isalpha()))
    if text[i] in "\"'":
        return i == 0 or not text[i - 1].isalnum()
    return text[i] in "+＋" and text[at] not in "+＋"


def _number_word_pattern() -> regex.Pattern[str]:
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
    return regex.compile(
        rf"\b(?:{large}(?:{also}{large})*(?:{also}{below_thousand})?|(?:{ones}){gap}(?:{parts})\b|{below_thousand}"
        rf"|(?:zero|half|dozen|hundred|{scale})\b)",
        regex.IGNORECASE,
    )


_NUMBER_WORD = _number_word_pattern()
