"""Reads the folder of a run of ``molsaki distill``: options, logged values, layer weights, timings."""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from molsaki.reporting.maps import saved_options
from molsaki.run_files import WEIGHTS_LOG, last_state
from molsaki.training.run_record import RECORD, read_attempts

logger = logging.getLogger(__name__)

MOST_POINTS = 400  # of one curve; with more, the smallest and the largest of neighbours are kept
MOST_RECORDS, MOST_WEIGHTS = 300, 150_000  # of the layer weights: points in time, and numbers of one side
LEFT_OUT = "left_out.json"

# The panels of curves, and the logged names in each, without the prefix of an evaluation.
PANELS = {
    "Loss": ("loss",),
    "Cross-entropy": ("loss_pre", "loss_exp"),
    "Attention loss": ("loss_att", "loss_att_uniform"),
    "Between tasks, or with the teacher's logits": ("loss_mmi", "loss_logits"),
    "Overlap of the maps": ("map_overlap",),
    "Accuracy during training": ("accuracy",),
    "Attention loss: share of the gradient": ("attention_share",),
    "Attention loss: weight (beta)": ("beta",),
    "Entropy of the layer weights": ("entropy_teacher", "entropy_student"),
    "Steps and key words per example": ("steps_mean", "words_mean"),
    "Examples without key words": ("without_words",),
    "Learning rate": ("learning_rate",),
    "Norm of the gradient": ("grad_norm",),
}
MEANINGS = {
    "loss": "the loss that is minimised (Eq. 7)",
    "loss_pre": "cross-entropy of the answers",
    "loss_exp": "cross-entropy of the rationales",
    "loss_att": "attention loss: how far the student's map is from the teacher's (Eq. 6), nats",
    "loss_att_uniform": "the same, with all layers of the student weighted alike",
    "loss_mmi": "cross-entropy between the predictions of the two tasks",
    "loss_logits": "divergence from the teacher's logits",
    "map_overlap": "the part of each step's attention that both maps have in common, 0 to 1",
    "accuracy": "share of right replies",
    "attention_share": "norm of the attention loss's gradient, as a share of that of the other losses",
    "beta": "weight of the attention loss",
    "entropy_teacher": "entropy of the teacher's layer weights, nats",
    "entropy_student": "entropy of the student's layer weights, nats",
    "learning_rate": "learning rate of the student",
    "grad_norm": "norm of the student's gradient, before it is clipped",
    "steps_mean": "steps per example: rows of its map",
    "words_mean": "key words per example: columns of its map",
    "without_words": "examples without key words",
}
NOT_CURVES = ("step", "epoch", "total_flos", "num_input_tokens_seen")
OF_TIME = ("_runtime", "_per_second", "_preparation_time")


@dataclasses.dataclass(frozen=True)
class RunLogs:
    """A run's folder.

    Attributes:
        options: as in ``distill.json``; empty if there is none.
        state: the trainer's state without its log: ``global_step``, ``max_steps``, ``epoch``.
        history: the logged values, one mapping per entry.
        weights: the lines of ``layer_weights.jsonl``.
        attempts: of ``run.json``.
        is_finished: whether the student was exported.
        left_out: examples that were left out, by reason; None if unknown.
    """

    folder: Path
    options: dict[str, Any]
    state: dict[str, Any]
    history: list[dict[str, Any]]
    weights: list[dict[str, Any]]
    attempts: list[dict[str, Any]]
    is_finished: bool
    left_out: dict[str, int] | None

    @classmethod
    def read(cls, folder: Path) -> RunLogs:
        """Raises FileNotFoundError if there is no run in the folder."""
        if not folder.is_dir():
            raise FileNotFoundError(f"--run: no such folder: {folder}")
        found = last_state(folder)
        state: dict[str, Any] = {} if found is None else json.loads(found.read_text(encoding="utf-8"))
        options, weights = saved_options(folder), _whole_lines(folder / WEIGHTS_LOG)
        attempts = read_attempts(folder / RECORD)
        if not (state or options or weights or attempts):
            raise FileNotFoundError(
                f"--run: {folder}: expected the output_dir of molsaki distill, but it has neither a checkpoint nor "
                f"distill.json, {WEIGHTS_LOG} or {RECORD}"
            )
        history = state.pop("log_history", [])
        left_out = folder / LEFT_OUT
        counts = json.loads(left_out.read_text(encoding="utf-8")) if left_out.is_file() else None
        return cls(
            folder,
            options,
            state,
            history,
            weights,
            attempts,
            found is not None and found.parent == folder,
            None if counts is None else _counted(counts),
        )

    @property
    def seconds(self) -> float | None:
        """The time of the training over all attempts, if known."""
        recorded = [one["seconds"] for one in self.attempts if isinstance(one.get("seconds"), (int, float))]
        if recorded:
            return float(sum(recorded))
        last = [entry["train_runtime"] for entry in self.history if "train_runtime" in entry]
        return float(last[-1]) if last else None

    @property
    def values(self) -> dict[str, list[tuple[int, float]]]:
        """The steps and values of every logged number, by name."""
        found: dict[str, list[tuple[int, float]]] = {}
        for entry in self.history:
            for name, value in entry.items():
                is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if (
                    is_number
                    and name not in NOT_CURVES
                    and not name.startswith("train_")
                    and not name.endswith(OF_TIME)
                ):
                    found.setdefault(name, []).append((entry.get("step", 0), float(value)))
        return found


