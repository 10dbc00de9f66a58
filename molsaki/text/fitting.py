"""Cuts a text so that it fits the token limits of several tokenizers at once, with the same steps and key words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from molsaki.text.alignment import checked_length, tokenize
from molsaki.text.spans import Spans
from molsaki.text.templates import check_spans, render
from molsaki.text.thinking import CLOSE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TooLong(ValueError):
    """Not even the first word of the rationale fits within ``max_length`` tokens."""


def fit(spans: Spans, *sides: tuple[PreTrainedTokenizerBase, str, int | None]) -> Spans:
    """Cut the end of the rationale until the whole text fits on every side, so that all sides are cut at the same
    place.

    The cut is at white space if there is any, and never inside a key word: a word is dropped on all sides or on none.

    Args:
        spans: the text.
        sides: one ``(tokenizer, template, max_length)`` per side; None is no limit.

    Returns:
        The same spans if the text fits, else the spans of the shorter text.

    Raises:
        TooLong: nothing of the rationale fits (the question is never cut).
        TypeError, ValueError: as in :func:`encode`.
    """
    check_spans(spans)
    for i, side in enumerate(sides):
        if not isinstance(side, tuple) or len(side) != 3:
            raise TypeError(f"sides[{i}]: expected (tokenizer, template, max_length), got {side!r}")
    while True:
        end = min((_room(spans, *side) for side in sides), default=len(spans.text))
        if end == len(spans.text):
            return spans
        spans = _cut(spans, end)


def _room(spans: Spans, tokenizer: PreTrainedTokenizerBase, template: str, max_length: int | None) -> int:
    """The number of characters whose tokens fit; fewer than all characters if not all tokens fit."""
    rendered = render(spans, tokenizer, template)
    if max_length is None:
        return len(spans.text)
    tokens = tokenize(rendered.text, tokenizer, rendered.special_tokens)
    excess = len(tokens.ids) - checked_length(max_length)
    if excess <= 0:
        return len(spans.text)
    end = rendered.rationale + len(rendered.origins)
    rationale = [x for t, x in enumerate(tokens.heads) if tokens.is_at_or_after(t, rendered.rationale) and x < end]
    if excess >= len(rationale):
        raise TooLong(
            f"spans: nothing of the rationale fits: {len(tokens.ids)} tokens, {len(rationale)} of them the "
            f"rationale's, but max_length is {max_length}"
        )
    cut = rendered.origins[rationale[-excess] - rendered.rationale]
    trace = spans.text.rfind(CLOSE, spans.rationale_start)
    if trace >= 0 and trace + len(CLOSE) > cut:
        raise TooLong(f"spans: the thinking trace is longer than max_length {max_length} allows, and is not cut")
    return cut


def _cut(spans: Spans, end: int) -> Spans:
    """The spans of the text up to ``end`` or slightly before, so that no word and no key word is split."""
    text, start = spans.text, spans.rationale_start
    stop = end
    while stop > start and not text[stop - 1].isspace() and not text[stop].isspace():
        stop -= 1
    stop = end if stop == start else stop
    stop = next((a for a, b in spans.words if a < stop < b), stop)
    stop = len(text[:stop].rstrip())
    if stop <= start:
        raise TooLong("spans: nothing of the rationale fits: its first word is longer than max_length allows")
    steps = tuple((a, min(b, stop)) for a, b in spans.steps if a < stop)
    words = tuple(w for w in spans.words if w[1] <= stop)
    return Spans(text[:stop], steps, words, spans.question_end, spans.turns)
