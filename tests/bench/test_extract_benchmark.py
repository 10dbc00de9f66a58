"""Tests that benchmarks/extract.py runs and that its contenders process the same tokens."""

from __future__ import annotations

import csv

from benchmarks.extract import main
from tests.helpers import tiny
from tests.helpers.tiny import one_thread  # noqa: F401


def test_records(tmp_path, capsys):
    teacher = tiny.save(tmp_path / "teacher", 2)
    examples = [*tiny.problems(6), {**tiny.problems(1)[0], "id": "none", "rationale": ""}]
    data = tiny.write_jsonl(tmp_path / "train.jsonl", examples)
    words = [
        "--model",
        teacher,
        "--data",
        data,
        "--rounds",
        2,
        "--csv",
        tmp_path / "extract.csv",
        "--batch_tokens",
        300,
    ]
    for _ in range(2):
        main([str(word) for word in [*words, "--device", "cpu"]])
    with (tmp_path / "extract.csv").open() as file:
        found = list(csv.DictReader(file))
    first, again = found[: len(found) // 2], found[len(found) // 2 :]
    assert [(r["contender"], r["quantity"]) for r in first] == [(r["contender"], r["quantity"]) for r in again]
    assert {r["contender"] for r in first} == {"plain", "plain, packed", "extract", "extract, padded"}
    lengths = [len(tiny.tokenizer()(e["question"] + " " + e["rationale"]).input_ids) for e in examples[:6]]
    assert {(int(r["texts"]), int(r["tokens"])) for r in found} == {(6, sum(lengths))}
    assert all(float(r["value"]) > 0 for r in found)
    assert "time over plain, packed" in capsys.readouterr().out
