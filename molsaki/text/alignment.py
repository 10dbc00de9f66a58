"""Finds the tokens of each step and key word, those whose characters overlap it, by the tokenizer's offsets."""

from __future__ import annotations

import dataclasses
import itertools
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from molsaki.text.conversations import Turn
from molsaki.text.frames import RATIONALE_MARK, THINKING_MARK, name_of
from molsaki.text.segment import segment
from molsaki.text.spans import Span, Spans, check_str
from molsaki.text.templates import render
from molsaki_kernels.plan import StepPlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One text under one tokenizer and template.

    Attributes:
        input_ids: T token ids.
        steps: the ``(start, stop)`` token range of each step of the spans, disjoint and ascending; empty where the
            step has no token. Template and special tokens are in no step, except those that a chat template puts within
            a step, as between a trace and the reply.
        words: the token indices of each key word of the spans, ascending; empty where the word has no token.
        target_start: index of the first token of the rationale, or of the space before it if that is a separate token:
            ``input_ids[:target_start]`` is the result of :func:`prompt`. T if no token of the rationale fits.
    """

    input_ids: list[int]
    steps: list[Span]
    words: list[list[int]]
    target_start: int


def encode(
    spans: Spans, tokenizer: PreTrainedTokenizerBase, *, template: str = "plain", max_length: int | None = None
) -> Encoded:
    """Tokenize a text and map its steps and key words to tokens: the rows and columns of MoLSAKI's Eq. 2 and 3.

    A token belongs to the step of its first non-space character (of its first character if there is none), and to the
    first key word that its characters overlap. With every tokenizer, template and ``max_length`` there are as many
    steps and words as in the spans.

    Args:
        spans: the text.
        tokenizer: one that gives character offsets (``tokenizer.is_fast``).
        template: ``"plain"``, ``"chat"`` or a format string, see `molsaki.text.templates`.
        max_length: the most tokens to keep. The text is cut on the right, before the special tokens that end it. A
            step past the cut becomes shorter or empty, a key word empty. To cut at the same place for two tokenizers,
            call :func:`molsaki.fit` first.

    Raises:
        TypeError, ValueError: an argument is not as described, the tokenizer has no offsets or its offsets leave out
            characters, or the template changes the texts; the message names the argument.
    """
    rendered = render(spans, tokenizer, template)
    tokens = tokenize(rendered.text, tokenizer, rendered.special_tokens)
    total = len(tokens.ids)
    length = total if max_length is None else min(total, checked_length(max_length))
    specials = sum(tokens.special)
    if length < specials:
        raise ValueError(f"max_length: expected at least {specials}, the special tokens of a text, got {max_length}")
    body = length - tokens.num_closing
    steps, words = token_ranges(tokens, rendered.steps, rendered.words, body)
    return Encoded(
        input_ids=tokens.ids[:body] + tokens.ids[total - tokens.num_closing :],
        steps=steps,
        words=words,
        target_start=next((t for t in range(body) if tokens.is_at_or_after(t, rendered.target)), length),
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


def prompt(
    question: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "plain",
    thinking: bool = False,
    context: Sequence[Turn] = (),
) -> list[int]:
    """The token ids after which a rationale is generated: the template up to it, without a space at the end.

    They are the first ``target_start`` ids of :func:`encode` for any rationale, unless a token spans the boundary.
    Arguments and errors as in :func:`encode`.

    Args:
        thinking: whether the rationale begins with ``<think>``: some chat templates put an empty trace before others.
        context: the turns before the question, each a role and a text.
    """
    check_str("question", question)
    spans = segment(question, THINKING_MARK if thinking else RATIONALE_MARK, key=(), context=context)
    rendered = render(spans, tokenizer, template)
    tokens = tokenize(rendered.text[: rendered.target], tokenizer, rendered.special_tokens)
    return tokens.ids[: len(tokens.ids) - tokens.num_closing]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of a text, with the characters that each of them covers."""

    ids: list[int]
    offsets: list[Span]
    heads: list[int]  # the first non-space character of each token, or its first character
    special: list[int]  # 1 where the tokenizer added the token
    num_closing: int  # special tokens that end the text

    def is_at_or_after(self, token: int, character: int) -> bool:
        return not self.special[token] and self.heads[token] >= character


def checked_length(max_length: int) -> int:
    """``max_length`` if it is an int of at least 1, else an error that names it."""
    if not isinstance(max_length, int) or isinstance(max_length, bool):
        raise TypeError(f"max_length: expected an int or None, got {max_length!r}")
    if max_length < 1:
        raise ValueError(f"max_length: expected at least 1, got {max_length}")
    return max_length


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase, special_tokens: bool) -> Tokens:
    """Tokenize a text, and refuse a tokenizer whose offsets leave out visible characters of it."""
    output = tokenizer(
        text,
        add_special_tokens=special_tokens,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    special, offsets = output["special_tokens_mask"], output["offset_mapping"]
    _check_offsets(text, offsets, tokenizer)
    heads = [next((i for i in range(*span) if not text[i].isspace()), span[0]) for span in offsets]
    if special and all(special):  # an empty text: tokenize another one to see which special tokens end it
        num_closing = tokenize("0", tokenizer, special_tokens).num_closing
    else:
        num_closing = sum(1 for _ in itertools.takewhile(bool, reversed(special)))
    return Tokens(output["input_ids"], offsets, heads, special, num_closing)


def token_ranges(tokens: Tokens, steps: list[Span], words: list[Span], body: int) -> tuple[list[Span], list[list[int]]]:
    """The token range of each step, and the tokens of each word, among the first ``body`` tokens; as in `Encoded`."""
    return _steps(tokens, steps, body), _words(tokens, words, body)


def _check_offsets(text: str, offsets: list[Span], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse offsets that leave out visible characters (normalizers may drop control characters and bare accents)."""
    covered = bytearray(len(text))
    for start, stop in offsets:
        covered[start:stop] = b"\1" * (stop - start)
    i = covered.find(0)
    while i >= 0:
        if unicodedata.category(text[i])[0] not in "CMZ":
            raise ValueError(
                f"tokenizer: {name_of(tokenizer)} gives no token for {text[i]!r} at character {i} of {text[:80]!r}: "
                "its offsets do not cover the text, so steps and words cannot be found"
            )
        i = covered.find(0, i + 1)


def _steps(tokens: Tokens, spans: list[Span], body: int) -> list[Span]:
    """The token range of each step among the first ``body`` tokens."""
    stops = [stop for _, stop in spans]
    found: dict[int, Span] = {}
    s = 0
    for t, ((start, stop), head) in enumerate(zip(tokens.offsets[:body], tokens.heads, strict=False)):
        s = max(s, bisect_right(stops, head))
        if start < stop and s < len(spans) and spans[s][0] <= head:
            found[s] = found.get(s, (t, t))[0], t + 1
    ranges, end = [], 0
    for s in range(len(spans)):
        ranges.append(found.get(s, (end, end)))
        end = ranges[-1][1]
    return ranges


def _words(tokens: Tokens, spans: list[Span], body: int) -> list[list[int]]:
    """The tokens of each word among the first ``body`` tokens."""
    stops = [stop for _, stop in spans]
    words: list[list[int]] = [[] for _ in spans]
    for t, (start, stop) in enumerate(tokens.offsets[:body]):
        w = bisect_right(stops, start)
        if start < stop and w < len(spans) and spans[w][0] < stop:
            words[w].append(t)
    return words
