"""Templates: the text that a tokenizer gets for a question and its rationale, with its steps and key words.

A template wraps the two texts; each tokenizer has its own. Steps and key words remain those of the two texts:

* ``"plain"``: the text itself, with the special tokens the tokenizer adds by default;
* ``"chat"``: the tokenizer's chat template, the question as the user's turn, after the turns of its context, and the
  rationale as the assistant's. The template may change white space in the rationale. For a rationale with a thinking
  trace see `Traces`; a text that the template changes otherwise raises `TextChanged`;
* a format string with ``{question}`` and then ``{rationale}``, once each, as ``"Q: {question} A: {rationale}"``; the
  tokenizer adds its default special tokens.
"""

from __future__ import annotations

import dataclasses
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from molsaki.text.conversations import Turn
from molsaki.text.frames import (
    RATIONALE_MARK,
    THINKING_MARK,
    Frame,
    TextChanged,
    apply_chat,
    check_tokenizer,
    frame_of,
    name_of,
)
from molsaki.text.spans import Span, Spans, shown
from molsaki.text.thinking import CLOSE, OPEN, split_trace, state_of, tags_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class RenderedText:
    """A question and rationale under a template: the text to tokenize. All offsets are its characters."""

    text: str
    steps: list[Span]
    words: list[Span]
    rationale: int
    origins: Sequence[int]  # the characters of the spans' text that the text has from ``rationale`` on
    target: int  # the start of the rationale, or of the spaces before it
    special_tokens: bool


def render(spans: Spans, tokenizer: PreTrainedTokenizerBase, template: str) -> RenderedText:
    """Insert a text into a template; its steps and key words are shifted accordingly."""
    check_spans(spans)
    check_tokenizer(tokenizer)
    asked = spans.asked if template == "chat" else [("user", (0, spans.question_end))]
    frame = frame_of(tokenizer, template, [role for role, _ in asked])
    origins = range(spans.rationale_start, len(spans.text))
    if template == "plain":
        head, steps, words = spans.text[: spans.rationale_start], list(spans.steps), list(spans.words)
        return RenderedText(spans.text, steps, words, len(head), origins, len(head.rstrip(" ")), frame.special_tokens)
    pieces = [*(span for _, span in asked), (spans.rationale_start, len(spans.text))]
    head, shifts = "", []  # by how many characters each piece moves
    for joint, (start, stop) in zip(frame.joints, pieces, strict=False):
        head += joint
        shifts.append(len(head) - start)
        head += spans.text[start:stop]
    text = head + frame.after
    head = head[: len(head) - len(spans.rationale)]
    if template == "chat":
        turns = [(role, spans.text[start:stop]) for role, (start, stop) in asked]
        rendered = apply_chat(tokenizer, [*turns, ("assistant", spans.rationale)], merge_system=frame.merges_system)
        before = head[: len(head) - len(frame.between)]
        if state_of(spans.rationale) != "none":
            return _with_traces(spans, rendered, turns, tokenizer, frame, before, shifts)
        found = None if rendered == text else _find(spans, rendered, [pieces[-1]], before, frame)
        if found is not None:
            return _moved(spans, rendered, found, shifts)
        if rendered != text:
            raise _changed(spans, tokenizer)
    starts = [start for start, _ in pieces]

    def place(span: Span) -> Span:
        piece = max(bisect_right(starts, span[0]) - 1, 0)
        if span[1] > spans.rationale_start and span[0] < spans.rationale_start:  # the space before the rationale
            piece = len(pieces) - 1
        start, stop = pieces[piece]
        return max(span[0], start) + shifts[piece], min(span[1], stop) + shifts[piece]

    steps, words = [place(s) for s in spans.steps], [place(w) for w in spans.words]
    return RenderedText(text, steps, words, len(head), origins, len(head.rstrip(" ")), frame.special_tokens)


