"""Finds the answer in a text and compares answers: numbers by value, choices by text or letter, others by words."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from molsaki.extras import regex
from molsaki.text import expressions
from molsaki.text.key_words import WIDTHS, find_keywords, normalized
from molsaki.text.numbers import find_numbers, parse_number
from molsaki.text.spans import Span

Kind = Literal["choice", "truth", "number", "expression", "text"]
TRUTHS = {"yes": True, "true": True, "no": False, "false": False}

_BOXED = regex.compile(r"\\f?boxed\s*(?P<braces>\{(?:[^{}]++|(?&braces))*+\})")
CALCULATOR = regex.compile(r"<<[^<>\n]*>>")  # GSM8K's <<48/2=24>>
_STATED = regex.compile(  # text after which an answer follows
    r"""
    \banswer(?:\s+choice)?\s*(?:is\s*[:：]?|[:：=])(?!\s*not\b)
  | (?:答案|正解|答え|정답|답)\s*(?:[是为為は은는]\s*[:：]?|[:：])
  | (?:उत्तर\s*[:：]|คำตอบ\s*(?:คือ|[:：])|(?:الجواب|الإجابة)\s*(?:هو|هي|[:：]))
    """,
    regex.VERBOSE | regex.IGNORECASE,
)
_OPEN = r"[\s*_\"'“‘$(\[（{]*"
_LETTERS = regex.compile(  # a choice by its letter; "a" and "I" are words too
    rf"""
    (?<![a-z\d])[(\[（](?P<letter>[a-z])[)\]）]
  | \b(?:answer|option|choice|choose|pick|select)\b (?:\s+(?:is|option|choice))* \s*[:：=]?
    {_OPEN}(?P<letter>[a-z])(?: (?<=(?-i:[B-HJ-Z]))(?![\w'’]) | (?=\s*(?:[^\w\s'’]|$)) )
  | [选選]项?(?:[择擇]|肢)?{_OPEN}(?P<letter>[a-z])(?![a-z\d])
  | (?:答案|正解|答え|정답|답)[是为為は은는应應该該选選：:\s]*{_OPEN}(?P<letter>[a-z])(?![a-z\d])
  | (?<!\w)(?P<letter>(?-i:[A-Z]))\s+is\s+(?:the\s+)?(?:best|correct|right)\b
  | \A\W*(?P<letter>[a-z])\W*\Z
    """,
    regex.VERBOSE | regex.IGNORECASE | regex.MULTILINE,
)
_FIRST_LETTER = regex.compile(r"\W*(?P<letter>[A-Za-z])\s*[.):：](?=\s)")
_SCALES = {"hundred": 2, "thousand": 3, "lakh": 5, "million": 6, "crore": 7, "billion": 9, "trillion": 12}
_SCALE = regex.compile(rf"[\s-]*({'|'.join(_SCALES)})s?\b", regex.IGNORECASE)
_UNIT = regex.compile(  # other single letters are variables
    r"""
    \s* \(?\s* (?P<unit> [mgshlLVWKJN] | °\s?[CFK]? | (?!\p{Latin}\W*\Z)\p{L}[\p{L}\p{M}\ /'’²³.°-]{0,40} ) \s*\)? \.?
    """,
    regex.VERBOSE,
)
_EXPRESSION = regex.compile(
    r"""
    [\\^_{}=<>≤≥√π∞±]
  | ^[(\[] [^()\[\]]*,[^()\[\]]* [)\]]$ | ^[\d\s.,;()+-]*\d\s*[,;][\d\s.,;()+-]*$        # pairs, intervals, lists
  | \d[a-z](?!\p{L}) | (?<![\p{L}\d])[a-z]\s*[-+*/·×]\s*(?:\d|\(|[a-z](?!\p{L})) | \d\s*[+*·×]\s*[\da-z(]
  | \d\s*[-/]\s*(?:[a-z](?!\p{L})|\()
    """,
    regex.VERBOSE,
)


def find_choice(text: str, choices: Sequence[str], last: bool = False, letters: bool = True) -> str | None:
    """The choice that a text names by its words, its number or its letter: the one after "the answer is", else the
    first or last.

    A number names a choice of the same value, but a part of a number does not: neither 1.5 nor -5 names "5". A letter
        counts as
    in ``(b)``, ``Answer: B``, ``option B``, ``B is correct``, or alone.
    """
    found = _named(text, choices)
    if letters:
        folded = text.translate(WIDTHS)
        matches = [*_LETTERS.finditer(folded), *([] if last else filter(None, [_FIRST_LETTER.match(folded)]))]
        for match in matches:
            number = ord(match["letter"].lower()) - ord("a")
            if number < len(choices):
                found.append((match.span("letter"), choices[number]))
    found.sort()
    stated = list(_STATED.finditer(text))
    if stated:
        start = stated[-1 if last else 0].end()
        stop = regex.compile(r"[.!?](?=\s)|[。！？\n]|\Z").search(text, start).start()
        found = [one for one in found if start <= one[0][0] < stop][:1] or found
    return found[-1 if last else 0][1] if found else None


def _named(text: str, choices: Sequence[str]) -> list[tuple[Span, str]]:
    """The choices whose words or number occur in a text, with their positions; of overlapping ones the longest."""
    values = [parse_number(choice) for choice in choices]
    by_value = {v: choice for v, choice in zip(values, choices, strict=True) if v is not None and values.count(v) == 1}
    numbers = find_numbers(text, number_words=False)
    found = [((a, b), by_value[v]) for a, b in numbers if (v := parse_number(text[a:b])) in by_value]
    inside = {i for a, b in numbers for i in range(a + 1, b)}  # no word begins or ends within a number
    words = [choice for choice in choices if choice not in by_value.values()]
    for start, stop in find_keywords(text, words):
        if start not in inside and stop not in inside:
            found.append(((start, stop), next(c for c in words if same_text(c, text[start:stop]))))
    kept, taken = [], bytearray(len(text))
    for (a, b), choice in sorted(found, key=lambda one: one[0][0] - one[0][1]):
        if not any(taken[a:b]):
            taken[a:b] = b"\1" * (b - a)
            kept.append(((a, b), choice))
    return kept


def gold_choice(gold: str, choices: Sequence[str]) -> str | None:
    """The choice that a gold answer names: by its text in any case, its letter, or its value."""
    named = [choice for choice in choices if same_text(choice, gold)]
    letter = regex.fullmatch(r"\(?([a-zA-Z])(?:\)|[.:])?\s*(.*)", gold.strip())
    if not named and letter:
        number = ord(letter[1].lower()) - ord("a")
        named = [c for c in choices[number : number + 1] if not letter[2] or same_text(c, letter[2])]
    value = parse_number(gold)
    if not named and value is not None:
        named = [choice for choice in choices if parse_number(choice) == value]
        named = named if len(named) == 1 else []
    return named[0] if named else None


def final_answer(text: str) -> str:
    """The answer in the form of a data set: the last ``\\boxed{}`` (MATH), else what follows the last ``####`` (GSM8K),
    else the whole text; without GSM8K's calculator marks, and without a thinking trace before it."""
    text = CALCULATOR.sub("", text.rpartition("</think>")[2])
    boxed = _BOXED.findall(text)
    if boxed:
        return str(boxed[-1][1:-1]).strip()
    head, mark, tail = text.rpartition("####")
    return tail.strip() if mark else text.strip()


def stated_answer(text: str) -> str | None:
    """The answer that a text states: in the form of a data set, or after "the answer is"."""
    final = final_answer(text)
    if _BOXED.search(text) or "####" in text:
        return final
    stated = list(_STATED.finditer(final))
    if not stated:
        return None
    sentence = regex.split(r"[.!?](?=\s|$)|[。！？\n]", final[stated[-1].end() :])[0]
    numbers = find_numbers(sentence, number_words=False)
    return sentence[slice(*numbers[0])] if len(numbers) == 1 else sentence.strip(" *_\"'`") or None


def kind_of(gold: str, choices: Sequence[str] | None) -> Kind:
    """How a gold answer is compared with the answer in a reply.

    Raises:
        ValueError: no reply could match it; the message says what was expected.
    """
    answer = without_latex(final_answer(gold))
    if choices:
        if gold_choice(answer, choices) is None:
            raise ValueError(f"expected one of the choices {', '.join(choices)}, or a letter of one, got {gold!r}")
        return "choice"
    if answer.casefold().strip(" .") in TRUTHS:
        return "truth"
    if quantity(answer) is not None:
        return "number"
    if "\n" in answer:
        raise ValueError(
            "expected a number, a choice, yes or no, an expression or a text of one line, or a text that ends in "
            f"'#### ANSWER' or has a \\boxed{{ANSWER}}, got {answer.count(chr(10)) + 1} lines: {gold[:60]!r}"
        )
    if _EXPRESSION.search(answer):
        expressions.check(final_answer(gold))
        return "expression"
    if not regex.search(r"[\p{L}\p{N}]", answer):
        raise ValueError(f"expected letters or digits, which a reply could match, got {gold!r}")
    return "text"


def quantity(text: str) -> tuple[Fraction, str] | None:
    """The value and the unit of a text that is a number, or a number and a unit such as ``5 apples`` or ``15个``."""
    value = parse_number(text)
    if value is not None:
        return value, ""
    numbers = find_numbers(text, number_words=False)
    if len(numbers) != 1 or regex.search(r"[^\s\p{Sc}]", text[: numbers[0][0]]):
        return None
    value, following = value_at(text, numbers[0])
    unit = _UNIT.fullmatch(following) if following.strip() else None
    if value is None or (following.strip() and unit is None):
        return None
    return value, unit["unit"].strip() if unit else ""


def value_at(text: str, span: Span) -> tuple[Fraction | None, str]:
    """The value of the number at ``span``, times a scale after it as in ``1.5 million``; the text after both."""
    value, scale = parse_number(text[slice(*span)]), _SCALE.match(text, span[1])
    if value is None or scale is None:
        return value, text[span[1] :]
    return value * 10 ** _SCALES[scale[1].lower()], text[scale.end() :]


def without_latex(text: str) -> str:
    """A text without the LaTeX around numbers and words: ``$5\\text{ cm}$`` is ``5 cm``."""
    if "\\" in text or "~" in text:
        text = _without_commands(text)
    return text.strip().strip("$*").strip()


def _without_commands(text: str) -> str:
    text = regex.sub(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = regex.sub(r"\\(?:left|right|displaystyle|!)(?![a-z])|\\[()\[\]]", "", text)
    text = regex.sub(r"\\[,;: ](?!\d{3}(?!\d))|~", " ", text)
    text = regex.sub(r"\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})", "°", text)
    text = regex.sub(r"\\([%$])", r"\1", text)
    return text


def same_answer(a: str, b: str, choices: Sequence[str] | None = None) -> bool:
    """Return whether two answers are the same choice, the same number or, where one of them is neither, the same words.

    Units are compared if both have one.
    """
    a, b = without_latex(final_answer(a)), without_latex(final_answer(b))
    if choices:
        one = gold_choice(a, choices)
        return one is not None and one == gold_choice(b, choices)
    x, y = quantity(a), quantity(b)
    if x is None or y is None:
        return same_text(a, b)
    return x[0] == y[0] and (not x[1] or not y[1] or same_text(x[1], y[1]))


def same_text(a: str, b: str) -> bool:
    """Return whether two texts have the same words, ignoring case and surrounding quotes and periods."""
    return _words(a) == _words(b)


def _words(text: str) -> str:
    return " ".join(normalized(text)[0].casefold().strip(" .。\"'“”‘’*").split())
