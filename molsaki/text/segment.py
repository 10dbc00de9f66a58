"""Cuts a question and its rationale into steps and finds the key words, in characters, before any tokenizer is used.

Both cuts are computed once per text, so the maps of different tokenizers have one shape (MoLSAKI, arXiv 2604.15701,
section 3: steps are the rows of a map, key words its columns).
"""

from __future__ import annotations

from collections.abc import Iterable

from molsaki.text.key_words import KEY_WORDS
from molsaki.text.sentences import SPLITTERS
from molsaki.text.spans import Span, Spans, check_str


def segment(
    question: str,
    rationale: str,
    key: str | Iterable[str] = "numbers",
    splitter: str = "rules",
    number_words: bool = False,
    keywords: Iterable[str] = (),
) -> Spans:
    """Cut ``question + " " + rationale`` into steps and find its key words (the paper's critical words).

    White space around either text is dropped first. The question's end always ends a step, no step is blank, and
    nothing, number or keyword, reaches across the question's end.

    Numbers: thousands separators, decimals, a leading dot, exponents and fractions without spaces (``3/4``, also
    where it stands for a division, ``24/2=12``; ``1 1/2`` is one number). Two numbers in ``24 / 2``, ``1.5/2`` and
    ``8:30``. A sign belongs to its number where it touches it and is neither a minus between two numbers nor a hyphen
    in a word: ``-5``, ``= -5``, ``(-5)``, but ``7-5``, ``7 -5``, ``$5-$3`` and ``covid-19`` without. Currency,
    percent, units and ordinal endings stay outside (``$5``, ``5%``, ``5km``, ``5th``), but a currency sign between
    sign and digits does not (``-$5``). Digits that end a name are no number (``mp3``, ``x1``); after a letter of a
    script without capitals they are one (``有3个``). GSM8K's calculator marks are text like any other:
    ``<<48/2=24>>24`` has three numbers. Digits of every script and width count, also grouped as in India
    (``1,00,000``), in LaTeX (``9{,}000``, ``\\frac{3}{4}``), and in the European way where nothing else can be meant:
    ``1.234.567`` and ``1.234,56``, but two numbers in ``3,5``. In ``3万`` and ``1万2千`` the scale is a part of the
    number; numbers in Chinese words (``十五``) are not found.

    Args:
        question: the question.
        rationale: the rationale.
        key: a name of `molsaki.text.key_words.KEY_WORDS`: ``"numbers"``, or ``"keywords"`` for the words in
            ``keywords``. A list of keywords is short for the latter. Each occurrence of a keyword as a whole word, in
            any case and width, is a key word; in scripts without spaces between words every occurrence is, and in
            Korean one that a particle follows. Of overlapping occurrences the longest wins, then the first. Any white
            space matches the white space inside a keyword.
        splitter: ``"rules"`` ends a step at newlines and at ``. ? !``, but not inside numbers and addresses, after
            abbreviations, initials and list markers, or before lower case; at the sentence terminals of other scripts
            (``。！？ ؟ । ۔``); and in Thai and Lao, which have none, at a space between two of their letters.
            ``"periods"`` is the paper's: every run of ASCII periods ends a step, also in ``3.14``, and nothing else
            does. ``"numbers"`` ends a step as ``"rules"`` does and also before every number in digits, so that a
            number's step ends where the number is decided.
        number_words: numbers written out (``twenty-five``, ``a dozen``, ``two thirds``) are numbers too, also
            where ``one`` is a pronoun.
        keywords: the example's own key words, for the selectors that use them.

    Returns:
        The text with its steps and words in characters.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    check_str("question", question)
    check_str("rationale", rationale)
    if splitter not in SPLITTERS:
        raise ValueError(f"splitter: expected one of {', '.join(SPLITTERS)}, got {splitter!r}")
    if not isinstance(key, Iterable):
        raise TypeError(f"key: expected one of {', '.join(KEY_WORDS)} or a list of keywords, got {type(key).__name__}")
    if not isinstance(key, str):
        key, keywords = "keywords", key
    if key not in KEY_WORDS:
        raise ValueError(f"key: expected one of {', '.join(KEY_WORDS)} or a list of keywords, got {key!r}")
    find_key_words, step_ends = KEY_WORDS[key](keywords, number_words), SPLITTERS[splitter]
    text = ""
    steps: list[Span] = []
    words: list[Span] = []
    for piece in (question.strip(), rationale.strip()):
        if text and piece:
            text += " "
            steps[-1] = (steps[-1][0], len(text))
        start = offset = len(text)
        for end in step_ends(piece):
            steps.append((start, offset + end))
            start = offset + end
        words.extend((offset + a, offset + b) for a, b in find_key_words(piece))
        text += piece
    return Spans(text, tuple(steps), tuple(words), question_end=len(question.strip()))
