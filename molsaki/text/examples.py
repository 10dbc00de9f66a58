"""Reads questions with rationales and answers from files of JSON lines, of one JSON array, or from tables."""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import math
import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, overload

import numpy as np

from molsaki.text.answers import gold_choice, kind_of, same_answer
from molsaki.text.conversations import Turn, checked_context, turns_of
from molsaki.text.formats import AUTO, EARLIER, FORMATS, Fields, check_case, format_of, to_fields
from molsaki.text.json_records import parse_record, records_in, state_of
from molsaki.text.spans import Span, checked_key_spans
from molsaki.text.tables import as_json_lines
from molsaki.text.thinking import with_opening

logger = logging.getLogger(__name__)

NAMED = 5  # reasons that a message names


@dataclasses.dataclass(frozen=True)
class Example:
    """One question with its rationale and answer.

    ``context`` are the turns before the question, in a conversation. ``key_spans`` are characters of the question and
    of the rationale, for ``--key given``.

    ``answer`` is the gold answer if the data have one. ``is_right`` is False if the data also have the answer in which
    the rationale ended, and the two differ.
    """

    id: str
    question: str
    rationale: str
    answer: str
    keywords: tuple[str, ...] | None = None
    choices: tuple[str, ...] | None = None
    is_right: bool = True
    task: str | None = None
    key_spans: tuple[tuple[Span, ...], tuple[Span, ...]] | None = None
    context: tuple[Turn, ...] = ()


