"""Reads the predictions that ``molsaki evaluate`` wrote, of the student and of other models to compare it with."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molsaki.evaluation.compare import predictions_file, read_lines
from molsaki.evaluation.statistics import paired_test, wilson

logger = logging.getLogger(__name__)

SUMMARY = "summary.json"


@dataclasses.dataclass(frozen=True)
class Predictions:
    """One ``predictions.jsonl`` and the ``summary.json`` beside it, if there is one.

    Attributes:
        path: as it was given.
        name: the name of its folder, with a number if others have the same name.
        records: its lines.
        summary: empty if there is none.
    """

    path: str
    name: str
    records: list[dict[str, Any]]
    summary: dict[str, Any]

    @property
    def model(self) -> str:
        return str(self.summary.get("model") or self.path)

    @property
    def data_file(self) -> str | None:
        return self._text("data_file")

    @property
    def mode(self) -> str:
        return self._text("mode") or "rationale"

    @property
    def template(self) -> str | None:
        return self._text("template")

    @property
    def predict_template(self) -> str | None:
        return self._text("predict_template")

    def _text(self, name: str) -> str | None:
        value = self.summary.get(name)
        return value if isinstance(value, str) else None

    def is_of(self, student: str) -> bool:
        """Whether the predictions come from this model, as far as is known."""
        model = self._text("model")
        if model is None:
            return True
        return model == student or Path(model).resolve() == Path(student).resolve()

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The predictions of the questions that were not left out."""
        return [record for record in self.records if "left_out" not in record]

    @property
    def counts(self) -> tuple[int, int]:
        """How many of the predictions are right, and how many there are."""
        return sum(record["right"] for record in self.asked), len(self.asked)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % interval of the accuracy."""
        right, total = self.counts
        return wilson(right, total) if total else None

    def beside(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """This model's prediction for the question of another model's prediction; None if it has none."""
        own = self._by_id.get(record["id"])
        if own is None or own["question"] != record["question"] or "left_out" in own:
            return None
        return {name: own.get(name) for name in ("reply", "prediction", "right")}

    def paired(self, other: Predictions) -> dict[str, Any] | None:
        """The exact paired test of this model and another on the questions that both were asked; None without any."""
        pairs = [(record["right"], found["right"]) for record in self.asked if (found := other.beside(record))]
        return paired_test([a for a, _ in pairs], [b for _, b in pairs]) | {"questions": len(pairs)} if pairs else None

    def shown(self, most: int, others: Sequence[Predictions]) -> list[dict[str, Any]]:
        """The records that fit into this many bytes with those beside them, in their order: as many right as wrong
        ones from the start, as far as there are."""
        groups = [[i for i, r in enumerate(self.records) if bool(r["right"]) is right] for right in (True, False)]
        order = sorted((at, i) for group in groups for at, i in enumerate(group))
        chosen, left = [], most
        for _, i in order:
            record = self.records[i]
            left -= len(json.dumps([record, *(other.beside(record) for other in others)]))
            if left < 0:
                break
            chosen.append(i)
        return [self.records[i] for i in sorted(chosen)]

    @functools.cached_property
    def _by_id(self) -> dict[str, dict[str, Any]]:
        return {record["id"]: record for record in self.records}


def read_all(paths: Sequence[str]) -> list[Predictions]:
    """The predictions of several files or folders.

    Raises:
        FileNotFoundError, ValueError: a file is missing or is not one of ``molsaki evaluate``.
    """
    found: list[Predictions] = []
    for path in paths:
        file = predictions_file(path)
        records = read_lines("--predictions", path)
        beside = file.with_name(SUMMARY)
        summary: dict[str, Any] = {}
        if beside.is_file():
            try:
                summary = json.loads(beside.read_text(encoding="utf-8"))
                if not isinstance(summary, dict):
                    raise ValueError(f"expected an object, got {type(summary).__name__}")
            except ValueError as error:
                logger.warning("%s: cannot be read: %s", beside, error)
                summary = {}
        name = file.resolve().parent.name
        same = sum(one.name.partition(" (")[0] == name for one in found)
        found.append(Predictions(path, f"{name} ({same + 1})" if same else name, records, summary))
    if len(found) > 1:
        questions = {record["id"]: record["question"] for record in found[0].records}
        for other in found[1:]:
            if not any(questions.get(record["id"]) == record["question"] for record in other.records):
                raise ValueError(f"--predictions: {other.path}: has no question of {found[0].path}")
    return found
