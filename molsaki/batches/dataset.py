"""The data set of distillation: tokenized examples, each with the teacher's stored map if there is a store."""

from __future__ import annotations

import collections
import dataclasses
import logging
import pickle
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from molsaki.batches.tokenized import (
    LeftOut,
    Tokenization,
    TokenizedExample,
    TokenizerSpec,
    all_left_out,
    list_left_out,
)
from molsaki.config import PREDICT_TEMPLATE, TextOptions
from molsaki.store.map_store import Entry, Store, check_text
from molsaki.text.examples import Example, Examples, example_of
from molsaki.text.formats import AUTO
from molsaki.text.frames import check_template
from molsaki.text.spans import Spans

logger = logging.getLogger(__name__)

KEPT = 1 << 16  # tokenized examples that a data set keeps in memory, about 1 KB each
KEPT_BYTES = 1 << 28  # and their largest size: an example of 131,072 tokens has 1.5 MB

Item: TypeAlias = tuple[TokenizedExample, Entry | None]


class DistillDataset(Dataset[Item]):
    """Examples that are tokenized on access; the first ones are kept in memory, at most `KEPT` and about `KEPT_BYTES`.

    Create it with `prepare`. Picklable, for the workers of a ``DataLoader``.

    Attributes:
        examples: as `read_examples` returns them.
        used: ``(N,)`` the indices of the examples that are used.
        lengths: ``(N,)`` the student's tokens of each.
        left_out: the ids of the examples that are not used, by reason.
        thinking: how many of the used ones have a rationale that begins with ``<think>``.
        without_words: how many of the used ones have no key word: both their tasks are trained, but they have no map.
        store: the teacher's stored maps.
    """

    def __init__(self, examples: Sequence[Example], tokenization: Tokenization, store: Store | None = None):
        self.examples, self.store = examples, store
        self._tokenization = tokenization
        self._kept: list[bytes] = []
        kept_bytes = 0
        self.left_out: dict[str, list[str]] = {}
        self.without_words = self.thinking = 0
        used, lengths = array("i"), array("i")
        for number, example in enumerate(tqdm(examples, desc="tokenize", unit="example", leave=False, delay=2)):
            try:
                tokenized = tokenization(example)
                if store is not None:
                    check_stored(store, example.id, tokenized.spans)
            except LeftOut as reason:
                if str(reason) not in self.left_out and reason.__cause__ is not None:
                    logger.warning("example %s: %s", example.id, reason.__cause__)
                self.left_out.setdefault(str(reason), []).append(example.id)
                continue
            used.append(number)
            lengths.append(len(tokenized.explain.input_ids) + len(tokenized.predict.input_ids))
            self.without_words += not tokenized.explain.words
            self.thinking += example.rationale.lstrip().startswith("<think>")
            if len(self._kept) < KEPT and kept_bytes < KEPT_BYTES:
                self._kept.append(pickle.dumps(tokenized))
                kept_bytes += len(self._kept[-1])
        if not used:
            raise ValueError(all_left_out(self.skipped))
        self.used: np.ndarray[Any, Any] = np.array(used)
        self.lengths: np.ndarray[Any, Any] = np.array(lengths)

    def __len__(self) -> int:
        return len(self.used)

    def __getitem__(self, index: int) -> Item:
        index = range(len(self))[index]
        if index < len(self._kept):
            tokenized = pickle.loads(self._kept[index])
        else:
            tokenized = self._tokenization(self.examples[int(self.used[index])])
        return tokenized, None if self.store is None else self.store[tokenized.id]

    @property
    def skipped(self) -> collections.Counter[str]:
        """How many were left out, by reason."""
        return collections.Counter({reason: len(ids) for reason, ids in self.left_out.items()})

    def summary(self) -> str:
        """One line: examples used, without key words, with thinking traces, left out and why."""
        used = f"{len(self)} examples, {self.without_words} without key words"
        used += f", {self.thinking} with a thinking trace" if self.thinking else ""
        return "; ".join([used, list_left_out(self.left_out)] if self.left_out else [used])


