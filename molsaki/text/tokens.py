"""Spans and a tokenizer to token ranges: the characters of a step or key word become the tokens that overlap them.

A template may wrap the two texts, for each tokenizer its own; steps and key words stay those of the texts:

* ``"plain"``: the text itself, with the special tokens the tokenizer adds by default;
* ``"chat"``: the tokenizer's chat template, the question as the user's turn and the rationale as the assistant's;
* a format string with ``{question}`` and then ``{rationale}``, once each, as ``"Q: {question} A: {rationale}"``; the
  tokenizer adds its default special tokens.
"""

from __future__ import annotations

import dataclasses
import string
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

from jinja2 import TemplateError

from molsaki.text.segment import Span, Spans
from molsaki_kernels.plan import StepPlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TooLong(ValueError):
    """Not even the first word of the rationale fits within ``max_length`` tokens."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One text under one tokenizer and template.

    Attributes:
        input_ids: T token ids.
        steps: for each step of the spans its ``(start, stop)`` token range, disjoint and ascending; empty where no
            token is left to it. Template and special tokens are in no step.
        words: for each key word of the spans its token indices, ascending; empty where no token is left to it.
        target_start: index of the first token of the rationale, counting the space before it where that is a token
            by itself: ``input_ids[:target_start]`` is what :func:`prompt` gives. T if no token of the rationale fits.
    """

    input_ids: list[int]
    steps: list[Span]
    words: list[list[int]]
    target_start: int


def encode(
    spans: Spans, tokenizer: PreTrainedTokenizerBase, *, template: str = "plain", max_length: int | None = None
) -> Encoded:
    """Tokenize a text and map its steps and key words to tokens, the rows and columns of MoLSAKI's Eq. 2 and 3.

    A token is in the step of its first character that is no white space (its first character, if all are), and in the
    first key word that its characters overlap. Every tokenizer, template and ``max_length`` gives as many steps and
    words as the spans have.

    Args:
        spans: the text.
        tokenizer: one that gives character offsets (``tokenizer.is_fast``).
        template: ``"plain"``, ``"chat"`` or a format string, see the module's head.
        max_length: the most tokens to keep. Cuts on the right, before the special tokens that end a text; what is
            past the cut leaves its step shorter and its word empty. To keep two tokenizers in step, :func:`fit` first.

    Raises:
        TypeError, ValueError: an argument is not as described, the tokenizer has no offsets or its offsets leave out
            characters, or the template changes the texts; the message names the argument.
    """
    layout = _lay_out(spans, tokenizer, template)
    tokens = _tokenize(layout.text, tokenizer, layout.special_tokens)
    total = len(tokens.ids)
    length = total if max_length is None else min(total, _checked_length(max_length))
    specials = sum(tokens.special)
    if length < specials:
        raise ValueError(f"max_length: expected at least {specials}, the special tokens of a text, got {max_length}")
    body = length - tokens.num_closing
    return Encoded(
        input_ids=tokens.ids[:body] + tokens.ids[total - tokens.num_closing :],
        steps=_steps(tokens, layout.steps, body),
        words=_words(tokens, layout.words, body),
        target_start=next((t for t in range(body) if tokens.is_at_or_after(t, layout.target)), length),
    )


def plan(
    spans: Spans | Iterable[Spans],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    *,
    template: str = "plain",
) -> StepPlan:
    """The :class:`~molsaki_kernels.StepPlan` of one text or of a batch of N, for right-padded or packed tokens.

    Its indices count in ``encode(...).input_ids``, which under the plain template are
    ``tokenizer(spans.text).input_ids``. Arguments and errors as in :func:`encode`.
    """
    batch = spans if isinstance(spans, Iterable) else [spans]
    encoded = [encode(s, tokenizer, template=template, max_length=max_length) for s in batch]
    return StepPlan.from_spans([e.steps for e in encoded], [e.words for e in encoded])


def fit(spans: Spans, *sides: tuple[PreTrainedTokenizerBase, str, int | None]) -> Spans:
    """Cut the rationale's end off until every side holds the whole text, so that no side has to cut.

    The cut is at white space where there is any and never inside a key word: a word is dropped on all sides or on none.

    Args:
        spans: the text.
        sides: a ``(tokenizer, template, max_length)`` each; None is no limit.

    Returns:
        The spans as they are if all fits, else those of the shorter text.

    Raises:
        TooLong: nothing of the rationale fits (the question is never cut).
        TypeError, ValueError: as in :func:`encode`.
    """
    _check_spans(spans)
    for i, side in enumerate(sides):
        if not isinstance(side, tuple) or len(side) != 3:
            raise TypeError(f"sides[{i}]: expected (tokenizer, template, max_length), got {side!r}")
    while True:
        end = min((_room(spans, *side) for side in sides), default=len(spans.text))
        if end == len(spans.text):
            return spans
        spans = _cut(spans, end)


