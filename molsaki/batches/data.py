"""JSON lines to :class:`Example`, examples to token ids and plans, and those to batches.

Every example is two texts for the student, the two tasks of distilling step by step: *explain* (question, rationale,
end token; the map lies on this one) and *predict* (question, answer, end token). Labels lie on the rationale or the
answer and the end token.
"""

from __future__ import annotations

import codecs
import collections
import dataclasses
import json
import os
import pickle
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from molsaki.batches.shared_prefix import Branches
from molsaki.config import PREDICT_TEMPLATE, TextOptions
from molsaki.teacher.store import Entry, Store, fingerprint_spans, id_key
from molsaki.text.answers import same_answer
from molsaki.text.segment import Spans, segment
from molsaki.text.tokens import Encoded, TooLong, encode, fit, prompt
from molsaki_kernels import StepPlan

IGNORE = -100  # the label of a token that is not predicted
KEPT = 1 << 16  # tokenized examples that a data set keeps in memory, about 1 KB each


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


class Examples(Sequence[Example]):
    """Examples of JSON lines files, each read from the disk when it is asked for; 14 bytes an example are in memory.

    A slice is one too. What a file held at first is what counts: reading from one that has changed is an error.
    """

    def __init__(self, paths: Sequence[Path], files: np.ndarray, offsets: np.ndarray, lines: np.ndarray):
        self._paths, self._states = paths, [_state(path) for path in paths]
        self._files, self._offsets, self._lines = files, offsets, lines

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Examples(self._paths, self._files[index], self._offsets[index], self._lines[index])
        number = int(self._files[index])
        path = self._paths[number]
        with path.open("rb") as file:
            if _state(file.fileno()) != self._states[number]:
                raise ValueError(f"{path}: has changed since it was opened; run again")
            file.seek(self._offsets[index])
            return _example(json.loads(file.readline()), str(path), str(self._lines[index]), False)


def read_examples(path: str | Path | Sequence[str | Path], rationale: bool = True) -> Sequence[Example]:
    """Read JSON lines: ``question``, ``answer`` or ``gold``, ``rationale``, maybe ``id, keywords, choices, task``.

    Numbers are taken as answers too. Blank lines are left out. A missing ``id`` becomes the line's number. Every line
    is checked here, but none is kept in memory.

    Args:
        path: one file, or several whose ids differ.
        rationale: whether a line without a ``rationale`` is an error; an empty one never is (see :func:`prepare`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError, TypeError: the file is empty, a line is not a JSON object, a field is missing, blank or of the
            wrong type, or an id is there twice; the message names the file, the line and the field.
    """
    paths = [Path(one) for one in ([path] if isinstance(path, (str, Path)) else path)]
    files, offsets, lines, keys = array("h"), array("q"), array("i"), array("q")
    for number, one in enumerate(paths):
        if not one.is_file():
            raise FileNotFoundError(f"{one}: no such file")
        before = len(lines)
        with one.open("rb") as file:
            offset = 3 * (file.read(3) == codecs.BOM_UTF8)
            file.seek(offset)
            for line_number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{one}:{line_number}"
                    example = _example(_parse(line, where), where, str(line_number), rationale)
                    for column, value in (
                        (files, number), (offsets, offset), (lines, line_number), (keys, id_key(example.id)),
                    ):  # fmt: skip
                        column.append(value)
                offset += len(line)
        if len(lines) == before:
            raise ValueError(f"{one}: holds no examples")
    found = Examples(paths, np.array(files), np.array(offsets), np.array(lines))
    order = np.argsort(np.array(keys), kind="stable")
    repeated = np.flatnonzero(np.diff(np.array(keys)[order]) == 0)
    for at in repeated[order[repeated + 1].argsort()][:1]:
        first, second = order[at : at + 2]
        there = f"{lines[first]}" if files[first] == files[second] else f"{lines[first]} of {paths[files[first]]}"
        raise ValueError(f"{paths[files[second]]}:{lines[second]}: id {found[second].id!r} is line {there}'s already")
    return found