def as_examples(data: Any, name: str, data_format: str = AUTO) -> Sequence[Example]:
    """Examples from a sequence of them, or of rows: dicts as the lines of a file, a ``datasets.Dataset``, or a frame.

    Fields that are None count as missing: a ``datasets.Dataset`` has None if only some rows have a field.

    Raises:
        TypeError, ValueError: the data is no such sequence, or a row lacks a field; the message begins with ``name``.
    """
    if isinstance(data, Examples):
        return data
    if hasattr(data, "iloc") and hasattr(data, "to_dict"):  # a pandas frame, whose missing cells are missing fields
        rows = data.to_dict("records")
        data = [{name: value for name, value in row.items() if value is not None and value == value} for row in rows]
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__") or isinstance(data, (str, Mapping)):
        raise TypeError(f"{name}: expected a sequence of examples or of dicts, got {type(data).__name__}")
    if not len(data):
        raise ValueError(f"{name}: expected examples, got none")
    examples, left_out = [], []
    for number in range(len(data)):
        row, where = data[number], f"{name}: row {number}"
        if not isinstance(row, (Example, Mapping)):
            raise TypeError(f"{where}: expected an Example or a dict, got {type(row).__name__}")
        if isinstance(row, Example):
            examples.append(row)
            continue
        try:
            present = {name: value for name, value in row.items() if value is not None}
            examples.append(example_of(present, str(number), rationale=True, compared=False, data_format=data_format))
        except (ValueError, TypeError) as error:
            left_out.append(f"{where}: {error}")
    if left_out and not examples:
        raise ValueError(left_out[0])
    if left_out:
        logger.warning("%d of %d examples left out, the first: %s", len(left_out), len(data), left_out[0])
    return examples


def prepare(
    examples: Sequence[Example],
    options: TextOptions,
    student: TokenizerSpec,
    teacher: TokenizerSpec | None = None,
    predict_template: str = PREDICT_TEMPLATE,
    store: Store | None = None,
    cot_template: str | None = None,
) -> DistillDataset:
    """Tokenize every example once, to check and count it.

    Examples without key words are kept and counted. An example is left out and counted if it has no rationale, its
    thinking trace is incomplete, it is too long for a side (unless ``options.too_long == "cut"``), a template or
    tokenizer refuses its text or, with ``options.drop_wrong``, its rationale is wrong.

    Args:
        teacher: needed for a live teacher, and with ``too_long="cut"``.
        store: the teacher's stored maps.
        predict_template, cot_template: as in `Tokenization`.

    Raises:
        ValueError: every example is left out, the store has other texts, or a template or tokenizer cannot be used.
    """
    return DistillDataset(examples, tokenization_of(options, student, teacher, predict_template, cot_template), store)


def tokenization_of(
    options: TextOptions,
    student: TokenizerSpec,
    teacher: TokenizerSpec | None = None,
    predict_template: str = PREDICT_TEMPLATE,
    cot_template: str | None = None,
) -> Tokenization:
    """A picklable `Tokenization` whose templates have been checked; arguments and errors as in `prepare`."""
    for spec, side in ((student, "student"), (teacher, "teacher")):
        if spec is not None:
            check_template(spec.tokenizer, spec.template, f"{side}_template")
    # A config with more than the text options may hold objects that cannot be pickled.
    text_options = TextOptions(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(TextOptions)}
    )
    return Tokenization(text_options, student, teacher, predict_template, cot_template)


def check_stored(store: Store, id: str, spans: Spans) -> None:
    if id not in store:
        raise ValueError(
            f"{store.folder}: holds no example {id!r}; extract this data set "
            "too (examples without an id are named by their lines, as FILE:LINE where several files are read)"
        )
    entry = store[id]
    check_text(store.folder, entry, spans)
    if entry.maps is None:
        raise LeftOut(f"{entry.reason} (in the store)")
