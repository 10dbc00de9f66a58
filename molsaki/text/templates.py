"""Templates: the text that a tokenizer sees of a question and its rationale, with the steps and key words in it.

A template wraps the two texts, for each tokenizer its own. Steps and key words stay those of the texts themselves:

* ``"plain"``: the text itself, with the special tokens the tokenizer adds by default;
* ``"chat"``: the tokenizer's chat template, the question as the user's turn and the rationale as the assistant's. The
  template may change white space in the rationale and where its ``<think>`` and ``</think>`` are, as those of
  reasoning models do; a text that it changes otherwise raises `TextChanged`;
* a format string with ``{question}`` and then ``{rationale}``, once each, as ``"Q: {question} A: {rationale}"``; the
  tokenizer adds its default special tokens.
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from jinja2 import TemplateError

from molsaki.text.spans import Span, Spans, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stand for the two texts in a chat template, and for a rationale with a thinking trace.
QUESTION_MARK, RATIONALE_MARK = "molsakiquestion7d1c", "molsakirationale7d1c"
THINKING_MARK = f"<think>\n{RATIONALE_MARK}\n</think>\n\n{RATIONALE_MARK}2"
_THINK_TAG = re.compile(r"</?think>")


class TextChanged(ValueError):
    """A chat template refuses the texts of one example, or changes them so that they cannot be found in its result."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """The text that a template puts before, between and after the question and the rationale."""

    before: str
    between: str
    after: str
    special_tokens: bool  # whether the tokenizer adds its own special tokens


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
    """Put a text into a template; its steps and key words move with it."""
    check_spans(spans)
    check_tokenizer(tokenizer)
    frame = frame_of(tokenizer, template)
    question_end, rationale_start = spans.question_end, spans.rationale_start
    if template == "plain":
        head, text = spans.text[:rationale_start], spans.text
        steps, words = list(spans.steps), list(spans.words)
    else:
        question, rationale = spans.question, spans.rationale
        head = frame.before + question + frame.between
        text = head + rationale + frame.after
        if template == "chat":
            changed = apply_chat(tokenizer, [question, rationale])
            if changed != text:
                return _moved(spans, changed, frame, tokenizer)

        def place(span: Span) -> Span:
            start, stop = span
            if start < question_end:
                return start + len(frame.before), min(stop, question_end) + len(frame.before)
            return max(start, rationale_start) - rationale_start + len(head), stop - rationale_start + len(head)

        steps, words = [place(s) for s in spans.steps], [place(w) for w in spans.words]
    origins = range(rationale_start, len(spans.text))
    return RenderedText(text, steps, words, len(head), origins, len(head.rstrip(" ")), frame.special_tokens)


def _moved(spans: Spans, text: str, frame: Frame, tokenizer: PreTrainedTokenizerBase) -> RenderedText:
    """The text that a chat template gives where it changes the rationale's white space or moves its thinking trace."""
    shift, start = len(frame.before), spans.rationale_start
    place = None
    if text.startswith(frame.before + spans.question):
        whole = (start, len(spans.text))
        place = _place([whole], spans.text, text[shift + spans.question_end :], frame)
        if place is None:
            tags = [match.span() for match in _THINK_TAG.finditer(spans.text, start)]
            ends = [start, *(end for tag in tags for end in tag), len(spans.text)]
            pieces = list(zip(ends[::2], ends[1::2], strict=True))
            place = _place(pieces, spans.text, text[shift + spans.question_end :], frame)
    if place is None:
        raise TextChanged(
            f"template: the chat template of {name_of(tokenizer)} changes the texts or what is around them, for the "
            f"question {shown(spans.question)} and the rationale {shown(spans.rationale)}"
        )
    place = {i: shift + spans.question_end + at for i, at in place.items()}
    moved: list[Span] = []
    for a, b in (*spans.steps, *spans.words):
        found = [place[i] for i in range(max(a, start), b) if i in place]
        end = moved[-1][1] if moved else 0
        moved.append((found[0], found[-1] + 1) if found else (end, end))
        if a < spans.question_end:
            moved[-1] = (a + shift, min(b, spans.question_end) + shift)
    first, last = min(place.values()), max(place.values())
    sources = {at: i for i, at in place.items()}
    origins = [0] * (last + 1 - first)
    for at in range(last, first - 1, -1):  # a character of the template counts as the one of the rationale after it
        origins[at - first] = sources.get(at, origins[min(at + 1, last) - first])
    target = len(text[:first].rstrip(" "))
    steps, words = moved[: len(spans.steps)], moved[len(spans.steps) :]
    return RenderedText(text, steps, words, first, origins, target, special_tokens=False)