@dataclasses.dataclass(frozen=True)
class Traces:
    """How a chat template shows thinking traces; determined with placeholders, so it is the same for all examples.

    Attributes:
        form: ``"content"``: it shows the trace from the reply, with its tags or in its own form. ``"field"``: the
            message has a field for the trace (``reasoning_content``, ``thinking``), which the template shows in its own
            form. ``"prompt"``: it drops the trace, so the text is what the model generates: the reply after the
            generation prompt. None: none of these.
        opened: the generation prompt, with thinking enabled if the template has that option; None if there is none. If
            the text begins with it, everything after it is taught.
    """

    form: Literal["content", "field", "prompt"] | None
    opened: str | None
    has_tags: bool = True  # whether the form "content" shows the tags


def _traces_of(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], frame: Frame, before: str) -> Traces:
    """How a chat template shows the trace of a reply after these turns, whose text is ``before``."""

    def show(message: Mapping[str, str]) -> str:
        try:
            text = apply_chat(tokenizer, [*turns, {"role": "assistant", **message}], merge_system=frame.merges_system)
        except TextChanged:
            return ""
        return text[len(before) :] if text.startswith(before) and _TRACE_MARKS.search(text) else ""

    opened: str | None
    try:
        asked, opened = (apply_chat(tokenizer, turns, add, frame.merges_system, thinking=True) for add in (False, True))
        opened = None if opened == asked else opened
    except TextChanged:
        opened = None
    by_content, by_field = show({"content": THINKING_MARK}), show(_fields(RATIONALE_MARK, f"{RATIONALE_MARK}2"))
    if by_field and by_field != by_content:
        return Traces("field", opened)
    has_tags = re.search(rf"<think>\s*{RATIONALE_MARK}\s*</think>", by_content) is not None
    if by_content and by_content.count(CLOSE) == has_tags:
        return Traces("content", opened, has_tags)
    is_open = opened is not None and not opened.rstrip().endswith(CLOSE)
    return Traces("prompt" if is_open else None, opened)


_TRACE_MARKS = re.compile(f"{RATIONALE_MARK}(?!2).*{RATIONALE_MARK}2", re.DOTALL)


def _fields(trace: str, rest: str) -> dict[str, str]:
    """The message of a reply whose trace is in a field, under the names that templates read."""
    return {"content": rest, "reasoning_content": trace, "thinking": trace}


def _with_traces(
    spans: Spans,
    rendered: str,
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase,
    frame: Frame,
    before: str,
    shifts: Sequence[int],
) -> RenderedText:
    """The text of a rationale with thinking traces, in the form that `Traces` describes.

    Args:
        rendered: the template's text of the turns and the rationale.
        turns: up to the question.
        before: the text up to the question's end.
        shifts: by how many characters each turn moves.
    """
    start, end, rationale = spans.rationale_start, len(spans.text), spans.rationale
    traces, text, place = _traces_of(tokenizer, turns, frame, before), rendered, None
    form, opened = traces.form, traces.opened
    if form == "content" and rendered[len(before) :].count(CLOSE) == traces.has_tags * rationale.count(CLOSE):
        place = _find(spans, text, [(start, end)], before, frame)
        if place is None:
            ends = [start, *(start + at for tag in tags_of(rationale) for at in tag), end]
            place = _find(spans, text, list(zip(ends[::2], ends[1::2], strict=True)), before, frame)
        if place and opened and opened.rstrip().endswith(OPEN) and not text.startswith(opened):
            form = "prompt"  # the tag belongs to the prompt, followed by different white space
    if form == "field" and (trace := split_trace(rationale)) is not None:
        (first, last), rest = trace
        if rationale[first:last].strip() and rationale[rest:].strip():
            message = {"role": "assistant", **_fields(rationale[first:last], rationale[rest:])}
            text = apply_chat(tokenizer, [*turns, message], merge_system=frame.merges_system)
            place = _find(spans, text, [(start + first, start + last), (start + rest, end)], before, frame)
    if form == "prompt" and opened is not None and opened.startswith(before):
        is_open = opened.rstrip().endswith(OPEN)
        written = len(rationale) - len(rationale.lstrip().removeprefix(OPEN).lstrip()) if is_open else 0
        if not is_open or rationale.lstrip().startswith(OPEN):
            text = opened + rationale[written:] + frame.after
            shift = len(opened) - start - written
            place = {i: i + shift for i in range(start + written, end) if not spans.text[i].isspace()}
    if not place:
        raise _changed(spans, tokenizer)
    return _moved(spans, text, place, shifts, opened)