class Examples(Sequence[Example]):
    """Examples of files, read from disk on access; 18 bytes per example stay in memory.

    A slice is an `Examples` too. Reading from a file that has changed since it was opened is an error.

    Attributes:
        left_out: why each unusable line or element was left out, with its file, line and id; for a slice also those of
            the whole files.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        index: np.ndarray[Any, Any],
        left_out: Sequence[str] = (),
        data_format: str = AUTO,
        names: Sequence[str] = ("",),
        with_reply: bool = True,
    ):
        self._options = data_format, names, with_reply
        self._tables, self._table_states = paths, [state_of(path) for path in paths]
        self._paths = [as_json_lines(path) for path in paths]
        self._states = [state_of(path) for path in self._paths]
        self._index, self.left_out = index, left_out

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...

    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return Examples(self._tables, self._index[index], self.left_out, *self._options)
        entry, (data_format, names, with_reply) = self._index[index], self._options
        return example_of(
            self.record(index), f"{names[entry['file']]}{entry['line']}", False, False, data_format, with_reply
        )

    def record(self, index: int) -> Fields:
        """The original JSON object of an example."""
        entry = self._index[index]
        path, table = self._paths[entry["file"]], self._tables[entry["file"]]
        with path.open("rb") as file:
            is_same = state_of(file.fileno()) == self._states[entry["file"]]
            if not is_same or (table is not path and state_of(table) != self._table_states[entry["file"]]):
                raise ValueError(f"{table}: has changed since it was opened; run again")
            file.seek(entry["offset"])
            return cast(Fields, json.loads(file.read(entry["length"])))


def read_examples(path: str | Path | Sequence[str | Path], rationale: bool = True, data_format: str = AUTO) -> Examples:
    """Read JSON lines, one JSON array, or a table (``.csv``, ``.tsv``, ``.parquet``) of objects with ``question``,
    ``rationale``, ``answer`` or ``gold``, and optionally ``id``, ``earlier_turns``, ``keywords``, ``key_spans``,
    ``choices`` and ``task``, or of a format of `molsaki.text.formats`, which is logged for each file.

    Answers may be numbers, and true and false are read as yes and no. The gold answer of an example with choices
    becomes the text of its choice. Blank lines are skipped. A missing ``id`` becomes the number of the line or element,
    after the file's name where several files are read. Every example is checked here, but none is kept in memory. One
    that cannot be used is left out: the first few are named in a warning, all of them in ``left_out``.

    Args:
        path: one file, or several whose ids differ.
        rationale: if True, the examples are to be trained on: an example without the field ``rationale`` is left out.
            An empty rationale counts as missing, see :func:`molsaki.batches.dataset.prepare`. If False, replies are to
            be
            compared with the gold answers: an example whose gold answer no reply can match is left out, and in a
                conversation that ends in a user turn that turn is the question.
        data_format: the name of the records' format; ``"auto"`` recognises that of each record.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file has no usable example (the message has the reasons), or is an array that is not valid JSON,
            or a table that cannot be read.
    """
    if data_format not in (AUTO, *FORMATS):
        raise ValueError(f"data_format: expected {AUTO} or one of {', '.join(FORMATS)}, got {data_format!r}")
    paths = [Path(one) for one in ([path] if isinstance(path, (str, Path)) else path)]
    names = id_prefixes(paths)
    entries, keys, left_out = array("q"), array("q"), []
    for number, one in enumerate(paths):
        formats: collections.Counter[str] = collections.Counter()
        if not one.is_file():
            raise FileNotFoundError(f"{one}: no such file")
        for line, offset, data in records_in(as_json_lines(one)):
            fields: Fields = {}
            try:
                fields = parse_record(data)
                example = example_of(
                    fields, f"{names[number]}{line}", rationale, not rationale, data_format, with_reply=rationale
                )
            except (ValueError, TypeError) as error:
                id = fields.get("id")
                left_out.append(f"{one}:{line}: {'' if id is None else f'id {id}: '}{error}")
                continue
            formats[format_of(fields) if data_format == AUTO else data_format] += 1
            entries.extend((number, line, offset, len(data)))
            keys.append(hash(example.id))
        if formats:
            counted = ", ".join(f"{count} of format {name}" for name, count in formats.most_common())
            logger.info("%s: %s", one, counted)
    table = np.array(entries, np.int64).reshape(-1, 4)
    index = np.zeros(len(table), [("file", "<i2"), ("line", "<i4"), ("offset", "<i8"), ("length", "<i4")])
    for column, name in enumerate(index.dtype.names or ()):
        index[name] = table[:, column]
    _, firsts, groups = np.unique(np.array(keys, np.int64), return_index=True, return_inverse=True)
    is_first = firsts[groups] == np.arange(len(index))
    found = Examples(paths, index, (), data_format, names, rationale)
    for at in np.flatnonzero(~is_first):
        first, second = index[firsts[groups[at]]], index[at]
        other = "" if first["file"] == second["file"] else f" of {paths[first['file']]}"
        repeated = f"id {found[int(at)].id!r} is line {first['line']}{other}'s already"
        left_out.append(f"{paths[second['file']]}:{second['line']}: {repeated}")
    for number, one in enumerate(paths):
        if not (index["file"][is_first] == number).any():
            reasons = [reason for reason in left_out if reason.startswith(f"{one}:")]
            raise ValueError(f"{one}: holds no examples" + (f" that can be used: {_named(reasons)}" if reasons else ""))
    if left_out:
        logger.warning(
            "%d of %d examples left out: %s", len(left_out), len(left_out) + is_first.sum(), _named(left_out)
        )
    return Examples(paths, index[is_first], left_out, data_format, names, rationale)


def id_prefixes(paths: Sequence[Path]) -> list[str]:
    """The prefix of default ids, before the line number: nothing for a single file, else the file's name, or its path
    if two files have the same name."""
    if len(paths) == 1:
        return [""]
    names = [path.name for path in paths]
    return [f"{path if names.count(path.name) > 1 else path.name}:" for path in paths]


def _named(left_out: Sequence[str]) -> str:
    """The first example that was left out for each reason, and the number of others."""
    groups: dict[str, list[str]] = {}
    for one in left_out:
        groups.setdefault(re.sub(r"^.*?:\d+: (?:id .*?: )?", "", one, flags=re.DOTALL), []).append(one)
    named = [
        found[0] + (f" (and {len(found) - 1} more for this reason)" if len(found) > 1 else "")
        for found in groups.values()
    ]
    more = sum(len(found) for found in list(groups.values())[NAMED:])
    return "; ".join(named[:NAMED]) + (f"; and {more} more" if more else "")


def example_of(
    record: Fields,
    default_id: str,
    rationale: bool,
    compared: bool,
    data_format: str = AUTO,
    with_reply: bool = True,
) -> Example:
    """Checks everything. ``compared``: also that replies can be compared with the gold answer. ``with_reply``: as in
    `to_fields`.

    If a rationale has ``</think>`` but no ``<think>``, because that was in its prompt, it is added.
    """
    fields = to_fields(record, data_format, with_reply)
    choices = _texts(fields, "choices")
    name = "answer" if fields.get("gold") is None else "gold"
    answer = _text(fields, name)
    try:
        if choices or compared:
            kind_of(answer, choices)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    given = _text(fields, "answer", answer)
    written = _text(fields, "rationale", None if rationale and "rationale" not in fields else "")
    key_spans = _spans(fields, _text(fields, "question"), written)
    written, shift = with_opening(written)
    if key_spans is not None and shift:
        key_spans = key_spans[0], tuple((start + shift, stop + shift) for start, stop in key_spans[1])
    context = fields.get(EARLIER)
    return Example(
        id=_text(fields, "id", default_id),
        question=_text(fields, "question"),
        rationale=written,
        answer=(gold_choice(answer, choices) or answer) if choices else answer,
        keywords=_texts(fields, "keywords"),
        key_spans=key_spans,
        choices=choices,
        is_right="answer" not in fields or same_answer(given, answer, choices),
        task=_text(fields, "task", "") or None,
        context=() if context is None else tuple(checked_context(turns_of(context, EARLIER), EARLIER)),
    )


def _text(fields: Fields, name: str, default: str | None = None) -> str:
    """A field as text. A missing, null or blank one is ``default``, or an error if that is None."""
    value = fields.get(name)
    if isinstance(value, bool):
        value = "yes" if value else "no"
    if isinstance(value, (int, float)) and math.isfinite(value):
        value = str(value)
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name}: expected a text, got {type(value).__name__}")
    if value is not None and value.strip():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name}: expected valid Unicode, got half of a surrogate pair at character {error.start}"
            ) from None
        return value
    if default is None:
        if value is not None:
            raise ValueError(f"{name}: expected a text, got a blank one")
        check_case(name, fields, (name,))
        raise ValueError(f"{name}: missing")
    return default


def _spans(fields: Fields, question: str, rationale: str) -> tuple[tuple[Span, ...], tuple[Span, ...]] | None:
    """The field ``key_spans``: ``{"question": [[start, stop], ...], "rationale": [...]}``, in characters of the two."""
    value = fields.get("key_spans")
    if value is None:
        return None
    if not isinstance(value, dict) or not value.keys() <= {"question", "rationale"}:
        raise TypeError(f"key_spans: expected an object with question and rationale, got {value!r}")
    sides = []
    for side in ("question", "rationale"):
        spans = value.get(side) or []
        if not isinstance(spans, (list, tuple)):
            raise TypeError(f"key_spans: {side}: expected a list of [start, stop], got {spans!r}")
        sides.append(spans)
    checked_key_spans((sides[0], sides[1]), question, rationale)
    first, second = (tuple((start, stop) for start, stop in spans) for spans in sides)
    return first, second


def _texts(fields: Fields, name: str) -> tuple[str, ...] | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
        raise TypeError(f"{name}: expected a list of texts that are not blank, got {value!r}")
    return tuple(value)
