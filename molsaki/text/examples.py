"""Reads questions with rationales and answers from JSON lines files."""

from __future__ import annotations

import codecs
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from molsaki.text.answers import same_answer

Fields = dict[str, Any]  # the JSON object of a line
# Where an example is: its file's number, the position of its line in bytes, the line's number; and the hash of its id.
PLACE = np.dtype([("file", np.int16), ("offset", np.int64), ("line", np.int32), ("key", np.int64)])


@dataclasses.dataclass(frozen=True)
class Example:
    """One question with its rationale and answer.

    ``answer`` is the gold answer where the data has one. ``is_right`` is False where the data also has the answer in
    which the rationale ended, and the two differ.
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
    """Examples of JSON lines files, read from disk on access; 22 bytes per example stay in memory.

    A slice is an `Examples` too. Reading from a file that has changed since it was opened is an error.
    """

    def __init__(self, paths: Sequence[Path], places: np.ndarray[Any, Any]):
        self._paths, self._states = paths, [_state(path) for path in paths]
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...

    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return Examples(self._paths, self._places[index])
        number, offset, line, _ = self._places[index].item()
        path = self._paths[number]
        with path.open("rb") as file:
            if _state(file.fileno()) != self._states[number]:
                raise ValueError(f"{path}: has changed since it was opened; run again")
            file.seek(offset)
            return _example(json.loads(file.readline()), str(path), str(line), False)


def read_examples(path: str | Path | Sequence[str | Path], rationale: bool = True) -> Examples:
    """Read JSON lines with ``question``, ``rationale``, ``answer`` or ``gold``, and optionally ``id``, ``keywords``,
    ``choices`` and ``task``.

    Answers may be numbers. Blank lines are skipped. A missing ``id`` becomes the line number. Every line is checked
    here, but none is kept in memory.

    Args:
        path: one file, or several whose ids differ.
        rationale: if True, a line without the field ``rationale`` is an error. An empty rationale is none, see
            :func:`molsaki.batches.dataset.prepare`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError, TypeError: the file has no examples, a line is not a JSON object, a field is missing, blank or of
            the wrong type, or two lines have the same id; the message names the file, the line and the field.
    """
    paths = [Path(one) for one in ([path] if isinstance(path, (str, Path)) else path)]
    places = np.fromiter(_places(paths, rationale), PLACE)
    found = Examples(paths, places)
    _, firsts = np.unique(places["key"], return_index=True)
    for second in np.setdiff1d(np.arange(len(places)), firsts)[:1]:
        first = np.flatnonzero(places["key"] == places["key"][second])[0]
        (file, _, line, _), (other, _, again, _) = places[first].item(), places[second].item()
        there = str(line) if file == other else f"{line} of {paths[file]}"
        raise ValueError(f"{paths[other]}:{again}: id {found[int(second)].id!r} is line {there}'s already")
    return found


def _places(paths: Sequence[Path], rationale: bool) -> Iterator[tuple[int, int, int, int]]:
    """The place of every example, which is checked."""
    for number, path in enumerate(paths):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        is_empty = True
        with path.open("rb") as file:
            offset = 3 * (file.read(3) == codecs.BOM_UTF8)
            file.seek(offset)
            for line_number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}:{line_number}"
                    example = _example(_parse(line, where), where, str(line_number), rationale)
                    yield number, offset, line_number, hash(example.id)
                    is_empty = False
                offset += len(line)
        if is_empty:
            raise ValueError(f"{path}: holds no examples")


def _state(file: Path | int) -> tuple[int, int]:
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns


def _parse(line: bytes, where: str) -> Fields:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error.msg} at character {error.pos + 1}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not valid UTF-8: {error.reason} at byte {error.start + 1}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(fields).__name__}")
    return fields


def _example(fields: Fields, where: str, default_id: str, rationale: bool) -> Example:
    has_both = fields.get("gold") is not None and "answer" in fields
    return Example(
        id=_text(fields, "id", where, default_id),
        question=_text(fields, "question", where),
        rationale=_text(fields, "rationale", where, None if rationale and "rationale" not in fields else ""),
        answer=_text(fields, "answer" if fields.get("gold") is None else "gold", where),
        keywords=_texts(fields, "keywords", where),
        choices=_texts(fields, "choices", where),
        is_right=not has_both or same_answer(_text(fields, "answer", where, ""), _text(fields, "gold", where)),
        task=_text(fields, "task", where, "") or None,
    )


def _text(fields: Fields, name: str, where: str, default: str | None = None) -> str:
    """A field as text. A missing, null or blank one is ``default``, or an error if that is None."""
    value = fields.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{where}: {name}: expected a text, got {type(value).__name__}")
    if value is not None and value.strip():
        return value
    if default is None:
        raise ValueError(f"{where}: {name}: " + ("missing" if value is None else "expected a text, got a blank one"))
    return default


def _texts(fields: Fields, name: str, where: str) -> tuple[str, ...] | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
        raise TypeError(f"{where}: {name}: expected a list of texts that are not blank, got {value!r}")
    return tuple(value)