def _changed(spans: Spans, tokenizer: PreTrainedTokenizerBase) -> TextChanged:
    return TextChanged(
        f"template: the chat template of {name_of(tokenizer)} changes the texts or what is around them, for the "
        f"question {shown(spans.question)} and the rationale {shown(spans.rationale)}"
    )


def _find(spans: Spans, text: str, pieces: list[Span], before: str, frame: Frame) -> dict[int, int] | None:
    """The positions of the visible characters of pieces of the rationale in a text that begins with ``before``."""
    place = _place(pieces, spans.text, text[len(before) :], frame) if text.startswith(before) else None
    return None if place is None else {i: len(before) + at for i, at in place.items()}


def _moved(
    spans: Spans, text: str, place: dict[int, int], shifts: Sequence[int], opened: str | None = None
) -> RenderedText:
    """A text in which the visible characters of the rationale are at ``place``.

    Args:
        opened: the generation prompt: if the text begins with it, everything after it is taught.
    """
    start, ranges_asked = spans.rationale_start, [span for _, span in spans.asked]
    starts = [first for first, _ in ranges_asked]

    def move(ranges: Sequence[Span]) -> list[Span]:
        moved: list[Span] = []
        for a, b in ranges:
            if a < spans.question_end:
                turn = bisect_right(starts, a) - 1
                stop = ranges_asked[turn][1]
                moved.append((a + shifts[turn], min(b, stop) + shifts[turn]))
                continue
            found = [place[i] for i in range(max(a, start), b) if i in place]
            end = moved[-1][1] if moved else 0
            moved.append((found[0], found[-1] + 1) if found else (end, end))
        return moved

    first, last = min(place.values()), max(place.values())
    sources = {at: i for i, at in place.items()}
    origins = [0] * (last + 1 - first)
    for at in range(last, first - 1, -1):  # a character of the template counts as the one of the rationale after it
        origins[at - first] = sources.get(at, origins[min(at + 1, last) - first])
    target = len(text[:first].rstrip(" "))
    if opened is not None and text.startswith(opened):
        target = len(opened.rstrip(" "))
    return RenderedText(text, move(spans.steps), move(spans.words), first, origins, target, special_tokens=False)


def _place(pieces: list[Span], source: str, text: str, frame: Frame) -> dict[int, int] | None:
    """The positions in ``text`` of the visible characters of the pieces of ``source``, or None if they are not found.

    The last piece has to be at the end, before the template's closing text. The others have to be before it, in order
    and once each. A single piece, the whole rationale, has to follow a part of the text that always precedes it.
    """
    visible = [i for i, c in enumerate(text) if not c.isspace()]
    rest = "".join(text.split())
    after, between = ("".join(part.split()) for part in (frame.after, frame.between))
    if not rest.endswith(after):
        return None
    rest = rest[: len(rest) - len(after)]
    place: dict[int, int] = {}
    for start, stop in reversed(pieces):
        characters = [i for i in range(start, stop) if not source[i].isspace()]
        piece = "".join(source[i] for i in characters)
        at = rest.rfind(piece)
        if not piece:
            continue
        if at < 0 or (at + len(piece) < len(rest) if not place else rest.find(piece) < at):
            return None
        place |= dict(zip(characters, visible[at : at + len(piece)], strict=True))
        rest = rest[:at]
    return place if place and (len(pieces) > 1 or between.startswith(rest)) else None


def check_spans(spans: Spans) -> None:
    """Raise a TypeError unless ``spans`` are `Spans`."""
    if not isinstance(spans, Spans):
        raise TypeError(f"spans: expected Spans (see molsaki.segment), got {type(spans).__name__}")
