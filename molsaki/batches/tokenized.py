"""Turns examples into token ids with the steps and key words of the map.

Every example gives two texts for the student, one per task of distilling step by step (Hsieh et al. 2023): *explain*
(question, rationale, end token), whose map is compared with the teacher's, and *predict* (question, answer, end token).
The labels are the rationale or the answer, and the end token.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from molsaki.config import TextOptions
from molsaki.text.alignment import Encoded, encode, prompt
from molsaki.text.examples import Example
from molsaki.text.fitting import TooLong, fit
from molsaki.text.segment import segment
from molsaki.text.spans import Spans
from molsaki.text.thinking import NOT_CLOSED, UNBALANCED, state_of


def spans_of(example: Example, options: TextOptions) -> Spans:
    """The steps and key words of one example's question and rationale."""
    return segment(
        example.question,
        example.rationale,
        options.key,
        options.splitter,
        options.number_words,
        example.keywords or (),
        key_of=options.key_of,
        key_occurrence=options.key_occurrence,
        max_key_words=options.max_key_words,
        key_spans=example.key_spans or ((), ()),
        context=example.context,
    )


def predict_prompt(
    example: Example, tokenizer: PreTrainedTokenizerBase, template: str, predict_template: str
) -> list[int]:
    """The token ids after which the answer is generated."""
    question, template = predict_task(example, template, predict_template)
    return prompt(question, tokenizer, template=template, context=example.context)


def predict_task(example: Example, template: str, predict_template: str) -> tuple[str, str]:
    """The question of the predict text, and its template, in which the answer is encoded like a rationale."""
    head, found, tail = predict_template.partition("{answer}")
    if not found or "{question}" not in head or (tail and template == "chat"):
        raise ValueError(
            f"predict_template: expected a text with {{question}} and then {{answer}}, got {predict_template!r}"
        )
    if template == "chat":
        return head.replace("{question}", example.question), "chat"
    return example.question, head + "{rationale}" + tail


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
    """How texts are tokenized for one model: tokenizer, template, longest text in tokens (None: no limit)."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    max_length: int | None

    @property
    def room(self) -> int | None:
        """The longest text without its end token."""
        return self.max_length and self.max_length - 1


class LeftOut(ValueError):
    """The example cannot be used. The message is the reason, by which examples are counted."""


def all_left_out(skipped: collections.Counter[str]) -> str:
    """The error message if no example can be used."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    return f"all {skipped.total()} examples were left out: {reasons}"


def list_left_out(left_out: Mapping[str, Sequence[str]]) -> str:
    """The examples that were left out, by reason: their number and the first ids."""
    lists = {reason: ", ".join(ids[:5]) + ", ..." * (len(ids) > 5) for reason, ids in left_out.items()}
    return "; ".join(f"{len(left_out[reason])} left out: {reason} ({ids})" for reason, ids in lists.items())


@contextlib.contextmanager
def left_out_if_refused() -> Iterator[None]:
    """Turns an error about one example's text into `LeftOut` with that cause; templates have been checked before."""
    try:
        yield
    except LeftOut:
        raise
    except ValueError as error:
        raise LeftOut("the template or the tokenizer refuses its text") from error


def check_traces(rationale: str) -> None:
    """Raise `LeftOut` if the thinking traces of a rationale are incomplete."""
    state = state_of(rationale)
    if state not in ("none", "whole"):
        raise LeftOut(NOT_CLOSED if state == "not closed" else UNBALANCED)


def cut(example: Example, options: TextOptions, specs: Sequence[TokenizerSpec]) -> tuple[Spans, list[Encoded], bool]:
    """An example's spans, its tokens for each of ``specs``, and True if the text had to be truncated.

    Raises:
        LeftOut: the rationale is missing, has an incomplete thinking trace, or is wrong (with ``options.drop_wrong``),
            the example is too long for one of ``specs``, or a template or tokenizer refuses its text.
    """
    if not example.rationale.strip():
        raise LeftOut("no rationale")
    if options.drop_wrong and not example.is_right:
        raise LeftOut("wrong answer")
    check_traces(example.rationale)
    whole = spans_of(example, options)
    with left_out_if_refused():
        encoded = [encode(whole, spec.tokenizer, template=spec.template) for spec in specs]
    if all(spec.room is None or len(e.input_ids) <= spec.room for spec, e in zip(specs, encoded, strict=True)):
        return whole, encoded, False
    with left_out_if_refused():
        try:
            spans = fit(whole, *((spec.tokenizer, spec.template, spec.room) for spec in specs))
        except TooLong:
            raise LeftOut("question, with earlier turns, or thinking trace longer than max_length") from None
    if options.too_long == "skip":
        raise LeftOut("text longer than max_length")
    with left_out_if_refused():
        return spans, [encode(spans, spec.tokenizer, template=spec.template) for spec in specs], True


