"""``molsaki evaluate --predictions``: several seeds at once, without a model."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from molsaki.cli import main
from molsaki.config import EvaluateConfig
from molsaki.evaluation.evaluate import evaluate
from molsaki.evaluation.statistics import accuracy, difference, paired_test
from molsaki.flags import parse
from molsaki.io import read_json_lines, write_json_lines
from tests.helpers import tiny


@pytest.fixture
def runs(tmp_path):
    """Three seeds of two methods on 40 questions, in another order per run; the answers of each method."""
    answers = np.random.default_rng(0).random((2, 3, 40)) < [[[0.6]], [[0.3]]]
    for name, method in zip("ab", answers, strict=True):
        for seed, right in enumerate(method):
            records = [
                {"id": f"p{i}", "question": f"{i}?", "gold": str(i), "right": bool(x)} for i, x in enumerate(right)
            ]
            (tmp_path / f"{name}{seed}").mkdir()
            tiny.write_jsonl(tmp_path / f"{name}{seed}" / "predictions.jsonl", records[seed:] + records[:seed])
    return tmp_path, answers


def config(folder, **options):
    options = dict(predictions=["a0", "a1", "a2"], compare=["b0", "b1", "b2"]) | options
    paths = {name: [str(folder / path) for path in value] for name, value in options.items()}
    return EvaluateConfig(**paths, output_dir=str(folder / "out"))


def edit(folder, run, number, **fields):
    path = folder / run / "predictions.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    tiny.write_jsonl(path, [one | (fields if one["id"] == f"p{number}" else {}) for one in records])


def test_seeds_are_paired_in_order(runs):
    folder, (right, baseline) = runs
    summary = evaluate(config(folder))
    table = summary.pop("table").strip().splitlines()
    assert json.loads((folder / "out/summary.json").read_text()) == summary
    assert (summary["seeds"], summary["questions"], summary["left_out"]) == (3, 40, [])
    whole, of_right = difference(right, baseline), accuracy(right)
    assert {k: summary[f"difference_{k}"] for k in whole._fields if k != "over"} | {"over": summary["over"]} == (
        whole._asdict()
    )
    assert [summary[f"accuracy_{k}"] for k in ("mean", "low", "high")] == list(of_right[:3])
    assert summary["compare_mean"] == baseline.mean()
    with open(folder / "out/compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["0", "1", "2", "all"]
    assert [row["over"] for row in rows] == ["problems"] * 3 + ["seeds and problems"]
    assert rows[1]["compare"] == str(folder / "b1")
    assert float(rows[3]["difference_low"]) == whole.low
    for i in range(3):
        expected = paired_test(right[i].tolist(), baseline[i].tolist())
        assert float(rows[i]["mcnemar_p_value"]) == expected["p_value"]
        assert [int(rows[i][k]) for k in ("only_this", "only_other")] == [
            expected["only_this"],
            expected["only_other"],
        ]
        assert float(rows[i]["difference_mean"]) == pytest.approx(right[i].mean() - baseline[i].mean())
    assert int(rows[3]["only_this"]) == (right & ~baseline).sum()
    cell = f"{100 * whole.mean:.1f} [{100 * whole.low:.1f}, {100 * whole.high:.1f}]"
    assert len(table) == 6 and table[-1].startswith("| all |") and f"| {cell} | {whole.p_value:.3g} |" in table[-1]


def test_texts_with_characters_that_end_lines(runs):
    folder, _ = runs
    for run in ("a0", "b0"):
        records = read_json_lines(folder / run / "predictions.jsonl")
        write_json_lines(folder / run / "predictions.jsonl", [one | {"reply": "1\u2028\x852"} for one in records])
    assert evaluate(config(folder))["questions"] == 40


def test_one_method_alone(runs, capsys):
    """On the command line, with files instead of folders."""
    folder, (right, _) = runs
    paths = [str(folder / f"a{i}" / "predictions.jsonl") for i in range(3)]
    assert main(["evaluate", "--predictions", *paths, "--output_dir", str(folder / "out")]) == 0
    printed = capsys.readouterr().out
    assert f"accuracy_mean: {right.mean():.6g}" in printed and "| all | " in printed and "difference" not in printed


def test_a_question_left_out_by_one_run_is_in_no_number(runs, caplog):
    folder, (right, baseline) = runs
    edit(folder, "b1", 7, left_out="too long", right=False)
    summary = evaluate(config(folder))
    assert (summary["questions"], summary["left_out"]) == (39, ["p7"])
    assert summary["accuracy_mean"] == np.delete(right, 7, 1).mean()
    assert summary["compare_mean"] == np.delete(baseline, 7, 1).mean()
    assert "1 of 40 questions are left out" in caplog.text


def test_files_of_other_data_are_refused(runs):
    folder, _ = runs
    for run, flag in (("a2", "--predictions"), ("b0", "--compare")):
        for fields in ({"question": "How?"}, {"gold": "-1"}):
            saved = (folder / run / "predictions.jsonl").read_text()
            edit(folder, run, 3, **fields)
            with pytest.raises(ValueError, match=f"{flag}: .*{run}: has other questions: expected 'p3' to be"):
                evaluate(config(folder))
            (folder / run / "predictions.jsonl").write_text(saved)
    edit(folder, "b0", 3, id="q3")
    with pytest.raises(ValueError, match="b0: has other questions: it lacks 'p3'"):
        evaluate(config(folder))
    edit(folder, "a0", 3, id="p4")
    with pytest.raises(ValueError, match="--predictions: .*a0: not a predictions.jsonl .*an id occurs twice"):
        evaluate(config(folder))
    edit(folder, "a1", 3, right="yes")
    with pytest.raises(ValueError, match="a line lacks id, question, gold or right"):
        evaluate(config(folder, predictions=["a1"], compare=[]))
    assert not (folder / "out").exists()


def test_bad_options(runs):
    folder, _ = runs
    with pytest.raises(ValueError, match="--compare: expected 3 paths, one per path of --predictions .* got 2"):
        evaluate(config(folder, compare=["b0", "b1"]))
    with pytest.raises(ValueError, match="expected a different file per seed, got one twice"):
        evaluate(config(folder, predictions=["a0", "a1", "a0/predictions.jsonl"]))
    with pytest.raises(FileNotFoundError, match="--compare: no such file: .*b3"):
        evaluate(config(folder, compare=["b0", "b1", "b3"]))
    for name, value in (("model", "m"), ("data_file", "d"), ("limit", 3), ("mode", "rationale")):
        changed = config(folder)
        setattr(changed, name, value)
        with pytest.raises(ValueError, match=f"--{name}: has no effect with --predictions, .* got {value!r}"):
            evaluate(changed)
    changed = config(folder)
    changed.output_dir = str(folder / "a0")
    with pytest.raises(ValueError, match="--output_dir: .*a0: expected a folder without predictions.jsonl"):
        evaluate(changed)
    with pytest.raises(ValueError, match="model: expected none"):
        evaluate(config(folder), tiny.model(2), tiny.tokenizer())
    with pytest.raises(ValueError, match="--compare: expected one path without --predictions, got"):
        evaluate(config(folder, predictions=[]))
    with pytest.raises(ValueError, match="compare: expected a list of paths, got 'b0'"):
        EvaluateConfig(compare="b0")
    assert parse(EvaluateConfig, ["--compare", "b0"]).compare == ["b0"]