def _counted(left_out: Any) -> dict[str, int] | None:
    """The number of examples by reason."""
    if not isinstance(left_out, dict):
        return None
    return {str(reason): len(ids) if isinstance(ids, list) else 1 for reason, ids in left_out.items()}


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The records of JSON lines, without an incomplete last one."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def base_name(name: str) -> str:
    """A logged name without the prefix of an evaluation, which may have the name of a data set."""
    if not name.startswith("eval_"):
        return name
    known = [base for base in MEANINGS if name.endswith(f"_{base}")]
    return max(known, key=len) if known else name.removeprefix("eval_")


def meaning_of(name: str) -> str:
    base = base_name(name)
    prefix = name.removesuffix(base).rstrip("_").removeprefix("eval").strip("_") if name != base else ""
    where = "" if name == base else "evaluation: " if not prefix else f"evaluation on {prefix}: "
    return where + MEANINGS.get(base, "")


def curves_of(values: dict[str, list[tuple[int, float]]]) -> list[dict[str, Any]]:
    """The panels for the page, each with its series; a name without a panel gets its own."""
    panels: dict[str, list[str]] = {title: [] for title in PANELS}
    of_base = {base: title for title, bases in PANELS.items() for base in bases}
    for name in values:
        panels.setdefault(of_base.get(base_name(name), base_name(name)), []).append(name)
    order = {base: number for number, base in enumerate(MEANINGS)}
    found = []
    for title, names in panels.items():
        names = sorted(names, key=lambda name: (order.get(base_name(name), len(order)), name))
        constant = [
            name for name in names if base_name(name) == "without_words" and not any(v for _, v in values[name])
        ]
        names = [name for name in names if name not in constant]
        if names:
            series = [{"name": name, "meaning": meaning_of(name)} | _thinned(values[name]) for name in names]
            found.append({"title": title, "series": series})
    return found


def _thinned(points: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """At most `MOST_POINTS` of a curve's points; ``of`` is their number, ``bad`` that of values that are not finite."""
    size = -(-2 * len(points) // MOST_POINTS) if len(points) > MOST_POINTS else 1
    kept: list[tuple[int, float]] = []
    for first in range(0, len(points), size):
        block = points[first : first + size]
        good = [point for point in block if math.isfinite(point[1])]
        ends = {min(good, key=lambda p: p[1]), max(good, key=lambda p: p[1])} if good else {block[0]}
        kept += sorted(ends | ({block[-1]} if first + size >= len(points) else set()), key=lambda p: p[0])
    return {
        "x": [x for x, _ in kept],
        "y": [float(f"{y:.6g}") if math.isfinite(y) else None for _, y in kept],
        "of": len(points),
        "bad": sum(not math.isfinite(y) for _, y in points),
    }


def weights_of(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The layer weights of both sides for the page: bytes ``254 sqrt(weight)``, one row per point in time."""
    last = records[-1] if records else {}
    lengths = {side: len(last[side]) for side in ("teacher", "student") if last.get(side)}
    whole = [r for r in records if all(len(r.get(side, ())) == n for side, n in lengths.items())]
    if not lengths or not whole:
        return None
    most = max(min(MOST_RECORDS, MOST_WEIGHTS // max(lengths.values())), 2)
    chosen = sorted({round(i) for i in np.linspace(0, len(whole) - 1, min(most, len(whole)))})
    sides = []
    for side, layers in lengths.items():
        values = np.asarray([whole[i][side] for i in chosen], dtype=float)
        is_finite = np.isfinite(values)
        data = np.where(is_finite, np.rint(254 * np.sqrt(np.where(is_finite, values, 0).clip(0, 1))), 255)
        text = base64.b64encode(data.astype(np.uint8).tobytes()).decode()
        sides.append({"name": side, "layers": layers, "data": text})
    return {"steps": [whole[i]["step"] for i in chosen], "of": len(whole), "sides": sides}