def _state(file: Path | int) -> tuple[int, int]:
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns


def _parse(line: bytes, where: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error.msg} at character {error.pos + 1}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not valid UTF-8: {error.reason} at byte {error.start + 1}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


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
    encoded = [encode(whole, side.tokenizer, template=side.template) for side in sides]
    if all(side.room is None or len(e.input_ids) <= side.room for side, e in zip(sides, encoded, strict=True)):
        return whole, encoded, False
    try:
        spans = fit(whole, *((side.tokenizer, side.template, side.room) for side in sides))
    except TooLong:
        raise LeftOut("question longer than max_length") from None
    if options.too_long == "skip":
        raise LeftOut("text longer than max_length")
    return spans, [encode(spans, side.tokenizer, template=side.template) for side in sides], True


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


@dataclasses.dataclass(frozen=True)
class Tokenizing:
    """How an example becomes a `Row`: the options, the sides, and the template of the answer task."""

    options: TextOptions
    student: Side
    teacher: Side | None
    predict_template: str

    def __call__(self, example: Example) -> Row:
        """Raises `LeftOut` as `cut` does, or if the answer task is too long."""
        student, teacher = self.student, self.teacher
        spans, encoded, is_cut = cut(example, self.options, [student] if teacher is None else [student, teacher])
        end = student.tokenizer.eos_token_id
        predict = encode_predict(example, student.tokenizer, student.template, self.predict_template)
        row = Row(
            example.id,
            spans,
            Text.of(encoded[0], end, is_cut),
            Text.of(predict, end),
            None if teacher is None else Text.of(encoded[1], teacher.tokenizer.eos_token_id, is_cut),
        )
        if student.max_length is not None and len(row.predict.input_ids) > student.max_length:
            raise LeftOut("answer task longer than max_length")
        return row


class Rows(Sequence[Row]):
    """Examples that are tokenized when they are asked for; the first `KEPT` are kept. Memory does not grow with more.

    Args:
        examples: as `read_examples` gives them.
        used: ``(N,)`` the numbers of those that are rows.
        tokenizing: what makes a row of one.
        kept: pickles of the first rows.
    """

    def __init__(self, examples: Sequence[Example], used: np.ndarray, tokenizing: Tokenizing, kept: list[bytes]):
        self._examples, self._used, self._tokenizing, self._kept = examples, used, tokenizing, kept

    def __len__(self) -> int:
        return len(self._used)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if index < len(self._kept):
            return pickle.loads(self._kept[index])
        return self._tokenizing(self._examples[int(self._used[index])])


