"""Converts CSV, TSV and Parquet files to JSON lines, which are read from the disk on access."""

from __future__ import annotations

import csv
import getpass
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from molsaki.extras import require
from molsaki.io import digest

DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET = ".parquet"


def check_json_lines_name(flag: str, path: Path) -> None:
    """Refuse the name of a table as the name of a JSON lines output file."""
    if path.suffix.lower() in (*DELIMITERS, PARQUET):
        raise ValueError(f"{flag}: expected a name for JSON lines, such as train.jsonl, got {path}")


def as_json_lines(path: Path) -> Path:
    """A file of JSON lines with the rows of a table, one line per row; ``path`` itself if it is not a table.

    It is written to the temporary folder once for each version of the table. Empty cells of a CSV or TSV file become
    missing fields, and cells that are JSON arrays or objects are parsed.

    Raises:
        ValueError: the table cannot be read.
        ImportError: Parquet needs pyarrow, which is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in DELIMITERS and suffix != PARQUET:
        return path
    state = os.stat(path)
    name = digest([str(path.resolve()), state.st_size, state.st_mtime_ns])
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    folder = Path(tempfile.gettempdir(), f"molsaki-{user}")
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{path.stem}-{name[:16]}.jsonl"
    if not target.is_file():
        rows = _parquet_rows(path) if suffix == PARQUET else _csv_rows(path, DELIMITERS[suffix])
        # A unique name: other processes may write the same file at the same time.
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8", suffix=".part") as part:
            try:
                part.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            except BaseException:
                part.close()
                os.unlink(part.name)
                raise
        os.replace(part.name, target)
    return target


def _csv_rows(path: Path, delimiter: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(1 << 30)  # a thinking trace is longer than the default of 131,072 characters
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            _check_header(path, reader.fieldnames or (), delimiter)
            for row in reader:
                if None in row:
                    raise ValueError(
                        f"{path}: row {row!r} has more cells than the header; expected cells between {delimiter!r}"
                    )
                yield {name: _cell(value) for name, value in row.items() if value}
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a valid table with a header: {error}") from None


def _check_header(path: Path, names: Sequence[str], delimiter: str) -> None:
    """Refuse a header of one column whose name contains another common separator."""
    if len(names) != 1:
        return
    for other, called in ((";", "semicolons"), ("\t", "tabs"), (",", "commas"), ("|", "bars")):
        if other in names[0] and other != delimiter:
            end = {"\t": "; name it .tsv", ",": "; name it .csv"}.get(other, "; save it with commas, as CSV")
            raise ValueError(
                f"{path}: the header has one column, {names[0]!r}: its columns are separated by {called}, expected "
                f"{delimiter!r}{end}"
            )


def _cell(value: str) -> Any:
    if value[0] in "[{":
        try:
            return json.loads(value)
        except ValueError:
            pass
    return value


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    require("parquet", by=f"{path}: Parquet")
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield json.loads(json.dumps({k: v for k, v in row.items() if v is not None}, default=str))
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a valid Parquet file: {' '.join(str(error).split())}") from None
