"""JSON lines to :class:`Example`, examples to token ids and plans, and those to batches.

Every example is two texts for the student, the two tasks of distilling step by step: *explain* (question, rationale,
end token; the map lies on this one) and *predict* (question, answer, end token). Labels lie on the rationale or the
answer and the end token.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from molsaki.answers import same_answer
from molsaki.config import PREDICT_TEMPLATE, TextOptions
from molsaki.segment import Spans, segment
from molsaki.store import Entry, Store, fingerprint_spans
from molsaki.tokens import Encoded, TooLong, encode, fit, prompt
from molsaki_kernels import StepPlan

IGNORE = -100  # the label of a token that is not predicted


@dataclasses.dataclass(frozen=True)
class Example:
    """One question with its rationale and answer.

    ``answer`` is the gold answer where the data has one. ``is_right`` is False where the data has, besides, another
    answer that the rationale ended in.
    """

    id: str
    question: str
    rationale: str
    answer: str
    keywords: tuple[str, ...] | None = None
    choices: tuple[str, ...] | None = None
    is_right: bool = True
    task: str | None = None


def read_examples(path: str | Path, rationale: bool = True) -> list[Example]:
    """Read JSON lines: ``question``, ``answer`` or ``gold``, ``rationale``, maybe ``id, keywords, choices, task``.

    Numbers are taken as answers too. Blank lines are left out. A missing ``id`` becomes the line's number.

    Args:
        rationale: whether a line without a ``rationale`` is an error; an empty one never is (see :func:`prepare`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError, TypeError: the file is empty, a line is not a JSON object, a field is missing, blank or of the
            wrong type, or an id is there twice; the message names the file, the line and the field.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    examples, lines = [], {}
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not valid JSON: {error.msg} at character {error.pos + 1}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
            example = _example(row, where, str(number), rationale)
            if example.id in lines:
                raise ValueError(f"{where}: id {example.id!r} is line {lines[example.id]}'s already")
            lines[example.id] = number
            examples.append(example)
    if not examples:
        raise ValueError(f"{path}: holds no examples")
    return examples


def _example(row: dict, where: str, default_id: str, rationale: bool) -> Example:
    has_both = row.get("gold") is not None and "answer" in row
    return Example(
        id=_text(row, "id", where, default_id),
        question=_text(row, "question", where),
        rationale=_text(row, "rationale", where, None if rationale and "rationale" not in row else ""),
        answer=_text(row, "answer" if row.get("gold") is None else "gold", where),
        keywords=_texts(row, "keywords", where),
        choices=_texts(row, "choices", where),
        is_right=not has_both or same_answer(_text(row, "answer", where, ""), _text(row, "gold", where)),
        task=_text(row, "task", where, "") or None,
    )


def _text(row: dict, field: str, where: str, default: str | None = None) -> str:
    """A field as text; ``default`` for a missing, null or blank one, which without it is an error."""
    value = row.get(field)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{where}: {field}: expected a text, got {type(value).__name__}")
    if value is not None and value.strip():
        return value
    if default is None:
        raise ValueError(f"{where}: {field}: " + ("missing" if value is None else "expected a text, got a blank one"))
    return default


def _texts(row: dict, field: str, where: str) -> tuple[str, ...] | None:
    value = row.get(field)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
        raise TypeError(f"{where}: {field}: expected a list of texts that are not blank, got {value!r}")
    return tuple(value)


def spans_of(example: Example, options: TextOptions) -> Spans:
    """The steps and key words of one example's question and rationale."""
    key = "numbers" if options.key == "numbers" else example.keywords or ()
    return segment(example.question, example.rationale, key, options.splitter, options.number_words)


def encode_predict(example: Example, tokenizer, template: str, predict_template: str) -> Encoded:
    """The tokens of the answer task; ``target_start`` is the answer's."""
    question, template = _predict_task(example, template, predict_template)
    return encode(segment(question, example.answer, key=()), tokenizer, template=template)


def predict_prompt(example: Example, tokenizer, template: str, predict_template: str) -> list[int]:
    """The token ids after which the answer is generated."""
    question, template = _predict_task(example, template, predict_template)
    return prompt(question, tokenizer, template=template)


def _predict_task(example: Example, template: str, predict_template: str) -> tuple[str, str]:
    head, found, tail = predict_template.partition("{answer}")
    if not found or "{question}" not in head or (tail and template == "chat"):
        raise ValueError(
            f"predict_template: expected a text with {{question}} and then {{answer}}, got {predict_template!r}"
        )
    if template == "chat":
        return head.replace("{question}", example.question), "chat"
    return example.question, head + "{rationale}" + tail


@dataclasses.dataclass(frozen=True)
class Side:
    """What cuts texts for one model: its tokenizer, its template and the most tokens it takes (None: no limit)."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    max_length: int | None

    @property
    def room(self) -> int | None:
        """The most tokens of a text: one is kept for the end token."""
        return self.max_length and self.max_length - 1


class LeftOut(ValueError):
    """An example that cannot be used; the message is the reason, short enough to be counted by."""


def cut(example: Example, options: TextOptions, sides: Sequence[Side]) -> tuple[Spans, list[Encoded], bool]:
    """An example's spans, its tokens on each side, and whether its end had to be cut off.

    Raises:
        LeftOut: it has no rationale or a wrong one (``options.drop_wrong``), or is too long for a side.
    """
    if not example.rationale.strip():
        raise LeftOut("no rationale")
    if options.drop_wrong and not example.is_right:
        raise LeftOut("wrong answer")
    whole = spans_of(example, options)
    try:
        spans = fit(whole, *((side.tokenizer, side.template, side.room) for side in sides))
    except TooLong:
        raise LeftOut("question longer than max_length") from None
    if spans != whole and options.too_long == "skip":
        raise LeftOut("text longer than max_length")
    return spans, [encode(spans, side.tokenizer, template=side.template) for side in sides], spans != whole


@dataclasses.dataclass(frozen=True)
class Text:
    """Token ids as int32, ended with the end token; labels lie on those from ``target_start`` on."""

    input_ids: np.ndarray
    target_start: int
    steps: list[tuple[int, int]]
    words: list[list[int]]

    @classmethod
    def of(cls, encoded: Encoded, end: int, is_cut: bool = False) -> Text:
        """Up to the first end token after the text, which is added if there is none; without one if cut off."""
        ids, body = encoded.input_ids, max(stop for _, stop in encoded.steps)
        if is_cut:
            ids = ids[:body]
        else:
            ids = ids[: ids.index(end, body) + 1] if end in ids[body:] else ids + [end]
        return cls(np.array(ids, np.int32), encoded.target_start, encoded.steps, encoded.words)


@dataclasses.dataclass(frozen=True)
class Row:
    """One example, tokenized: both tasks of the student, and ``explain`` for the teacher where it runs live."""

    id: str
    spans: Spans
    explain: Text
    predict: Text
    teacher: Text | None


class DistillDataset(Dataset):
    """Tokenized examples, with the teacher's stored maps where there is a store. Picklable.

    Attributes:
        rows: the examples that are used.
        skipped: how many were left out, by reason.
        without_words: how many of ``rows`` have no key word: they train the two tasks, but have no map.
    """

    def __init__(self, rows: list[Row], skipped: collections.Counter, store: Store | None = None):
        self.rows = rows
        self.skipped = skipped
        self.without_words = sum(not row.explain.words for row in rows)
        self.store = store

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Row, Entry | None]:
        row = self.rows[index]
        return row, None if self.store is None else self.store[row.id]

    def summary(self) -> str:
        """One line: examples used, without key words, left out and why."""
        parts = [f"{len(self)} examples", f"{self.without_words} without key words"]
        return ", ".join(parts + [f"{count} left out: {reason}" for reason, count in self.skipped.items()])


def prepare(
    examples: Sequence[Example],
    options: TextOptions,
    student: Side,
    teacher: Side | None = None,
    predict_template: str = PREDICT_TEMPLATE,
    store: Store | None = None,
) -> DistillDataset:
    """Tokenize examples for both tasks of the student and for the teacher.

    Examples without key words are kept and counted. Left out and counted are those without a rationale, those too long
    for a side (unless ``options.too_long == "cut"``) and, if ``options.drop_wrong``, those with a wrong rationale.

    Args:
        teacher: needed for a live teacher, and with ``too_long="cut"``.
        store: the teacher's stored maps.

    Raises:
        ValueError: every example is left out, the store is of other texts, or a template or tokenizer cannot be used.
    """
    skipped = collections.Counter()
    sides = [student] if teacher is None else [student, teacher]
    end = student.tokenizer.eos_token_id
    rows = []
    for example in tqdm(examples, desc="tokenize", unit="example", leave=False, delay=2):
        try:
            spans, encoded, is_cut = cut(example, options, sides)
            predict = Text.of(encode_predict(example, student.tokenizer, student.template, predict_template), end)
            if student.max_length is not None and len(predict.input_ids) > student.max_length:
                raise LeftOut("answer task longer than max_length")
            if store is not None:
                _check_stored(store, example.id, spans)
        except LeftOut as reason:
            skipped[str(reason)] += 1
            continue
        taught = None if teacher is None else Text.of(encoded[1], teacher.tokenizer.eos_token_id, is_cut)
        rows.append(Row(example.id, spans, Text.of(encoded[0], end, is_cut), predict, taught))
    if not rows:
        raise ValueError(all_left_out(skipped))
    return DistillDataset(rows, skipped, store)


def all_left_out(skipped: collections.Counter) -> str:
    """The error message where no example can be used."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    return f"all {skipped.total()} examples were left out: {reasons}"


def _check_stored(store: Store, id: str, spans: Spans) -> None:
    if id not in store:
        raise ValueError(f"{store.folder}: holds no example {id!r}; extract this data set too")
    entry = store[id]
    if entry.text != fingerprint_spans(spans):
        raise ValueError(
            f"{store.folder}: example {id!r} has another text, other steps or other key words there: fingerprint "
            f"{entry.text}, expected {fingerprint_spans(spans)}; extract again, or use the same data and options"
        )
    if entry.maps is None:
        raise LeftOut(f"{entry.reason} (in the store)")


@dataclasses.dataclass(frozen=True)
class Collator:
    """Rows to a batch: a dict of right-padded tensors.

    ``explain``, ``predict`` and, with a live teacher, ``teacher`` are dicts of ``input_ids, attention_mask, labels
    (N, M)`` and ``positions (P,)``, where logits are needed: position p predicts the label at p + 1. ``teacher`` has
    its own ``plan``. ``plan`` is the student's, over ``explain``. With a store there are ``teacher_map (N, K, S, W)``
    and ``teacher_weights (N, K, Lt)`` or, if it holds all layers, ``teacher_layers (N, Lt, S, W)``. ``ids`` are the
    examples' names.
    """

    student_pad: int
    teacher_pad: int | None = None

    def __call__(self, items: Sequence[tuple[Row, Entry | None]]) -> dict:
        rows, stored = zip(*items, strict=True)
        batch = {
            "explain": _task([row.explain for row in rows], self.student_pad),
            "predict": _task([row.predict for row in rows], self.student_pad),
            "plan": _plan([row.explain for row in rows]),
            "ids": [row.id for row in rows],
        }
        if stored[0] is not None:
            maps = _pad_maps([entry.maps for entry in stored])
            if stored[0].weights is None:
                batch["teacher_layers"] = maps
            else:
                batch |= {"teacher_map": maps, "teacher_weights": torch.stack([entry.weights for entry in stored])}
        elif rows[0].teacher is not None:
            texts = [row.teacher for row in rows]
            batch["teacher"] = _task(texts, self.teacher_pad) | {"plan": _plan(texts)}
        return batch


def _plan(texts: Sequence[Text]) -> StepPlan:
    return StepPlan.from_spans([text.steps for text in texts], [text.words for text in texts])


def _task(texts: Sequence[Text], pad: int) -> dict[str, Tensor]:
    lengths = torch.tensor([len(text.input_ids) for text in texts])
    input_ids = torch.full((len(texts), int(lengths.max())), pad)
    for n, text in enumerate(texts):
        input_ids[n, : lengths[n]] = torch.from_numpy(text.input_ids)
    column = torch.arange(input_ids.shape[1])
    mask = column < lengths[:, None]
    starts = torch.tensor([[text.target_start] for text in texts])
    labels = input_ids.masked_fill(~mask | (column < starts), IGNORE)
    positions = (labels[:, 1:] != IGNORE).any(0).nonzero()[:, 0]
    return {"input_ids": input_ids, "attention_mask": mask.long(), "labels": labels, "positions": positions}


def _pad_maps(maps: Sequence[Tensor]) -> Tensor:
    """``(K, S_n, W_n)`` each to ``(N, K, S, W)``."""
    steps, words = max(m.shape[1] for m in maps), max(m.shape[2] for m in maps)
    return torch.stack([torch.nn.functional.pad(m, (0, words - m.shape[2], 0, steps - m.shape[1])) for m in maps])
