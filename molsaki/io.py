"""Writes files that are either complete or absent, reads JSON lines, and computes digests of values."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def atomic_write(path: str | Path, binary: bool = False) -> Iterator[IO[Any]]:
    """A file object whose content replaces ``path`` when the block ends without an error.

    Until then it is ``.NAME.part`` in the same folder. It is flushed to the disk before it is renamed. After an error
    it is removed, and ``path`` is unchanged. Two processes must not write the same path at the same time.

    Raises:
        OSError: the folder does not exist, or the disk is full.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb" if binary else "w", encoding=None if binary else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        if os.name != "nt":  # Windows cannot open folders
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: str | Path, value: object, indent: int | None = None) -> None:
    """Write one JSON value and a newline; the file is complete or absent."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=indent) + "\n")


def write_json_lines(path: str | Path, records: Iterable[object]) -> None:
    """Write one JSON value per line, in UTF-8; the file is complete or absent.

    Half of a surrogate pair, which UTF-8 cannot encode, is written as its JSON escape.
    """
    with atomic_write(path, binary=True) as file:
        for record in records:
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))


def read_json_lines(path: str | Path) -> list[Any]:
    """The JSON values of a file with one value per line; strings in them may contain other line separators.

    Raises:
        ValueError: a line is not JSON.
        OSError: the file cannot be read.
    """
    with open(path, encoding="utf-8") as file:  # str.splitlines would also split at U+2028
        return [json.loads(line) for line in file]


def digest(value: object, sort_keys: bool = True) -> str:
    """32 hexadecimal digits for a JSON value: its BLAKE2b digest of 128 bits."""
    text = json.dumps(value, sort_keys=sort_keys, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def hash64(text: str) -> int:
    """A signed 64-bit integer for a text: its BLAKE2b digest of 64 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)
