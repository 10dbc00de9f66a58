"""The study of docs/evidence.md: its file is valid, and its report has the numbers of the committed results."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from molsaki.io import read_json_lines, write_json, write_json_lines
from molsaki.study.config import read_study
from studies import looks, prepare, real, single, tables

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "evidence.md"
RESULTS = ROOT / "studies" / "results"


def test_the_arms_are_valid_and_those_that_the_analysis_names(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train", "validation", *tables.TESTS):
        write_json_lines(tmp_path / "data" / f"{name}.jsonl", [{"question": "1?", "rationale": "1.", "answer": "1"}])
    write_json(tmp_path / "heads.json", {"heads": [0, 1, 2, 3], "pointer": 4, "decider": 5})
    write_json(tmp_path / "single.json", {"teacher_layer": 2, "student_layer": 0})
    prepare.write_study(tmp_path)
    study = read_study(tmp_path / "evidence.yaml", with_models=False)
    listed = tables.SETS["second"]
    assert study.primary is not None and tuple(study.primary.arms) == listed.primary and study.primary.test == "test"
    (layers,) = {(run.options["teacher_layer"], run.options["student_layer"]) for run in study.runs
                 if run.arm == "single-10"}  # fmt: skip
    assert layers == (2, 0)
    taught = {run.options["student_layer"] for run in study.runs if run.options.get("map_heads") == "each"
              and run.options["mixture"] == "single"}  # fmt: skip
    assert taught == {looks.TAUGHT}
    seeds = {arm: [run.seed for run in study.runs if run.arm == arm] for arm in study.arms}
    assert all(seeds[arm] == list(range(11, 19)) for arm in listed.main)
    named = {*listed.main, *(arm for group in listed.groups.values() for arm in group)}
    doses = {f"{form}-{share}" for form in tables.DOSES for share in (1, 10, 30)}
    assert named <= set(study.arms) <= named | doses  # every arm is in a table
    third = read_study(tmp_path / "third.yaml", with_models=False)
    assert {run.seed for run in third.runs} == set(range(19, 27)) and third.output_dir != study.output_dir
    assert third.arms == [*tables.SETS["third"].main] and tuple(third.primary.arms) == tables.SETS["third"].primary
    (one,), (same,) = ([run.options for run in of.runs if (run.arm, run.seed) == ("decider-early-30", seed)]
                       for of, seed in ((study, 11), (third, 19)))  # fmt: skip
    assert one | {"student": ""} == same | {"student": ""}
    text = DOCUMENT.read_text(encoding="utf-8")
    assert all(f"`{arm}`" in text for listed in tables.SETS.values() for arm in listed.main)


def test_committed_models_are_copied(tmp_path):
    """What a folder has already stays; the rest is that of studies/models, loaded as float32."""
    if not prepare.MODELS.is_dir():
        pytest.skip("an installation has no models of the study")
    (tmp_path / "teacher").mkdir()
    write_json(tmp_path / "heads.json", {"own": 1})
    prepare.copy_models(tmp_path)
    assert list((tmp_path / "teacher").iterdir()) == []
    assert json.loads((tmp_path / "heads.json").read_text()) == {"own": 1}
    bases = {path.name for path in (tmp_path / "bases").iterdir()}
    assert bases == {str(seed) for seed in (*single.SEEDS, *sum(prepare.SEEDS_OF_SETS.values(), []))}
    prepare.train_base(tmp_path, 11)  # finished, with the options of this code: nothing is done
    prepare.copy_models(tmp_path / "other")
    prepare.train_teacher(tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "other" / "teacher")
    assert model.dtype == torch.float32
    assert all(torch.equal(weight.bfloat16().float(), weight) for weight in model.parameters())


def test_the_grid_of_single_layers(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train", "validation"):
        write_json_lines(tmp_path / "data" / f"{name}.jsonl", [{"question": "1?", "rationale": "1.", "answer": "1"}])
    grid = read_study(single.write_grid(prepare.STUDY.read_text(encoding="utf-8"), tmp_path, 4, 2), with_models=False)
    assert len(grid.runs) == 16 and not set(single.SEEDS) & set(range(1, 27))
    assert {(run.options["teacher_layer"], run.options["student_layer"]) for run in grid.runs} == {
        (t, s) for t in range(4) for s in range(2)
    }
    assert all(run.options["max_steps"] == 400 and run.options["mixture"] == "single" for run in grid.runs)
    right = {"0-1": (0.9, 0.1), "2-1": (0.6, 0.5)}
    rows = ["arm,seed,test,accuracy"]
    for run in grid.runs:
        rows.append(f"{run.arm},{run.seed},validation,{right.get(run.arm, (0, 0))[run.seed == 100]}")
    (tmp_path / "single").mkdir()
    (tmp_path / "single" / "results.csv").write_text("\n".join(rows))
    chosen = single.choose(tmp_path)
    assert (chosen["teacher_layer"], chosen["student_layer"]) == (2, 1)
    (tmp_path / "single" / "results.csv").write_text("\n".join(rows[:-3]))
    with pytest.raises(ValueError, match="expected 2 runs of each pair; some of .*3-1"):
        single.choose(tmp_path)


@pytest.mark.skipif(not RESULTS.is_dir(), reason="an installation has no results of the study")
def test_the_tables_of_the_report_are_those_of_the_results():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert tables.fill(text, tables.tables(RESULTS)) == text
    assert "<!-- table first-main -->" in text and "<!-- table second-main -->" in text


def test_tables_by_hand(tmp_path):
    columns = "data,test,arm,seeds,accuracy,low,high,over,baseline,pairs,difference,difference_low,difference_high"
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    (tmp_path / "first" / "comparisons.csv").write_text(
        f"{columns},difference_over,p,p_holm,p_holm_primary\n"
        "world,test,dss,8,0.5,0.4,0.6,both,,,,,,,,,\n"
        "world,test,sum-10,8,0.51,0.41,0.61,both,dss,8,0.01,-0.02,0.04,both,0.4,0.5,0.6\n"
        "world,test,sum-1,1,0.4999,0.41,0.61,problems,dss,1,-0.0001,-0.02,0.04,problems,0.0004,0.0005,\n"
        "world,test,paper-10,8,0.5,0.4,0.6,both,dss,8,0.0,,,,,,\n"
    )
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "comparisons.csv").write_text(
        f"{columns},difference_over,p,p_holm,p_holm_primary\n"
        "svamp,problems,dss,2,0.5,0.4,0.6,both,,,,,,,,,\n"
        "svamp,problems,paper,2,0.51,0.41,0.61,both,dss,2,0.01,-0.02,0.04,both,0.4,0.5,0.6\n"
        "svamp,other,dss,2,0.25,0.2,0.3,both,,,,,,,,,\n"
    )
    (tmp_path / "real" / "curves.csv").write_text(
        "arm,step,beta,attention_share\ndss,60,,\npaper,50,9,9\npaper,60,1,0.01\npaper,70,1,0.02\npaper,80,1,0.05\n"
    )
    found = tables.tables(tmp_path)
    assert found["real"].splitlines()[2:] == [
        "| `dss` | 2 | 50.0 [40.0, 60.0] |  |  | 25.0 |  |  |",
        "| `paper` | 2 | 51.0 [41.0, 61.0] | +1.0 [-2.0, +4.0] | 0.600 |  | 2 (1 to 5) | 1 |",
    ]
    assert found["first-main"].splitlines()[2:] == [
        "| `dss` | 8 | 50.0 [40.0, 60.0] |  |  |",
        "| `paper-10` | 8 | 50.0 [40.0, 60.0] | +0.0 (no interval) |  |",
        "| `sum-10` | 8 | 51.0 [41.0, 61.0] | +1.0 [-2.0, +4.0] | 0.600 |",
    ]
    assert found["first-dose"].splitlines()[2:] == [
        "| `paper` |  | +0.0 (no interval) (8) |  |",
        "| `sum` | +0.0 [-2.0, +4.0] \\* (1) | +1.0 [-2.0, +4.0] (8) |  |",
    ]
    for name, accuracies in (("first", (0.5, 0.6, 0.55, 0.65)), ("second", (0.2, 0.4, 0.22, 0.4))):
        pairs = zip(("dss,1", "dss,2", "sum-10,1", "sum-10,2"), accuracies, strict=True)
        rows = [f"{arm},test,{accuracy},0,1,0,0,0,0,0" for arm, accuracy in (*pairs, (f"{name},1", 0.9))]
        kinds = [f"score.first_mistake_{kind}" for kind in ("plan", "base", "carry", "operand", "sum", "form")]
        head = ",".join(["arm", "seed", "test", "accuracy", "score.exact", *kinds])
        (tmp_path / name / "results.csv").write_text("\n".join([head, *rows]))
    joined = tables.tables(tmp_path)["all"].splitlines()[2:]
    assert joined == ["| `sum-10` | +5.0 (2) | +1.0 (2) |  | +3.0 [-0.9, +6.9] | 3 of 4 |"]  # t = 3.182, sem 1.225
    text = "a\n<!-- table first-dose -->\nold\n<!-- end -->\nb\n<!-- table second-few -->\n<!-- end -->\n"
    filled = tables.fill(text, found)
    assert filled.startswith("a\n<!-- table first-dose -->\n| form |") and "old" not in filled and "\nb\n" in filled
    assert tables.fill(filled, found) == filled
    with pytest.raises(ValueError, match="table none: expected one of first-main"):
        tables.fill("<!-- table none -->\n<!-- end -->", found)
    with pytest.raises(ValueError, match="table all: expected <!-- end --> after it"):
        tables.fill("<!-- table all -->\n\nText.\n\n<!-- table second-few -->\n<!-- end -->", found)


def test_make_study_runs_the_main_comparisons():
    """And the third set, unless a part of the study is asked for."""
    for words, arms, has_third in (([], tables.SETS["second"].main, True), (["ARMS=all"], None, True),
                                   (["SEEDS=11"], tables.SETS["second"].main, False),
                                   (["ARMS=dss pointer-30"], ("dss", "pointer-30"), False)):  # fmt: skip
        done = subprocess.run(["make", "-n", "study", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        found = re.search(r"--arms (.*?) *(?:--seeds.*)?$", done.stdout, re.M)
        assert (tuple(found[1].split()) if found else None) == arms
        assert ("third.yaml" in done.stdout) == has_third


def test_rationales_that_are_no_use_are_left_out(tmp_path):
    rows = [
        {"id": "0", "question": "a?", "rationale": "1 + 999 = 1,000.0.", "gold": "1000"},
        {"id": "1", "question": "b?", "rationale": "It is 2.", "gold": "3"},
        {"id": "2", "question": "c?", "rationale": "Add the numbers.", "gold": "3"},
        {"id": "3", "question": "T, the  day How u?", "rationale": "It is 3.", "gold": "3"},
        {"id": "4", "question": "d?", "rationale": f"{'so ' * 140} 3.", "gold": "3"},
        {"id": "5", "question": "e?", "rationale": None, "gold": "3"},
    ]
    for name, part in (("svamp_train", rows[:2]), ("svamp_train_gpt35", rows[2:])):
        write_json_lines(tmp_path / f"{name}.jsonl", part)
    write_json_lines(tmp_path / "svamp_test.jsonl", [{"id": "t", "question": "t the day. How u?", "gold": "3"}])
    assert real.write_data(tmp_path / "out", tmp_path) == {"train": 1, "test": 1}
    assert [row["id"] for row in read_json_lines(tmp_path / "out" / "train.jsonl")] == ["0"]


def test_a_teacher_of_other_steps_is_refused(tmp_path):
    for name in (*real.SVAMP, "svamp_test"):
        write_json_lines(
            tmp_path / f"{name}.jsonl", [{"id": name, "question": f"{name}?", "rationale": "4.", "gold": "4"}]
        )
    for name in ("smollm2", "teacher"):
        (tmp_path / "folder" / name).mkdir(parents=True)
    write_json(tmp_path / "folder" / "teacher" / "trainer_state.json", {"max_steps": 150})
    with pytest.raises(SystemExit, match="teacher: was trained for 150 steps, not 5; delete it or take those"):
        real.main([str(tmp_path / "folder"), "--data", str(tmp_path), "--teacher_steps", "5"])


def test_the_large_form_with_a_real_model(tmp_path):
    """The teacher's data, tests that are joined from several files or cut, and the accuracy of each file."""
    for name in real.LARGE.teacher:
        write_json_lines(
            tmp_path / f"{name}.jsonl", [{"id": name, "question": f"{name}?", "rationale": "4.", "gold": "4"}]
        )
    for name in ("svamp", "singleeq", "asdiv"):
        write_json_lines(tmp_path / f"{name}_test.jsonl", [{"id": f"{name}-0", "question": f"{name}?", "gold": "4"}])
    many = [{"id": f"gsm8k-{i}", "question": f"{i}?", "gold": "4"} for i in range(501)]
    write_json_lines(tmp_path / "gsm8k_test.jsonl", many)
    counts = real.write_data(tmp_path / "data", tmp_path, real.LARGE)
    assert counts == {"train": 2, "teacher": 3, "problems": 3, "gsm8k": 500}
    rows = read_json_lines(tmp_path / "data" / "problems.jsonl")
    found = real.score(rows, ["It is 4.", "It is 5.", "2 + 2 = 4."])
    assert found == {"svamp": [True, None, None], "singleeq": [None, False, None], "asdiv": [None, None, True]}
    shutil.copy(ROOT / "studies" / real.LARGE.study, tmp_path)
    study = read_study(tmp_path / real.LARGE.study, with_models=False)
    assert len(study.runs) == 4 * 16 + 5 and study.primary.arms == ["paper-10", "sum-10"]
