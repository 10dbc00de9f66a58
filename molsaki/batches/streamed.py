"""The training data as a stream: examples are read and tokenized as they are needed, in their order."""

from __future__ import annotations

import collections
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset, get_worker_info

from molsaki.batches.dataset import Item, check_stored
from molsaki.batches.tokenized import LeftOut, Tokenization, TokenizedExample, all_left_out
from molsaki.store.map_store import Store
from molsaki.text.examples import Example, example_of, id_prefixes
from molsaki.text.formats import AUTO
from molsaki.text.json_records import stream_records

logger = logging.getLogger(__name__)

PEEKED = 256  # examples that are read before the training, to see whether they can be used


class StreamedFiles:
    """The records of data files in their order, each with its default id; they can be read again."""

    def __init__(self, paths: Sequence[str | Path]):
        self.paths = [Path(path) for path in paths]
        for path in self.paths:
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file")

    def __iter__(self) -> Iterator[dict[str, Any] | ValueError]:
        for path, prefix in zip(self.paths, id_prefixes(self.paths), strict=True):
            for line, record in stream_records(path):
                if isinstance(record, dict) and not str(record.get("id") or "").strip():
                    record |= {"id": f"{prefix}{line}"}
                yield record


class Peeked(NamedTuple):
    """The properties of the first examples of a stream."""

    first: TokenizedExample
    used: int
    without_words: int
    thinking: int


class StreamedDataset(IterableDataset[Item]):
    """Examples that are tokenized as they are read; nothing is kept, and the data are not counted beforehand.

    Examples that cannot be used are left out as by :func:`~molsaki.batches.dataset.prepare`; a warning names the first
    one for each reason. Each of n loading workers reads every n-th row, unless the rows are a torch
    ``IterableDataset``, which divides itself.

    Attributes:
        left_out: how many were left out, by reason, in this epoch and this process; empty with loading workers.
        used, without_words, thinking: how many were read and used, and how many of these had no key word or a trace.

    Args:
        rows: examples, or dicts as the lines of a file; iterated from the start in each epoch.
        name: of the argument, for messages.
        limit: use only this many rows, the first ones.

    Raises:
        TypeError: ``rows`` cannot be iterated over, or only once.
    """

    def __init__(
        self,
        rows: Iterable[Example | Mapping[str, Any]],
        name: str,
        tokenization: Tokenization,
        store: Store | None = None,
        data_format: str = AUTO,
        limit: int | None = None,
    ):
        if not hasattr(rows, "__iter__") or isinstance(rows, (str, Mapping)):
            raise TypeError(f"{name}: expected examples or dicts to iterate over, got {type(rows).__name__}")
        if iter(rows) is iter(rows):
            raise TypeError(
                f"{name}: a {type(rows).__name__} can be read only once; expected rows that can be read again, such as "
                "a datasets.IterableDataset or a list"
            )
        self.rows, self.name, self.store, self.limit = rows, name, store, limit
        self._tokenization, self._format = tokenization, data_format
        self.left_out: collections.Counter[str] = collections.Counter()
        self.used = self.without_words = self.thinking = 0
        self._named: set[str] = set()  # the reasons for which an example was named

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[Item]:
        self._reset()
        worker = get_worker_info()
        step, first = (
            (1, 0) if worker is None or isinstance(self.rows, IterableDataset) else (worker.num_workers, worker.id)
        )
        if worker is not None and isinstance(self.rows, IterableDataset) and worker.num_workers > 1:
            if self.limit is not None:
                raise ValueError(
                    f"limit: expected None with {worker.num_workers} workers that divide {self.name} themselves, got "
                    f"{self.limit}; take that many rows of it first"
                )
            prefix = f"{worker.id}:"  # rows without an id are numbered in each worker
        else:
            prefix = ""
        numbered = itertools.islice(enumerate(self.rows), self.limit)
        for number, row in itertools.islice(numbered, first, None, step):
            try:
                yield self._item(f"{prefix}{number}", row)
            except LeftOut as reason:
                if str(reason) not in self._named:
                    self._named.add(str(reason))
                    cause = "" if reason.__cause__ is None else f" ({reason.__cause__.args[-1]})"
                    where = f"row {prefix}{number} left out, the first for this reason"
                    logger.warning("%s: %s: %s%s", self.name, where, reason, cause)
                self.left_out[str(reason)] += 1
                if not self.used and self.left_out.total() >= 4 * PEEKED:
                    raise ValueError(f"{self.name}: {all_left_out(self.left_out)}") from None

    def _reset(self) -> None:
        self.left_out.clear()
        self.used = self.without_words = self.thinking = 0

    def _item(self, number: str, row: Any) -> Item:
        if isinstance(row, ValueError):
            raise LeftOut(row.args[0]) from row
        if not isinstance(row, Example):
            if not isinstance(row, Mapping):
                raise TypeError(f"{self.name}: row {number}: expected an Example or a dict, got {type(row).__name__}")
            present = {name: value for name, value in row.items() if value is not None}
            try:
                row = example_of(present, number, rationale=True, compared=False, data_format=self._format)
            except (ValueError, TypeError) as error:
                raise LeftOut(str(error)) from None
        tokenized = self._tokenization(row)
        if self.store is not None:
            check_stored(self.store, row.id, tokenized.spans)
        self.used += 1
        self.without_words += not tokenized.explain.words
        self.thinking += row.rationale.lstrip().startswith("<think>")
        return tokenized, None if self.store is None else self.store[row.id]

    def peek(self) -> Peeked:
        """Read the first `PEEKED` usable examples, without using them for training.

        Raises:
            ValueError: none can be used.
        """
        first = None
        for item in itertools.islice(self, PEEKED):
            first = item[0] if first is None else first
        if first is None:
            raise ValueError(f"{self.name}: {all_left_out(self.left_out) if self.left_out else 'holds no examples'}")
        found = Peeked(first, self.used, self.without_words, self.thinking)
        self._reset()
        return found

    def summary(self) -> str:
        """One line: examples read and used in this epoch, without key words, with traces, left out."""
        counts = [f"{self.used} examples", f"{self.without_words} without key words"]
        counts += [f"{self.thinking} with a thinking trace"] if self.thinking else []
        return "; ".join([", ".join(counts), *(f"{n} left out: {reason}" for reason, n in self.left_out.items())])
