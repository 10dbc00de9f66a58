"""Reads the results of a study's runs and writes them as two CSV files: one of accuracies, one of curves."""

from __future__ import annotations

import collections
import csv
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from molsaki.io import atomic_write, read_json_lines
from molsaki.study.config import Run, Study
from molsaki.study.run import LOG, RESULT
from molsaki.text.examples import read_examples

NO_COLUMNS = ("seed", "content of ")  # options whose names begin so have no column
NOT_LOGGED = "train_runtime"  # in the trainer's summary, which is not a point of a curve


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """One finished run.

    Attributes:
        record: the content of its ``result.json``.
        right: for each test, whether each example that could be asked was answered right, by id.
        scores: for each test, the means of what the study's own scoring function returns.
        most_common: for each test, the share of replies that give the most common answer.
    """

    run: Run
    record: dict[str, Any]
    right: dict[str, dict[str, bool]]
    scores: dict[str, dict[str, float]]
    most_common: dict[str, float]


def read_results(study: Study) -> list[Result]:
    """The finished runs of a study, in the order of its runs.

    Raises:
        TypeError, ValueError: the study's scoring function returns an invalid value.
    """
    scorer = study.scorer()

    @functools.cache
    def rows_of(file: str) -> dict[str, dict[str, Any]]:
        examples = read_examples(study.file(file), rationale=False)
        return {examples[i].id: examples.record(i) for i in range(len(examples))}

    results = []
    for run in study.runs:
        path = run.folder / RESULT
        if not path.is_file():
            continue
        result = Result(run, json.loads(path.read_text(encoding="utf-8")), {}, {}, {})
        for test, file in run.tests.items():
            lines = read_json_lines(run.folder / "tests" / test / "predictions.jsonl")
            asked = [one for one in lines if "left_out" not in one]
            result.right[test] = {one["id"]: one["right"] for one in asked}
            counts = collections.Counter(one["prediction"] for one in asked)
            result.most_common[test] = max(counts.values(), default=0) / max(len(asked), 1)
            result.scores[test] = {}
            if scorer is not None:
                rows = rows_of(file)
                found = scorer([rows[one["id"]] for one in asked], [one["reply"] for one in asked])
                result.scores[test] = _means(study, found, len(asked))
        results.append(result)
    return results


def results_table(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One row per run and test set, by column."""
    options = _differing(results)
    rows = []
    for result in results:
        record, run = result.record, result.run
        for test, found in record["tests"].items():
            row: dict[str, Any] = {"data": run.data, "arm": run.arm, "seed": run.seed, "test": test}
            row |= {"accuracy": found["accuracy"], "right": found["right"], "total": found["examples"]}
            row |= {"without_answer": found["without_answer"], "most_common_answer": result.most_common[test]}
            row |= {"left_out": found["left_out"]}
            row |= result.scores[test]
            row |= record["losses"]
            row |= {name: record[name] for name in ("steps", "resumed_at_step", "train_seconds", "step_ms")}
            row |= {"evaluate_seconds": found["seconds"]}
            row |= {name: record["data"][name] for name in ("examples", "without_words")}
            row |= {name: record["options"].get(name) for name in options}
            row |= record["versions"] | {name: record.get(name) for name in ("commit", "study_commit")}
            row |= record["machine"] | {"date": record["date"]}
            rows.append(row)
    return rows


def curves_table(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One row per run and logged step, by column: losses, learning rate, accuracy along the way, and so on."""
    rows = []
    for result in results:
        run, points = result.run, dict[int, dict[str, Any]]()
        for entry in json.loads((run.folder / LOG).read_text(encoding="utf-8")):
            if NOT_LOGGED not in entry:
                points.setdefault(entry["step"], {}).update(entry)
        for step, values in sorted(points.items()):
            rows.append({"data": run.data, "arm": run.arm, "seed": run.seed, "step": step} | values)
    return rows


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows by column name; a column that a row lacks is empty there. The file is complete or absent."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _differing(results: Sequence[Result]) -> list[str]:
    """The options that differ between arms of the same data set and seed."""
    found: dict[str, None] = {}
    by_pair: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for result in results:
        by_pair.setdefault((result.run.data, result.run.seed), []).append(result.record["options"])
    for records in by_pair.values():
        for name in dict.fromkeys(name for record in records for name in record):
            if not name.startswith(NO_COLUMNS) and any(one.get(name) != records[0].get(name) for one in records):
                found[name] = None
    return list(found)


def _means(study: Study, found: Any, count: int) -> dict[str, float]:
    """The mean of each of the scoring function's numbers per example, by column name; None is left out."""
    if not isinstance(found, Mapping):
        raise TypeError(
            f"{study.path}: score: expected {study.score} to return a dict of one number per example, got "
            f"{type(found).__name__}"
        )
    for name, numbers in found.items():
        if len(numbers) != count:
            raise ValueError(
                f"{study.path}: score: expected {count} numbers for {name!r} of {study.score}, got {len(numbers)}"
            )
    means = {}
    for name, numbers in found.items():
        given = [float(number) for number in numbers if number is not None]
        if given:
            means[f"score.{name}"] = sum(given) / len(given)
    return means
