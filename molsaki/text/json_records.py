"""Reads the records of a file of JSON lines, or of one JSON array, one at a time."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from molsaki.text.formats import Fields
from molsaki.text.tables import as_json_lines


def stream_records(path: Path) -> Iterator[tuple[int, Fields | ValueError]]:
    """The records of a file with their line numbers, read lazily. A record that is not a JSON object is replaced by an
    error whose arguments are the reason and the place.

    Raises:
        ValueError: the file holds none, or is an array that is not valid JSON, or a table that cannot be read.
    """
    is_empty = True
    for line, _, data in records_in(as_json_lines(path)):
        is_empty = False
        try:
            yield line, parse_record(data)
        except ValueError as error:
            yield line, ValueError("not a JSON object", f"{path}:{line}: {error}")
    if is_empty:
        raise ValueError(f"{path}: holds no examples")


def records_in(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """The number, from 1, the byte offset and the bytes of each line that is not blank, or of each array element."""
    with path.open("rb") as file:
        offset = 3 * (file.read(3) == codecs.BOM_UTF8)
        file.seek(offset)
        start = file.read(1 << 16).lstrip()
        file.seek(offset)
        if start.startswith(b"["):
            yield from _elements(path, file.read(), offset)
            return
        for line, data in enumerate(file, 1):
            if data.strip():
                yield line, offset, data
            offset += len(data)


def _elements(path: Path, data: bytes, offset: int) -> Iterator[tuple[int, int, bytes]]:
    """The elements of the JSON array that is the whole of a file from ``offset`` on, as `records_in` gives them."""
    decoder, between = json.JSONDecoder(), re.compile(r"\s*([\[,\]])\s*")
    try:
        text = data.decode()
        number = at = 0
        while (mark := between.match(text, at)) and mark[1] != "]" and not text.startswith("]", mark.end()):
            offset += len(text[at : mark.end()].encode())
            at = decoder.raw_decode(text, mark.end())[1]
            number, element = number + 1, text[mark.end() : at].encode()
            yield number, offset, element
            offset += len(element)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON, or not UTF-8: {error}") from None
    if mark is None or text[mark.end() :].strip(" \r\n\t]"):
        raise ValueError(f"{path}: not valid JSON: expected , or ] after element {number} of the array")


def state_of(file: Path | int) -> tuple[int, int]:
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns


def parse_record(data: bytes) -> Fields:
    try:
        fields = json.loads(data)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8: {error.reason} at byte {error.start + 1}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, got {type(fields).__name__}")
    return fields
