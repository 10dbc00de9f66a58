"""Compares the predictions that ``molsaki evaluate`` wrote for several seeds, without running a model."""

from __future__ import annotations

import csv
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molsaki.config import EvaluateConfig, require
from molsaki.evaluation.statistics import accuracy, difference, paired_test
from molsaki.io import atomic_write, read_json_lines, write_json
from molsaki.text.examples import Example

logger = logging.getLogger(__name__)

PREDICTIONS = "predictions.jsonl"


def compare(config: EvaluateConfig) -> dict[str, Any]:
    """Score the seeds of ``config.predictions``; with ``config.compare`` also their paired differences to a baseline.

    ``compare.csv`` in ``config.output_dir`` has one row per seed, with intervals over the problems, and the row
    ``all``, with intervals over seeds and problems (`molsaki.evaluation.statistics`). Questions that any run left out
    count in no result.

    Returns:
        The summary, which ``summary.json`` holds too: ``questions``, ``left_out`` (ids), the columns of the row
        ``all``; and ``table``, a text.

    Raises:
        ValueError: another option of the command is set, the files do not have the same questions and gold answers, a
            file is given twice, or the lists differ in length.
        FileNotFoundError: there is no such file.
    """
    folder = Path(require(config, "output_dir"))
    used = ("predictions", "compare", "output_dir")
    for field, default in zip(dataclasses.fields(config), dataclasses.astuple(EvaluateConfig()), strict=True):
        if field.name not in used and getattr(config, field.name) != default:
            value = getattr(config, field.name)
            raise ValueError(f"--{field.name}: has no effect with --predictions, which runs no model; got {value!r}")
    if config.compare and len(config.compare) != len(config.predictions):
        raise ValueError(
            f"--compare: expected {len(config.predictions)} paths, one per path of --predictions and in the same "
            f"order, got {len(config.compare)}: {' '.join(config.compare)}"
        )
    if (folder / PREDICTIONS).exists():
        raise ValueError(
            f"--output_dir: {folder}: expected a folder without {PREDICTIONS}; its summary.json would be overwritten"
        )
    files = {predictions_file(path).resolve() for path in (*config.predictions, *config.compare)}
    if len(files) < len(config.predictions) + len(config.compare):
        raise ValueError("--predictions, --compare: expected a different file per seed, got one twice")

    first = read_lines("--predictions", config.predictions[0])
    examples = [Example(one["id"], one["question"], "", one["gold"]) for one in first]
    read = [read_predictions("--predictions", path, examples) for path in config.predictions]
    read += [read_predictions("--compare", path, examples) for path in config.compare]
    kept = [number for number in range(len(examples)) if all(one[number] is not None for one in read)]
    left_out = [examples[number].id for number in sorted(set(range(len(examples))) - set(kept))]
    if left_out:
        logger.warning("%d of %d questions are left out: a run did not ask them", len(left_out), len(examples))
    if len(kept) < 2:
        raise ValueError(f"--predictions: expected at least two questions that all runs answered, got {len(kept)}")
    right = np.array([[one[number] for number in kept] for one in read], dtype=bool)
    right, baseline = right[: len(config.predictions)], right[len(config.predictions) :]

    rows: list[dict[str, Any]] = []
    for i, path in enumerate(config.predictions):
        row: dict[str, Any] = {"seed": str(i), "predictions": path}
        if config.compare:
            test = paired_test(right[i].tolist(), baseline[i].tolist())
            row |= {"compare": config.compare[i], "mcnemar_p_value": test["p_value"]}
        rows.append(row | _row(right[i : i + 1], baseline[i : i + 1]))
    whole = _row(right, baseline)
    rows.append({"seed": "all"} | whole)
    summary = {"predictions": config.predictions, "compare": config.compare, "seeds": len(right)}
    summary |= {"questions": len(kept), "left_out": left_out} | whole
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "compare.csv") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_json(folder / "summary.json", summary, indent=2)
    return summary | {"table": _table(rows)}


def predictions_file(path: str) -> Path:
    """The file of predictions that a path names: the path itself or, for a folder, the file in it."""
    return Path(path, PREDICTIONS) if Path(path).is_dir() else Path(path)


def read_lines(flag: str, path: str) -> list[dict[str, Any]]:
    """The records of a predictions.jsonl.

    Raises:
        ValueError: the file is not one.
        FileNotFoundError: there is no such file.
    """
    file = predictions_file(path)
    if not file.is_file():
        raise FileNotFoundError(f"{flag}: no such file: {file}")
    try:
        lines = read_json_lines(file)
        if not all(isinstance(one["right"], bool) and {"id", "question", "gold"} <= one.keys() for one in lines):
            raise ValueError("a line lacks id, question, gold or right")
        if len({one["id"] for one in lines}) < len(lines):
            raise ValueError("an id occurs twice")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{flag}: {path}: not a predictions.jsonl of molsaki evaluate ({error!r})") from None
    return lines


def read_predictions(flag: str, path: str, examples: Sequence[Example]) -> list[bool | None]:
    """For each example, whether the model of a predictions.jsonl answered it right; None if it was left out.

    Args:
        flag: the option that names the path, for errors.
        path: the file or its folder.
        examples: the questions that the file is expected to hold, in any order.

    Raises:
        ValueError: the file is not a predictions.jsonl, or has other questions or gold answers.
        FileNotFoundError: there is no such file.
    """
    lines = read_lines(flag, path)
    found = {one["id"]: one for one in lines}
    missing = [e.id for e in examples if e.id not in found]
    if missing or len(lines) != len(examples):
        detail = f"lacks {missing[0]!r}" if missing else f"holds {len(lines)} examples instead of {len(examples)}"
        raise ValueError(f"{flag}: {path}: has other questions: it {detail}")
    for e in examples:
        question, gold = found[e.id]["question"], found[e.id]["gold"]
        if (question, gold) != (e.question, e.answer):
            raise ValueError(
                f"{flag}: {path}: has other questions: expected {e.id!r} to be {e.question!r} with the answer "
                f"{e.answer!r}, got {question!r} with {gold!r}"
            )
    return [None if "left_out" in found[e.id] else found[e.id]["right"] for e in examples]


def _row(right: NDArray[np.bool_], baseline: NDArray[np.bool_]) -> dict[str, Any]:
    """The statistics of several seeds by name; discordant pairs are summed over the seeds."""
    of_right = accuracy(right)
    row: dict[str, Any] = {"over": of_right.over}
    parts: dict[str, Any] = {"accuracy": of_right}
    if len(baseline):
        parts |= {"compare": accuracy(baseline), "difference": difference(right, baseline)}
        row |= {"only_this": int((right & ~baseline).sum()), "only_other": int((baseline & ~right).sum())}
    for name, part in parts.items():
        row |= {f"{name}_{key}": value for key, value in part._asdict().items() if key != "over"}
    return row


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of the rows, in percent, with the intervals to report."""
    names = [name for name in ("accuracy", "compare", "difference") if f"{name}_mean" in rows[0]]
    paired = ["p_value", "only_this", "only_other"] if "difference" in names else []
    lines = [["seed", *names, *paired], ["---"] * (1 + len(names) + len(paired))]
    for row in rows:
        cells = [
            "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * row[f"{n}_{k}"] for k in ("mean", "low", "high"))) for n in names
        ]
        if paired:
            cells += [f"{row['difference_p_value']:.3g}", str(row["only_this"]), str(row["only_other"])]
        lines.append([row["seed"], *cells])
    return "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
