"""benchmarks/extract.py runs, and its contenders run the same tokens."""

from __future__ import annotations

import csv

from benchmarks.extract import main
from tests.helpers import tiny
from tests.helpers.tiny import one_thread  # noqa: F401


def test_rows(tmp_path, capsys):
    teacher = tiny.save(tmp_path / "teacher", 2)
    rows = [*tiny.problems(6), {**tiny.problems(1)[0], "id": "none", "rationale": ""}]
    data = tiny.write_jsonl(tmp_path / "train.jsonl", rows)
    words = ["--model", teacher, "--data", data, "--rounds", 2, "--csv", tmp_path / "rows.csv", "--batch_tokens", 300]
    for _ in range(2):
        main([str(word) for word in [*words, "--device", "cpu"]])
    with (tmp_path / "rows.csv").open() as file:
        found = list(csv.DictReader(file))
    first, again = found[: len(found) // 2], found[len(found) // 2 :]
    assert [(row["contender"], row["quantity"]) for row in first] == [(r["contender"], r["quantity"]) for r in again]
    assert {row["contender"] for row in first} == {"plain", "plain, packed", "extract", "extract, padded"}
    lengths = [len(tiny.tokenizer()(row["question"] + " " + row["rationale"]).input_ids) for row in rows[:6]]
    assert {(int(row["texts"]), int(row["tokens"])) for row in found} == {(6, sum(lengths))}
    assert all(float(row["value"]) > 0 for row in found)
    assert "time over plain, packed" in capsys.readouterr().out
