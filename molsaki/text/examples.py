"""Reads questions with rationales and answers from JSON lines files."""

from __future__ import annotations

import codecs
import dataclasses
import json
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from molsaki.text.answers import same_answer

Fields = dict[str, Any]  # the JSON object of a line


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
    """Examples of JSON lines files, read from disk on access; 14 bytes per example stay in memory.

    A slice is an `Examples` too. Reading from a file that has changed since it was opened is an error.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        files: np.ndarray[Any, Any],
        offsets: np.ndarray[Any, Any],
        lines: np.ndarray[Any, Any],
    ):
        self._paths, self._states = paths, [_state(path) for path in paths]
        self._files, self._offsets, self._lines = files, offsets, lines

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...

    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return Examples(self._paths, self._files[index], self._offsets[index], self._lines[index])
        number = int(self._files[index])
        path = self._paths[number]
        with path.open("rb") as file:
            if _state(file.fileno()) != self._states[number]:
                raise ValueError(f"{path}: has changed since it was opened; run again")
            file.seek(self._offsets[index])
            return _example(json.loads(file.readline()), str(path), str(self._lines[index]), False)


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
                    files.append(number)
                    offsets.append(offset)
                    lines.append(line_number)
                    keys.append(hash(example.id))
                offset += len(line)
        if len(lines) == before:
            raise ValueError(f"{one}: holds no examples")
    found = Examples(paths, np.array(files), np.array(offsets), np.array(lines))
    order = np.argsort(np.array(keys), kind="stable")
    repeated = np.flatnonzero(np.diff(np.array(keys)[order]) == 0)
    for at in repeated[order[repeated + 1].argsort()][:1]:
        first, second = (int(number) for number in order[at : at + 2])
        there = f"{lines[first]}" if files[first] == files[second] else f"{lines[first]} of {paths[files[first]]}"
        raise ValueError(f"{paths[files[second]]}:{lines[second]}: id {found[second].id!r} is line {there}'s already")
    return found


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
