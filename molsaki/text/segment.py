"""Cuts a question and its rationale into steps and finds the key words, in characters, before any tokenizer is used.

Both are computed once per text, so the maps of different tokenizers have the same shape (MoLSAKI, arXiv 2604.15701,
section 3: steps are the rows of a map, key words its columns).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from molsaki.text.conversations import Turn, checked_context
from molsaki.text.key_words import KEY_WORDS, normalized, selector_of
from molsaki.text.sentences import splitter_of
from molsaki.text.spans import Span, Spans, check_str, checked_key_spans


def segment(
    question: str,
    rationale: str,
    key: str | Iterable[str] = "numbers",
    splitter: str = "rules",
    number_words: bool = False,
    keywords: Iterable[str] = (),
    *,
    key_of: Literal["all", "question"] = "all",
    key_occurrence: Literal["all", "first", "last"] = "all",
    max_key_words: int = 0,
    key_spans: tuple[Iterable[Span], Iterable[Span]] | Mapping[str, Iterable[Span]] | None = None,
    context: Sequence[Turn] = (),
) -> Spans:
    """Cut ``question + " " + rationale`` into steps and find its key words (the paper's critical words).

    White space around either text is dropped first. The end of the question always ends a step, no step is blank, and
    no number or keyword spans the end of the question.

    Numbers include thousands separators, decimals, a leading dot, exponents and fractions without spaces (``3/4``, even
    if it means a division, ``24/2=12``; ``1 1/2`` is one number). ``24 / 2``, ``1.5/2`` and ``8:30`` have two numbers.
    A sign belongs to its number if it touches it and is neither a minus between two numbers nor a hyphen in a word: it
    does in ``-5``, ``= -5`` and ``(-5)``, but not in ``7-5``, ``7 -5``, ``$5-$3`` and ``covid-19``. Currency, percent,
    units and ordinal endings stay outside (``$5``, ``5%``, ``5km``, ``5th``), but a currency sign between sign and
    digits does not (``-$5``). Digits that end a name are not a number (``mp3``, ``x1``), but after a letter of a script
    without capitals they are (``有3个``). GSM8K's calculator marks are ordinary text: ``<<48/2=24>>24`` has three
    numbers. Digits of every script and width count, also grouped as in India (``1,00,000``), in LaTeX (``9{,}000``,
    ``\\frac{3}{4}``), and in European notation if it is unambiguous: ``1.234.567`` and ``1.234,56``, but ``3,5`` has
    two numbers. In ``3万`` and ``1万2千`` the scale is part of the number; numbers in Chinese words (``十五``) are not
    found.

    Args:
        question: the question.
        rationale: the rationale.
        key: a name of `molsaki.text.key_words.KEY_WORDS`: ``"numbers"``; ``"words"``, every word; ``"given"``, the
            spans in ``key_spans``; ``"regex:PATTERN"``; ``"module:function"``, your own function from a text to spans;
            or ``"keywords"`` for the words in ``keywords``, for which you can also pass a list of keywords. Each
            occurrence of a keyword as a whole word, in any case and width, is a key word; in scripts without spaces
            between words every occurrence is, and in Korean also one followed by a particle. Of overlapping occurrences
            the longest is used, then the first. Any white space matches the white space inside a keyword.
        splitter: ``"rules"`` ends a step at newlines and at ``. ? !``, but not inside numbers and addresses, after
            abbreviations, initials and list markers, or before lower case; at the sentence terminals of other scripts
            (``。！？ ؟ । ۔``); and in Thai and Lao, which have none, at a space between two of their letters.
            ``"periods"`` is the paper's splitter: every run of ASCII periods ends a step, also in ``3.14``, and nothing
            else does. ``"numbers"`` ends a step as ``"rules"`` does and also before every number in digits, so that a
            number's step ends where the number is decided. ``"lines"`` and ``"paragraphs"`` end steps at line ends and
            at blank lines, ``"words:40"`` after every 40 words, ``"sentencex:de"`` by the package sentencex for that
            language, and ``"module:function"`` by your own function from a text to the ends of its steps.
        number_words: numbers written out (``twenty-five``, ``a dozen``, ``two thirds``) are numbers too, also
            where ``one`` is a pronoun.
        keywords: the example's own key words, for the selectors that use them.
        key_of: whether words of the whole text count, or of the question only.
        key_occurrence: of words that differ only in case, all, or only the first or the last one.
        max_key_words: the most key words, the first ones; 0: no limit.
        key_spans: for ``key="given"``: ascending, disjoint spans of the characters of question and of rationale, a pair
            of lists or a dict of them.
        context: the turns before the question, each a role and a text. They are treated as part of the question: their
            sentences are steps and their key words are key words, except with ``key="given"``. No step and no key word
            spans the end of a turn.

    Returns:
        The text with its steps and words in characters.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    check_str("question", question)
    check_str("rationale", rationale)
    step_ends = splitter_of(splitter)
    if not isinstance(key, Iterable):
        raise TypeError(f"key: expected one of {', '.join(KEY_WORDS)} or a list of keywords, got {type(key).__name__}")
    if not isinstance(key, str):
        key, keywords = "keywords", key
    if key_of not in ("all", "question"):
        raise ValueError(f"key_of: expected all or question, got {key_of!r}")
    if key_occurrence not in ("all", "first", "last"):
        raise ValueError(f"key_occurrence: expected all, first or last, got {key_occurrence!r}")
    if type(max_key_words) is not int or max_key_words < 0:
        raise ValueError(f"max_key_words: expected an int of at least 0, got {max_key_words!r}")
    select = selector_of(key, number_words).select
    given: list[list[Span]] = []
    if select is not None:
        find_key_words = select(keywords, number_words)
    elif key_spans is None:
        raise ValueError(f"key_spans: required by key={key!r}: the spans of the question and of the rationale")
    else:
        given = checked_key_spans(key_spans, question, rationale)
    text = ""
    steps: list[Span] = []
    words: list[Span] = []
    turns: list[tuple[str, Span]] = []
    asked = [*checked_context(context), ("user", question.strip())]
    for role, piece in (*asked, ("rationale", rationale.strip())):
        if text and piece:
            text += " " if role == "rationale" else "\n\n"
            steps[-1] = (steps[-1][0], len(text))
        start = offset = len(text)
        turns.append((role, (offset, offset + len(piece))))
        for end in step_ends(piece):
            steps.append((start, offset + end))
            start = offset + end
        if select is None:
            found = given[len(turns) - len(asked)] if len(turns) >= len(asked) else []
        else:
            found = find_key_words(piece)
        if key_of == "all" or role != "rationale":
            words.extend((offset + a, offset + b) for a, b in found)
        text += piece
    question_end = turns[len(asked) - 1][1][1]
    if len(asked) > 1 and not question.strip():
        raise ValueError("question: expected a text after a context, got a blank one")
    words = _of_occurrence(text, words, key_occurrence)
    if max_key_words:
        words = words[:max_key_words]
    return Spans(text, tuple(steps), tuple(words), question_end, tuple(turns[:-1]) if len(asked) > 1 else ())


def _of_occurrence(text: str, words: list[Span], occurrence: str) -> list[Span]:
    """All, the first or the last of the words that differ only in case and width."""
    if occurrence == "all":
        return words
    kept: dict[str, Span] = {}
    for start, stop in words if occurrence == "first" else reversed(words):
        kept.setdefault(normalized(text[start:stop])[0].casefold(), (start, stop))
    return sorted(kept.values())