def prompt(question: str, tokenizer: PreTrainedTokenizerBase, *, template: str = "plain") -> list[int]:
    """The token ids after which a rationale is generated: the template up to it, without a space at the end.

    They are the first ``target_start`` ids of :func:`encode` for any rationale, unless the tokenizer has a token that
    reaches across. Arguments and errors as in :func:`encode`.
    """
    if not isinstance(question, str):
        raise TypeError(f"question: expected a str, got {type(question).__name__}")
    _check_tokenizer(tokenizer)
    question = question.strip()
    frame = _frame(tokenizer, template)
    if template == "chat":
        _check_chat(tokenizer, frame, question, _RATIONALE)
    tokens = _tokenize((frame.before + question + frame.between).rstrip(" "), tokenizer, frame.special_tokens)
    return tokens.ids[: len(tokens.ids) - tokens.num_closing]


@dataclasses.dataclass(frozen=True)
class _Frame:
    """What a template puts around the question and the rationale."""

    before: str
    between: str
    after: str
    special_tokens: bool  # whether the tokenizer adds its own


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The text a tokenizer sees. All offsets are its characters."""

    text: str
    steps: list[Span]
    words: list[Span]
    rationale: int
    target: int  # the rationale's start, or that of the spaces before it
    special_tokens: bool


@dataclasses.dataclass(frozen=True)
class _Tokens:
    ids: list[int]
    offsets: list[Span]
    heads: list[int]  # the first character of each token that is no white space, or its first
    special: list[int]  # 1 where the tokenizer added the token
    num_closing: int  # special tokens that end the text

    def is_at_or_after(self, token: int, character: int) -> bool:
        return not self.special[token] and self.heads[token] >= character


_QUESTION, _RATIONALE = "molsakiquestion7d1c", "molsakirationale7d1c"  # stand in for the texts in a chat template


def _lay_out(spans: Spans, tokenizer: PreTrainedTokenizerBase, template: str) -> _Layout:
    _check_spans(spans)
    _check_tokenizer(tokenizer)
    frame = _frame(tokenizer, template)
    question_end, rationale_start = spans.question_end, spans.rationale_start
    if template == "plain":
        head, text = spans.text[:rationale_start], spans.text
        steps, words = list(spans.steps), list(spans.words)
    else:
        question, rationale = spans.question, spans.rationale
        head = frame.before + question + frame.between
        text = head + rationale + frame.after
        if template == "chat":
            _check_chat(tokenizer, frame, question, rationale)

        def place(span: Span) -> Span:
            start, stop = span
            if start < question_end:
                return start + len(frame.before), min(stop, question_end) + len(frame.before)
            return max(start, rationale_start) - rationale_start + len(head), stop - rationale_start + len(head)

        steps, words = [place(s) for s in spans.steps], [place(w) for w in spans.words]
    return _Layout(text, steps, words, len(head), len(head.rstrip(" ")), frame.special_tokens)


def _check_spans(spans: Spans) -> None:
    if not isinstance(spans, Spans):
        raise TypeError(f"spans: expected Spans (see molsaki.segment), got {type(spans).__name__}")


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    is_fast = getattr(tokenizer, "is_fast", None)
    if is_fast is None:
        raise TypeError(f"tokenizer: expected a transformers tokenizer, got {type(tokenizer).__name__}")
    if not is_fast:
        raise ValueError(
            f"tokenizer: {_name(tokenizer)} gives no character offsets (its is_fast is False); load one that the "
            "tokenizers library runs, e.g. with AutoTokenizer"
        )


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"{type(tokenizer).__name__} {tokenizer.name_or_path!r}"


def _checked_length(max_length: int) -> int:
    if not isinstance(max_length, int) or isinstance(max_length, bool):
        raise TypeError(f"max_length: expected an int or None, got {max_length!r}")
    if max_length < 1:
        raise ValueError(f"max_length: expected at least 1, got {max_length}")
    return max_length


def _frame(tokenizer: PreTrainedTokenizerBase, template: str) -> _Frame:
    if not isinstance(template, str):
        raise TypeError(f"template: expected a str, got {type(template).__name__}")
    if template == "plain":
        return _Frame("", " ", "", special_tokens=True)
    return _chat_frame(tokenizer) if template == "chat" else _format_frame(template)


def _format_frame(template: str) -> _Frame:
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
    return _Frame(before, between, after, special_tokens=True)


def _chat_frame(tokenizer: PreTrainedTokenizerBase) -> _Frame:
    text = _chat(tokenizer, _QUESTION, _RATIONALE)
    if text.count(_QUESTION) != 1 or text.count(_RATIONALE) != 1 or text.find(_QUESTION) > text.find(_RATIONALE):
        raise ValueError(
            f"template: the chat template of {_name(tokenizer)} does not show the question and then the rationale, "
            f"once each, unchanged: {text!r}"
        )
    before, rest = text.split(_QUESTION)
    between, after = rest.split(_RATIONALE)
    return _Frame(before, between, after, special_tokens=False)


def _chat(tokenizer: PreTrainedTokenizerBase, question: str, rationale: str) -> str:
    if not tokenizer.chat_template:
        raise ValueError(f'template: {_name(tokenizer)} has no chat template; use "plain" or a format string')
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": rationale}]
    try:
        return cast(str, tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError as error:
        raise ValueError(f"template: the chat template of {_name(tokenizer)} failed: {error}") from error


def _check_chat(tokenizer: PreTrainedTokenizerBase, frame: _Frame, question: str, rationale: str) -> None:
    if _chat(tokenizer, question, rationale) != frame.before + question + frame.between + rationale + frame.after:
        raise ValueError(
            f"template: the chat template of {_name(tokenizer)} changes the texts or what is around them, for the "
            f"question {question!r} and the rationale {rationale!r}"
        )


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase, special_tokens: bool) -> _Tokens:
    output = tokenizer(
        text,
        add_special_tokens=special_tokens,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    special, offsets = output["special_tokens_mask"], output["offset_mapping"]
    _check_offsets(text, offsets, tokenizer)
    num_closing = 0
    if special and all(special):  # an empty text: which of its special tokens end it shows on another
        num_closing = _tokenize("0", tokenizer, special_tokens).num_closing
    else:
        while special and special[-1 - num_closing]:
            num_closing += 1
    return _Tokens(output["input_ids"], offsets, [_head(text, *span) for span in offsets], special, num_closing)


def _head(text: str, start: int, stop: int) -> int:
    return next((i for i in range(start, stop) if not text[i].isspace()), start)


def _check_offsets(text: str, offsets: list[Span], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse offsets that leave out visible characters (normalizers may drop control characters and bare accents)."""
    covered = bytearray(len(text))
    for start, stop in offsets:
        covered[start:stop] = b"\1" * (stop - start)
    i = covered.find(0)
    while i >= 0:
        if unicodedata.category(text[i])[0] not in "CMZ":
            raise ValueError(
                f"tokenizer: {_name(tokenizer)} gives no token for {text[i]!r} at character {i} of {text[:80]!r}: its "
                "offsets do not cover the text, so steps and words cannot be found"
            )
        i = covered.find(0, i + 1)