@dataclasses.dataclass(frozen=True)
class TokenizedText:
    """Token ids ``(M,)`` int32, whose labels are those from ``target_start`` on, with the map's steps and words."""

    input_ids: np.ndarray[Any, np.dtype[np.int32]]
    target_start: int
    steps: list[tuple[int, int]]
    words: list[list[int]]

    @classmethod
    def from_encoded(cls, encoded: Encoded, end: int, is_cut: bool = False) -> TokenizedText:
        """Up to the first end token after the text, which is added if there is none; a truncated text gets none."""
        ids, body = encoded.input_ids, max(stop for _, stop in encoded.steps)
        if is_cut:
            ids = ids[:body]
        else:
            ids = ids[: ids.index(end, body) + 1] if end in ids[body:] else ids + [end]
        return cls(np.array(ids, np.int32), encoded.target_start, encoded.steps, encoded.words)


@dataclasses.dataclass(frozen=True)
class TokenizedExample:
    """Both texts of one example for the student, and ``explain`` in the teacher's tokens if the teacher runs live."""

    id: str
    spans: Spans
    explain: TokenizedText
    predict: TokenizedText
    teacher: TokenizedText | None


@dataclasses.dataclass(frozen=True)
class Tokenization:
    """Tokenizes examples.

    Attributes:
        options: how texts are read.
        student, teacher: the tokenizers of both sides.
        predict_template: of the predict text, question and answer.
        cot_template: if given, the predict text is the question and, by this template, rationale and answer.
    """

    options: TextOptions
    student: TokenizerSpec
    teacher: TokenizerSpec | None
    predict_template: str
    cot_template: str | None = None

    def __call__(self, example: Example) -> TokenizedExample:
        """Raises `LeftOut` as `cut` does, also for the predict text."""
        student, teacher = self.student, self.teacher
        spans, encoded, is_cut = cut(example, self.options, [student] if teacher is None else [student, teacher])
        end = student.tokenizer.eos_token_id
        if self.cot_template is None:
            reply = example.answer
            question, template = predict_task(example, student.template, self.predict_template)
        else:
            question, template = example.question, student.template
            parts = {"{rationale}": example.rationale, "{answer}": example.answer}
            reply = re.sub(r"\{(rationale|answer)\}", lambda match: parts[match[0]], self.cot_template)
        with left_out_if_refused():
            predict = encode(
                segment(question, reply, key=(), context=example.context), student.tokenizer, template=template
            )
        tokenized = TokenizedExample(
            example.id,
            spans,
            TokenizedText.from_encoded(encoded[0], end, is_cut),
            TokenizedText.from_encoded(predict, end),
            None if teacher is None else TokenizedText.from_encoded(encoded[1], teacher.tokenizer.eos_token_id, is_cut),
        )
        if student.max_length is not None and len(tokenized.predict.input_ids) > student.max_length:
            raise LeftOut("answer task longer than max_length")
        return tokenized

    def describe_labels(self, example: TokenizedExample) -> str:
        """A description of the labels of an example's two texts: the end of the masked part, and the labels."""
        tokenizer, lines = self.student.tokenizer, []
        for name, text in (("explain", example.explain), ("predict", example.predict)):
            masked, taught = text.input_ids[: text.target_start], text.input_ids[text.target_start :]
            shown = [str(tokenizer.decode(part.tolist())) for part in (masked, taught)]
            lines.append(
                f"{name}: {len(masked)} tokens masked, {_shortened(shown[0], 0, 60)!r}; {len(taught)} taught, "
                f"{_shortened(shown[1], 60, 40)!r}"
            )
        return f"labels of example {example.id}: " + "; ".join(lines)


def _shortened(text: str, first: int, last: int) -> str:
    if len(text) <= first + last + 5:
        return text
    return f"{text[:first]} ... {text[-last:]}" if first else f"... {text[-last:]}"