class DistillDataset(Dataset):
    """Tokenized examples, with the teacher's stored maps where there is a store. Picklable.

    Attributes:
        rows: the examples that are used.
        skipped: how many were left out, by reason.
        without_words: how many of ``rows`` have no key word: they train the two tasks, but have no map.
    """

    def __init__(
        self, rows: Sequence[Row], skipped: collections.Counter, store: Store | None = None, without_words: int = 0
    ):
        self.rows = rows
        self.skipped = skipped
        self.without_words = without_words
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
    """Tokenize examples for both tasks of the student and for the teacher: once here, to check and count them all.

    Examples without key words are kept and counted. Left out and counted are those without a rationale, those too long
    for a side (unless ``options.too_long == "cut"``) and, if ``options.drop_wrong``, those with a wrong rationale.

    Args:
        teacher: needed for a live teacher, and with ``too_long="cut"``.
        store: the teacher's stored maps.

    Raises:
        ValueError: every example is left out, the store is of other texts, or a template or tokenizer cannot be used.
    """
    text_options = {field.name: getattr(options, field.name) for field in dataclasses.fields(TextOptions)}
    tokenizing = Tokenizing(TextOptions(**text_options), student, teacher, predict_template)
    skipped: collections.Counter[str] = collections.Counter()
    used, kept, without_words = array("i"), [], 0
    for number, example in enumerate(tqdm(examples, desc="tokenize", unit="example", leave=False, delay=2)):
        try:
            row = tokenizing(example)
            if store is not None:
                _check_stored(store, example.id, row.spans)
        except LeftOut as reason:
            skipped[str(reason)] += 1
            continue
        used.append(number)
        without_words += not row.explain.words
        if len(kept) < KEPT:
            kept.append(pickle.dumps(row))
    if not used:
        raise ValueError(all_left_out(skipped))
    return DistillDataset(Rows(examples, np.array(used), tokenizing, kept), skipped, store, without_words)


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
    """Rows to a batch: a dict of what :class:`molsaki.trainer.Distiller` takes.

    ``tasks`` is a list of texts to run in one forward of the student each: with ``packing`` one, of the N explain texts
    and then the N predict texts (of those only what the question does not say already, with ``share_question``), else
    two, explain and predict. A task of R texts is a dict of

    - ``input_ids, attention_mask``: ``(R, M)``, right-padded; packed ``(1, total)`` with ``position_ids``, which start
      anew in each text, and ``cu_seq_lens_q (R + 1,)`` int32, where the texts begin and end.
    - ``branches``, with ``share_question``: of each predict text only the tail is there, from the first token on that
      differs from its explain text's; its ``position_ids`` go on from there.
    - ``labels (R, P)``: each text's labels, -100 after the last; ``counts``: how many those are, R ints.
    - ``targets (n,)``: the labels, text after text; ``index (n,)``: where in the flattened ``input_ids`` each is
      predicted; for a label of predict that may be in the explain text.
    - ``plan`` of its R texts, for explain texts; with ``branches`` of the explain texts alone.

    ``plan`` is that of the N explain texts, ``ids`` are the examples' names. With a store there are ``teacher_map
    (N, K, S, W)`` and ``teacher_weights (N, K, Lt)`` or, if it holds all layers, ``teacher_layers (N, Lt, S, W)``; with
    a live teacher there is ``teacher``, a task of N texts of its own, with a plan.

    Args:
        student_pad, teacher_pad: ids of the padding tokens.
        packing, teacher_packing: pack the texts of a task into one row; without, they are padded.
        explain: whether the student runs the explain texts at all.
        share_question: of packed texts, run what an example's two begin with once, in batches where that is at least
            half of the predict texts' tokens.
    """

    student_pad: int
    teacher_pad: int | None = None
    packing: bool = False
    teacher_packing: bool = False
    explain: bool = True
    share_question: bool = False

    def __call__(self, items: Sequence[tuple[Row, Entry | None]]) -> dict:
        rows, stored = zip(*items, strict=True)
        explain, predict = [row.explain for row in rows], [row.predict for row in rows]
        plan = _plan(explain)
        shared = [_shared(row.explain, row.predict) for row in rows]
        if not self.explain:
            tasks = [_task(predict, self.student_pad, self.packing)]
        elif self.packing and self.share_question and 2 * sum(shared) >= sum(len(text.input_ids) for text in predict):
            tasks = [_branched_task(explain, predict, shared) | {"plan": plan}]
        elif self.packing:
            no_map = StepPlan.from_spans([[]] * len(rows), [[]] * len(rows))
            tasks = [_task(explain + predict, None, True) | {"plan": StepPlan.cat([plan, no_map])}]
        else:
            tasks = [_task(explain, self.student_pad) | {"plan": plan}, _task(predict, self.student_pad)]
        batch = {"tasks": tasks, "plan": plan, "ids": [row.id for row in rows]}
        if stored[0] is not None:
            maps = _pad_maps([entry.maps for entry in stored])
            if stored[0].weights is None:
                batch["teacher_layers"] = maps
            else:
                batch |= {"teacher_map": maps, "teacher_weights": torch.stack([entry.weights for entry in stored])}
        elif rows[0].teacher is not None:
            batch["teacher"] = teacher_task([row.teacher for row in rows], self.teacher_pad, self.teacher_packing)
        return batch


