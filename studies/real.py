"""Prepares the check with a real model: SmolLM2-135M as teacher, some of its layers as student, on word problems.

    python -m studies.real studies/work/real --data DIR           the small form, for a CPU
    python -m studies.real studies/work/real-gpu --data DIR --gpu  the large form, for a GPU
    molsaki study FOLDER/real.yaml                                 (or real-gpu.yaml)

DIR has ``svamp_train.jsonl``, ``svamp_train_gpt35.jsonl`` and ``svamp_test.jsonl``; for the large form also
``singleeq_test``, ``asdiv_test``, ``gsm8k_train`` and ``gsm8k_test``: objects with ``id``, ``question``, ``gold`` and,
for the training, ``rationale``. A rationale is kept if the last number in it is right, it has at most 400 characters,
and its question is in no test. The teacher is trained on the rationales first, so that its attention has to do with
them; the student is cut from it and trained on those of SVAMP. In the large form the teacher also learns from GSM8K.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molsaki.evaluation.scoring import score as score_reply
from molsaki.io import read_json_lines, write_json_lines
from molsaki.text.examples import Example

DEMO = Path(__file__).parents[1] / "examples" / "demo"
SVAMP = ("svamp_train", "svamp_train_gpt35")
LONGEST = 400  # characters of a rationale


@dataclasses.dataclass(frozen=True)
class Form:
    """What the two forms of the check differ in.

    Attributes:
        teacher: the files that the teacher is trained on.
        tests: the files of each test; a file may be cut to its first rows.
        layers: of the student.
        teacher_steps, options: of the teacher's training.
    """

    study: str
    teacher: tuple[str, ...]
    tests: dict[str, tuple[tuple[str, int | None], ...]]
    layers: int
    teacher_steps: int
    options: tuple[str, ...]


SMALL = Form(
    study="real.yaml",
    teacher=SVAMP,
    tests={"test": (("svamp_test", None),)},
    layers=10,
    teacher_steps=150,
    options=("--per_device_train_batch_size", "8"),
)
LARGE = Form(
    study="real-gpu.yaml",
    teacher=(*SVAMP, "gsm8k_train"),
    tests={
        "problems": (("svamp_test", None), ("singleeq_test", None), ("asdiv_test", None)),
        "gsm8k": (("gsm8k_test", 500),),
    },
    layers=12,
    teacher_steps=150,
    options=("--per_device_train_batch_size", "32", "--limit", "4800", "--bf16", "true"),
)


def write_data(folder: Path, source: Path, form: Form = SMALL) -> dict[str, int]:
    """Write the training examples of student and teacher and each test; the number of examples of each file."""
    tests = {
        name: [row for file, limit in files for row in read_json_lines(source / f"{file}.jsonl")[:limit]]
        for name, files in form.tests.items()
    }
    asked = {_words(row["question"]) for rows in tests.values() for row in rows}
    kept: dict[str, list[dict[str, Any]]] = {}
    for name in form.teacher:
        kept[name] = []
        for row in read_json_lines(source / f"{name}.jsonl"):
            rationale, seen = row.get("rationale"), _words(row["question"]) in asked
            if rationale and len(rationale) <= LONGEST and not seen:
                example = Example(row["id"], row["question"], rationale, row["gold"])
                if score_reply(example, rationale, "rationale")["right"]:
                    kept[name].append(row | {"answer": row["gold"]})
    files = {"train": [row for name in SVAMP for row in kept[name]]} | tests
    if form.teacher != SVAMP:
        files["teacher"] = [row for rows in kept.values() for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        write_json_lines(folder / f"{name}.jsonl", rows)
    return {name: len(rows) for name, rows in files.items()}


def _words(question: str) -> str:
    """The question without punctuation, cases and spaces, in which the two files of it differ."""
    return re.sub(r"\W+", " ", question.lower()).strip()


def score(rows: list[dict[str, Any]], replies: list[str]) -> dict[str, list[bool | None]]:
    """Whether each reply is right, under the name of the data set that its problem is from (``real-gpu.yaml``)."""
    names = [str(row["id"]).split("-", 1)[0] for row in rows]
    examples = [Example(row["id"], row["question"], "", row["gold"]) for row in rows]
    right = [
        bool(score_reply(example, reply, "rationale")["right"])
        for example, reply in zip(examples, replies, strict=True)
    ]
    return {
        name: [one if name == own else None for one, own in zip(right, names, strict=True)]
        for name in dict.fromkeys(names)
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--gpu", action="store_true", help="the large form")
    parser.add_argument("--teacher_steps", type=int, help="instead of the form's number of steps")
    args = parser.parse_args(argv)
    folder, form = args.folder, LARGE if args.gpu else SMALL
    print(write_data(folder / "data", args.data, form), flush=True)

    def run(*words: str | Path) -> None:
        subprocess.run([sys.executable, *map(str, words)], check=True)

    run(DEMO / "make_teacher.py", folder / "smollm2")
    train = folder / "data" / ("train.jsonl" if form.teacher == SVAMP else "teacher.jsonl")
    steps = form.teacher_steps if args.teacher_steps is None else args.teacher_steps
    state = folder / "teacher" / "trainer_state.json"
    if state.exists():
        found = json.loads(state.read_text(encoding="utf-8"))["max_steps"]
        if found != steps:
            raise SystemExit(
                f"{folder / 'teacher'}: was trained for {found} steps, not {steps}; delete it or take those"
            )
    else:
        shutil.rmtree(folder / "student", ignore_errors=True)  # of an earlier teacher
        run(
            *("-m", "molsaki.cli", "distill", "--objective", "dss", "--student", folder / "smollm2"),
            *("--train_file", train, "--output_dir", folder / "teacher", "--packing", "true", *form.options),
            *(
                "--max_steps",
                str(steps),
                "--learning_rate",
                "1e-4",
                "--lr_scheduler_type",
                "cosine",
                "--warmup_steps",
                "10",
            ),
            *("--save_strategy", "no", "--disable_tqdm", "true"),
        )
    run(DEMO / "cut_student.py", folder / "teacher", folder / "student", "--layers", str(form.layers))
    study = Path(__file__).with_name(form.study)
    (folder / study.name).write_text(study.read_text(encoding="utf-8"), encoding="utf-8")


if __name__ == "__main__":
    main()
