"""Prepares the check with a real model: SmolLM2-135M as teacher, ten of its layers as student, SVAMP.

    python -m studies.real studies/work/real --data DIR
    molsaki study studies/work/real/real.yaml

DIR has ``svamp_train.jsonl``, ``svamp_train_gpt35.jsonl`` and ``svamp_test.jsonl``: objects with ``id``, ``question``,
``rationale`` and ``gold``. A rationale is kept if the last number in it is right, it has at most 400 characters, and
its question is not in the test. The teacher is trained on the rationales first, so that its attention has to do with
them; the student is cut from it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from molsaki.evaluation.scoring import score
from molsaki.io import read_json_lines, write_json_lines
from molsaki.text.examples import Example

STUDY = Path(__file__).with_name("real.yaml")
DEMO = Path(__file__).parents[1] / "examples" / "demo"
SOURCES = ("svamp_train", "svamp_train_gpt35")
LAYERS = 10
LONGEST = 400  # characters of a rationale


def write_data(folder: Path, source: Path) -> dict[str, int]:
    """Write the training examples and the test's; the number of examples of each file."""
    test = read_json_lines(source / "svamp_test.jsonl")
    asked = {_words(row["question"]) for row in test}
    kept = []
    for row in (row for name in SOURCES for row in read_json_lines(source / f"{name}.jsonl")):
        rationale, seen = row.get("rationale"), _words(row["question"]) in asked
        if rationale and len(rationale) <= LONGEST and not seen:
            example = Example(row["id"], row["question"], rationale, row["gold"])
            if score(example, rationale, "rationale")["right"]:
                kept.append(row | {"answer": row["gold"]})
    folder.mkdir(parents=True, exist_ok=True)
    write_json_lines(folder / "train.jsonl", kept)
    write_json_lines(folder / "test.jsonl", test)
    return {"train": len(kept), "test": len(test)}


def _words(question: str) -> str:
    """The question without punctuation, cases and spaces, in which the two files of it differ."""
    return re.sub(r"\W+", " ", question.lower()).strip()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of the SVAMP files")
    parser.add_argument("--teacher_steps", type=int, default=150)
    args = parser.parse_args(argv)
    folder: Path = args.folder
    print(write_data(folder / "data", args.data), flush=True)

    def run(*words: str | Path) -> None:
        subprocess.run([sys.executable, *map(str, words)], check=True)

    run(DEMO / "make_teacher.py", folder / "smollm2")
    if not (folder / "teacher" / "trainer_state.json").exists():
        run(
            *("-m", "molsaki.cli", "distill", "--objective", "dss", "--student", folder / "smollm2"),
            *("--train_file", folder / "data" / "train.jsonl", "--output_dir", folder / "teacher", "--packing", "true"),
            *("--max_steps", str(args.teacher_steps), "--per_device_train_batch_size", "8", "--learning_rate", "1e-4"),
            *("--lr_scheduler_type", "cosine", "--warmup_steps", "10", "--save_strategy", "no"),
        )
    run(DEMO / "cut_student.py", folder / "teacher", folder / "student", "--layers", str(LAYERS))
    (folder / STUDY.name).write_text(STUDY.read_text(encoding="utf-8"), encoding="utf-8")


if __name__ == "__main__":
    main()
