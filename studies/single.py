"""Chooses the two layers of the arm ``single-10``: the best pair of a grid, by accuracy on the validation problems.

Every layer of the teacher is tried with every layer of the student, with seeds that are not in the study, in 400 steps.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from molsaki.io import write_json

SEEDS = [0, 100]
STEPS = 400
NAME = "single"
_PART_OF_THE_STUDY = ("baseline", "primary", "curve", "score")


def write_grid(study: str, folder: Path, teacher_layers: int, student_layers: int) -> Path:
    """Write the grid's YAML file, with the options of the study's.

    Args:
        study: the text of evidence.yaml, with its placeholders.
        folder: of studies.prepare.
    """
    grid: dict[str, Any] = yaml.safe_load(study)
    grid = {key: value for key, value in grid.items() if key not in _PART_OF_THE_STUDY}
    grid |= {"output_dir": NAME, "seeds": SEEDS, "keep_students": False}
    grid["options"]["max_steps"] = STEPS
    grid["data"]["world"]["tests"] = {"validation": "data/validation.jsonl"}
    grid["arms"] = {
        f"{t}-{s}": {"attention_share": 0.1, "mixture": "single", "teacher_layer": t, "student_layer": s}
        for t in range(teacher_layers)
        for s in range(student_layers)
    }
    path = folder / f"{NAME}.yaml"
    path.write_text(yaml.safe_dump(grid, sort_keys=False), encoding="utf-8")
    return path


def run(grid: Path, processes: int) -> None:
    words = ["-m", "molsaki.cli", "study", str(grid), "--processes", str(processes), "--threads", "1"]
    subprocess.run([sys.executable, *words], check=True)


def choose(folder: Path) -> dict[str, Any]:
    """Write ``single.json``: the pair with the best mean accuracy over the seeds, and the accuracy of each pair."""
    accuracies: dict[str, list[float]] = {}
    with open(folder / NAME / "results.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            accuracies.setdefault(row["arm"], []).append(float(row["accuracy"]))
    arms = yaml.safe_load((folder / f"{NAME}.yaml").read_text(encoding="utf-8"))["arms"]
    missing = [arm for arm in arms if len(accuracies.get(arm, [])) != len(SEEDS)]
    if missing:
        raise ValueError(f"{folder / NAME}: expected {len(SEEDS)} runs of each pair; some of {missing} are missing")
    best = max(accuracies, key=lambda arm: sum(accuracies[arm]) / len(accuracies[arm]))
    teacher, student = map(int, best.split("-"))
    found = {"teacher_layer": teacher, "student_layer": student, "seeds": SEEDS, "accuracies": accuracies}
    write_json(folder / f"{NAME}.json", found, indent=1)
    return found