def _steps(tokens: _Tokens, spans: list[Span], body: int) -> list[Span]:
    """The token range of each step among the first ``body`` tokens."""
    stops = [stop for _, stop in spans]
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    s = 0
    for t in range(body):
        start, stop = tokens.offsets[t]
        head = tokens.heads[t]
        s = max(s, bisect_right(stops, head))
        if start < stop and s < len(spans) and spans[s][0] <= head:
            first.setdefault(s, t)
            last[s] = t + 1
    ranges, end = [], 0
    for s in range(len(spans)):
        ranges.append((first.get(s, end), last.get(s, end)))
        end = ranges[-1][1]
    return ranges


def _words(tokens: _Tokens, spans: list[Span], body: int) -> list[list[int]]:
    """The tokens of each word among the first ``body`` tokens."""
    stops = [stop for _, stop in spans]
    words: list[list[int]] = [[] for _ in spans]
    for t, (start, stop) in enumerate(tokens.offsets[:body]):
        w = bisect_right(stops, start)
        if start < stop and w < len(spans) and spans[w][0] < stop:
            words[w].append(t)
    return words


def _room(spans: Spans, tokenizer: PreTrainedTokenizerBase, template: str, max_length: int | None) -> int:
    """How many characters of the text fit by the look of its tokens; less than all of them if not all do."""
    layout = _lay_out(spans, tokenizer, template)
    if max_length is None:
        return len(spans.text)
    tokens = _tokenize(layout.text, tokenizer, layout.special_tokens)
    excess = len(tokens.ids) - _checked_length(max_length)
    if excess <= 0:
        return len(spans.text)
    end = layout.rationale + len(spans.text) - spans.rationale_start
    rationale = [
        head for t, head in enumerate(tokens.heads) if tokens.is_at_or_after(t, layout.rationale) and head < end
    ]
    if excess >= len(rationale):
        raise TooLong(
            f"spans: nothing of the rationale fits: {len(tokens.ids)} tokens, {len(rationale)} of them the "
            f"rationale's, but max_length is {max_length}"
        )
    return rationale[-excess] - layout.rationale + spans.rationale_start


def _cut(spans: Spans, end: int) -> Spans:
    """The spans of the text up to ``end`` or a little less, so that neither a word nor a key word is halved."""
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
    return Spans(text[:stop], steps, tuple(w for w in spans.words if w[1] <= stop), spans.question_end)