def teacher_task(texts: Sequence[Text], pad: int | None, packing: bool) -> dict:
    """A task of texts whose maps are wanted, see :class:`Collator`."""
    return _task(texts, pad, packing) | {"plan": _plan(texts)}


def _plan(texts: Sequence[Text]) -> StepPlan:
    return StepPlan.from_spans([text.steps for text in texts], [text.words for text in texts])


def _task(texts: Sequence[Text], pad: int | None, packing: bool = False) -> dict:
    if packing:
        task = _packed(texts, [0] * len(texts))
        return task | _labels(texts, _rows(texts))
    ids = [torch.from_numpy(text.input_ids).long() for text in texts]
    input_ids = pad_sequence(ids, batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(row) for row in ids])
    task = {"input_ids": input_ids, "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()}
    return task | _labels(texts, list(torch.arange(input_ids.numel()).view_as(input_ids)))


def _branched_task(explain: Sequence[Text], predict: Sequence[Text], prefixes: Sequence[int]) -> dict:
    """One row of all explain texts and then, of each predict text, what comes after its prefix."""
    task = _packed([*explain, *predict], [0] * len(explain) + list(prefixes))
    wholes, lengths = (torch.tensor([len(text.input_ids) for text in texts]) for texts in (explain, predict))
    branches = Branches.of(wholes, torch.tensor(prefixes), lengths - torch.tensor(prefixes))
    return task | {"branches": branches} | _labels([*explain, *predict], [*_rows(explain), *branches.keys])


def _shared(a: Text, b: Text) -> int:
    """How many tokens, but never its last, a text ``b`` begins with that ``a`` begins with."""
    length = min(len(a.input_ids), len(b.input_ids) - 1)
    differ = np.flatnonzero(a.input_ids[:length] != b.input_ids[:length])
    return int(differ[0]) if len(differ) else length


def _packed(texts: Sequence[Text], prefixes: Sequence[int]) -> dict:
    """One row of what comes, in each text, after so many tokens."""
    ids = [torch.from_numpy(text.input_ids[prefix:]).long() for text, prefix in zip(texts, prefixes, strict=True)]
    ends = torch.tensor([len(row) for row in ids]).cumsum(0)
    positions = [torch.arange(prefix, prefix + len(row)) for row, prefix in zip(ids, prefixes, strict=True)]
    input_ids = torch.cat(ids)[None]
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),  # says that nothing is padding, so no M x M mask is made
        "position_ids": torch.cat(positions)[None],
        "cu_seq_lens_q": torch.nn.functional.pad(ends, (1, 0)).int(),
    }


def _rows(texts: Sequence[Text]) -> Sequence[Tensor]:
    """Where each token of the first texts of a packed row is."""
    lengths = [len(text.input_ids) for text in texts]
    return torch.arange(sum(lengths)).split(lengths)


def _labels(texts: Sequence[Text], rows: Sequence[Tensor]) -> dict:
    """What a task says of its labels; ``rows``: where in the flattened ``input_ids`` each text's tokens are."""
    firsts = [max(text.target_start, 1) for text in texts]  # nothing predicts a text's first token
    targets = [torch.from_numpy(text.input_ids[first:]).long() for text, first in zip(texts, firsts, strict=True)]
    index = [row[first - 1 :][: len(target)] for row, first, target in zip(rows, firsts, targets, strict=True)]
    return {
        "labels": pad_sequence(targets, batch_first=True, padding_value=IGNORE),
        "counts": [len(target) for target in targets],
        "targets": torch.cat(targets),
        "index": torch.cat(index),
    }


def _pad_maps(maps: Sequence[Tensor]) -> Tensor:
    """``(K, S_n, W_n)`` each to ``(N, K, S, W)``."""
    steps, words = max(m.shape[1] for m in maps), max(m.shape[2] for m in maps)
    return torch.stack([torch.nn.functional.pad(m, (0, words - m.shape[2], 0, steps - m.shape[1])) for m in maps])