def _place(pieces: list[Span], source: str, text: str, frame: Frame) -> dict[int, int] | None:
    """Where the visible characters of the pieces of ``source`` are in ``text``, or None if they are not found.

    The last piece has to be at the end, before what the template always has there. The others have to be before it, in
    their order, and once. One piece that is the whole rationale comes after a part of what is always before it.
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


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise an error unless ``tokenizer`` is a transformers tokenizer with character offsets."""
    is_fast = getattr(tokenizer, "is_fast", None)
    if is_fast is None:
        raise TypeError(f"tokenizer: expected a transformers tokenizer, got {type(tokenizer).__name__}")
    if not is_fast:
        raise ValueError(
            f"tokenizer: {name_of(tokenizer)} gives no character offsets (its is_fast is False); expected one that "
            "the tokenizers library runs, as AutoTokenizer loads"
        )


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """A tokenizer's class and path, for error messages."""
    return f"{type(tokenizer).__name__} {tokenizer.name_or_path!r}"


def frame_of(tokenizer: PreTrainedTokenizerBase, template: str) -> Frame:
    """The frame of a template; a chat template is run once on stand-ins for the two texts."""
    if not isinstance(template, str):
        raise TypeError(f"template: expected a str, got {type(template).__name__}")
    if template == "plain":
        return Frame("", " ", "", special_tokens=True)
    return _chat_frame(tokenizer) if template == "chat" else _format_frame(template)


def _format_frame(template: str) -> Frame:
    expected = 'template: expected "plain", "chat" or a format string with {question} and then {rationale}, once each'
    literals, fields = [""], []
    try:
        for literal, field, spec, conversion in string.Formatter().parse(template):
            literals[-1] += literal
            if field is not None:
                fields.append((field, spec, conversion))
                literals.append("")
    except ValueError as error:
        raise ValueError(f"{expected}, got {template!r} ({error})") from None
    if fields != [("question", "", None), ("rationale", "", None)]:
        raise ValueError(f"{expected}, got {template!r}")
    before, between, after = literals
    return Frame(before, between, after, special_tokens=True)


def _chat_frame(tokenizer: PreTrainedTokenizerBase) -> Frame:
    try:
        text = apply_chat(tokenizer, [QUESTION_MARK, RATIONALE_MARK])
    except TextChanged as error:
        raise ValueError(str(error)) from error  # no example can be used
    parts = re.split(f"({QUESTION_MARK}|{RATIONALE_MARK})", text)
    if parts[1::2] != [QUESTION_MARK, RATIONALE_MARK]:
        raise ValueError(
            f"template: the chat template of {name_of(tokenizer)} does not show the question and then the rationale, "
            f"once each, unchanged: {text!r}"
        )
    before, between, after = parts[::2]
    return Frame(before, between, after, special_tokens=False)


def apply_chat(tokenizer: PreTrainedTokenizerBase, turns: Sequence[str], add_generation_prompt: bool = False) -> str:
    """The text of a tokenizer's chat template for turns of user and assistant."""
    if not tokenizer.chat_template:
        raise ValueError(f'template: {name_of(tokenizer)} has no chat template; use "plain" or a format string')
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise TextChanged(f"template: the chat template of {name_of(tokenizer)} failed: {error}") from error
    return cast(str, text)
