from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from molsaki import presets
from molsaki.cli import main
from molsaki.evaluation import statistics
from molsaki.study import report
from molsaki.study import run as run_module
from molsaki.study.config import extract_config, read_study
from tests.helpers import tiny
from tests.helpers.tiny import one_thread  # noqa: F401

ROOT = Path(__file__).parents[2]
STUDY = {
    "output_dir": "results",
    "teacher": "teacher",
    "student": "bases/{seed}",
    "seeds": [0, 1],
    "data": {"world": {"train_file": "train.jsonl", "tests": {"test": "test.jsonl", "more": "{data}-more.jsonl"}}},
    "options": {
        "max_steps": 24, "per_device_train_batch_size": 8, "learning_rate": "1e-2", "logging_steps": 4, "use_cpu": True,
    },
    "evaluate": {"max_new_tokens": 3},
    "curve": {"every": 10, "data_file": "world-more.jsonl"},
    "arms": {"dss": {"objective": "dss"}, "paper": {"objective": "molsaki", "beta": 2.0}},
    "baseline": "dss",
}  # fmt: skip
RUNS = ["world/dss/0", "world/paper/0", "world/dss/1", "world/paper/1"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with models and data, of which a model learns half: the answer is 4 or 7."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.save(folder / "teacher", 3, tiny.tokenizer(60), seed=1)
    for seed in (0, 1):
        tiny.save(folder / f"bases/{seed}", 2, seed=seed)
    rows = [row | {"answer": "47"[i % 3 > 0]} for i, row in enumerate(tiny.problems(16))]
    tiny.write_jsonl(folder / "train.jsonl", rows)
    tiny.write_jsonl(folder / "test.jsonl", rows[:6])
    tiny.write_jsonl(folder / "world-more.jsonl", rows[4:])
    return folder


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """The folder of a study that is finished."""
    folder = shutil.copytree(inputs, tmp_path_factory.mktemp("finished"), dirs_exist_ok=True)
    assert study(folder) == 0
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of it to change."""
    return shutil.copytree(finished, tmp_path, dirs_exist_ok=True)


def write(folder: Path, **changes) -> Path:
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))
    return folder / "study.yaml"


def study(folder: Path, *flags: str, **changes) -> int:
    return main(["study", str(write(folder, **changes)), *flags])


def python(source: str, *argv: str) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", source, *argv]
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400, check=False)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def folder_of(folder: Path, run: str) -> Path:
    return folder / "results" / run


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The bytes and times of every result."""
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.glob("results/*/*/*/result.json"))}


def log(folder: Path, run: str) -> list[dict]:
    """What a run logged, without times."""
    entries = json.loads((folder_of(folder, run) / "log.json").read_text())
    return [entry for entry in entries if "train_runtime" not in entry]


def test_csv_files(finished):
    rows = table(finished / "results/results.csv")
    assert [(r["data"], r["arm"], r["seed"], r["test"]) for r in rows] == [
        (*run.split("/"), test) for run in RUNS for test in ("test", "more")
    ]
    for row in rows:
        where = folder_of(finished, f"{row['data']}/{row['arm']}/{row['seed']}") / "tests" / row["test"]
        found = [json.loads(line) for line in (where / "predictions.jsonl").read_text().splitlines()]
        right = sum(one["right"] for one in found)
        assert (int(row["right"]), int(row["total"])) == (right, len(found))
        assert float(row["accuracy"]) == right / len(found)
        assert row["objective"] == {"dss": "dss", "paper": "molsaki"}[row["arm"]]
        assert row["beta"] == {"dss": "", "paper": "2.0"}[row["arm"]]
        assert (row["loss_att"] == "") == (row["arm"] == "dss")
        assert float(row["step_ms"]) == pytest.approx(1000 * float(row["train_seconds"]) / 24)
    assert {"student", "learning_rate"}.isdisjoint(rows[0])  # do not differ between arms
    assert any(0 < float(row["accuracy"]) < 1 for row in rows)

    curves = table(finished / "results/curves.csv")
    steps = [int(row["step"]) for row in curves if (row["arm"], row["seed"]) == ("paper", "1")]
    assert steps == [4, 8, 10, 12, 16, 20, 24]
    for run in RUNS:
        _, arm, seed = run.split("/")
        of_run = {int(row["step"]): row for row in curves if (row["arm"], row["seed"]) == (arm, seed)}
        assert [step for step, row in of_run.items() if row["accuracy"]] == [10, 20, 24]
        last = next(row for row in rows if (row["arm"], row["seed"], row["test"]) == (arm, seed, "more"))
        assert float(of_run[24]["accuracy"]) == float(last["accuracy"])  # of the same examples
        assert float(of_run[24]["loss"]) == float(last["loss"])


def test_report(finished):
    rows = table(finished / "results/results.csv")
    right = {
        (arm, seed): [json.loads(line)["right"] for line in path.read_text().splitlines()]
        for arm in ("dss", "paper")
        for seed in (0, 1)
        for path in [folder_of(finished, f"world/{arm}/{seed}") / "tests/more/predictions.jsonl"]
    }
    dss, paper = (np.array([right[arm, seed] for seed in (0, 1)]) for arm in ("dss", "paper"))
    expected = statistics.difference(paper, dss)
    row = next(r for r in table(finished / "results/comparisons.csv") if (r["arm"], r["test"]) == ("paper", "more"))
    assert float(row["accuracy"]) == pytest.approx(paper.mean())
    found = [float(row[name]) for name in ("difference", "difference_low", "difference_high", "p", "p_holm")]
    assert found == [*expected[:4], expected.p_value]  # of one comparison
    text = (finished / "results/report.md").read_text()
    assert "study.yaml: 4 of 4 runs are finished" in text
    assert f"| paper | 2 | {100 * paper.mean():.1f} [" in text
    assert f"4 runs: molsaki {rows[0]['molsaki']}, " in text
    assert "## Runs that are not finished\n\nNone." in text
    for name in ("differences-world.png", "accuracy-world.png"):
        assert f"({name})" in text and (finished / "results" / name).read_bytes().startswith(b"\x89PNG")


def test_a_report_of_replies_that_say_nothing(copy):
    """Without the models; of an arm whose answers are the baseline's, and of students that repeat one answer."""
    for name in ("teacher", "bases"):
        shutil.rmtree(copy / name)
    for seed in (0, 1):
        path = folder_of(copy, f"world/dss/{seed}") / "tests/more/predictions.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        text = "".join(json.dumps(row | {"prediction": "4", "right": row["gold"] == "4"}) + "\n" for row in rows)
        for arm in ("dss", "paper"):
            (folder_of(copy, f"world/{arm}/{seed}") / "tests/more/predictions.jsonl").write_text(text)
    assert study(copy, "--report") == 0
    row = next(r for r in table(copy / "results/comparisons.csv") if (r["arm"], r["test"]) == ("paper", "more"))
    assert (row["difference"], row["difference_low"], row["p"], row["pairs"]) == ("0.0", "", "", "2")
    text = (copy / "results/report.md").read_text()
    assert "| +0.0 (no answer differs) | dss | 2 |" in text
    assert "- world/paper/1: 100 % of the replies give the same answer." in text
    shares = [float(r["most_common_answer"]) for r in table(copy / "results/results.csv") if r["test"] == "more"]
    assert shares == [1] * 4


def test_primary_comparisons(copy, monkeypatch):
    """The correction covers only them, including those without a finished run."""
    monkeypatch.setattr(report, "LEVEL", 0.5)  # two seeds are few
    for seed in (0, 1):
        for arm, right in (("dss", {seed}), ("paper", set(range(20)) - {seed + 2})):  # one right, one wrong
            predictions = folder_of(copy, f"world/{arm}/{seed}") / "tests/more/predictions.jsonl"
            rows = [json.loads(line) for line in predictions.read_text().splitlines()]
            rows = [row | {"right": n in right} for n, row in enumerate(rows)]
            predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arms = STUDY["arms"] | {"other": {"objective": "vanilla"}}
    assert study(copy, "--report", arms=arms, primary={"test": "more", "arms": ["other", "paper"]}) == 0
    rows = table(copy / "results/comparisons.csv")
    row = next(r for r in rows if (r["arm"], r["test"]) == ("paper", "more"))
    assert float(row["p_holm_primary"]) == 2 * float(row["p"]) and row["p_holm"] == row["p"]
    assert 0 < float(row["p_holm_primary"]) < 0.5
    assert [r["p_holm_primary"] for r in rows if r["test"] == "test"] == [""] * 2
    text = (copy / "results/report.md").read_text()
    found = f"(paper {100 * float(row['difference']):+.1f} points). Not finished, pairs of seeds: other 0 of 2.**"
    assert f"- **world, more: 1 of 2 primary comparisons with p (Holm) below 0.5 {found}" in text
    assert "## world: primary comparisons on more" in text and "\n| paper - dss | +" in text
    assert "\n| other - dss | | | | |\n" in text
    shutil.rmtree(folder_of(copy, "world/paper/1"))
    assert study(copy, "--report", primary={"test": "more", "arms": ["paper"]}) == 0
    first = (copy / "results/report.md").read_text().splitlines()[2]
    assert "points; one seed only, so for these seeds). Not finished, pairs of seeds: paper 1 of 2.**" in first


def test_an_arm_with_its_own_baseline(copy):
    arms = STUDY["arms"] | {"dss": STUDY["arms"]["dss"] | {"baseline": "paper"}}
    assert study(copy, "--report", arms=arms, baseline=None) == 0
    rows = table(copy / "results/comparisons.csv")
    assert [(r["arm"], r["baseline"]) for r in rows] == [("dss", "paper"), ("paper", "")] * 2
    first = [r["difference"] for r in rows if r["arm"] == "dss"]
    assert study(copy, "--report") == 0
    other = [float(r["difference"]) for r in table(copy / "results/comparisons.csv") if r["arm"] == "paper"]
    assert [-float(d) for d in first] == other and any(other)
    assert "| difference | to | pairs |" in (copy / "results/report.md").read_text()


def test_a_finished_run_is_never_repeated(copy, monkeypatch):
    monkeypatch.setattr(run_module, "execute", None)
    before = contents(copy)
    assert study(copy) == 0
    assert contents(copy) == before and len(before) == 4


def test_a_run_alone_is_the_same_as_after_others(finished, inputs, tmp_path):
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    before = dict(os.environ)
    assert study(tmp_path, "--arms", "paper", "--seeds", "1", keep_students=False) == 0
    assert dict(os.environ) == before
    assert log(tmp_path, "world/paper/1") == log(finished, "world/paper/1")
    one, other = (folder_of(folder, "world/paper/1") for folder in (tmp_path, finished))
    for test in ("test", "more"):
        predictions = f"tests/{test}/predictions.jsonl"
        assert (one / predictions).read_bytes() == (other / predictions).read_bytes()
    assert (other / "student/model.safetensors").is_file() and not (one / "student").exists()
    assert (one / "layer_weights.jsonl").read_bytes() == (other / "student/layer_weights.jsonl").read_bytes()
    rows = table(tmp_path / "results/results.csv")
    assert {(row["arm"], row["seed"]) for row in rows} == {("paper", "1")}
    text = (tmp_path / "results/report.md").read_text()
    assert "- world/dss/0: missing\n- world/paper/0: missing\n- world/dss/1: missing\n" in text


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"arms": STUDY["arms"] | {"paper": {"objective": "molsaki", "beta": 3.0}}}, "beta = 2.0"),
        ({"options": STUDY["options"] | {"max_steps": 25}}, "max_steps = 24"),
        ({"evaluate": {"max_new_tokens": 4}}, "evaluate.max_new_tokens = 3"),
        ({"extract": {"batch_tokens": 100}}, "extract.batch_tokens = None"),
    ],
)
def test_a_changed_option_is_refused(copy, capsys, changes, name):
    before = contents(copy)
    for flags in ([], ["--report"]):
        assert study(copy, *flags, **changes) == 2
        message = capsys.readouterr().err
        assert f"was run with {name}, and " in message and str(folder_of(copy, "world")) in message
    assert contents(copy) == before


def test_a_changed_data_file_or_model_is_refused(copy, capsys):
    shutil.rmtree(folder_of(copy, "world/paper/1"))
    tiny.save(copy / "bases/1", 2, seed=7)
    assert study(copy) == 1
    failed = json.loads((folder_of(copy, "world/paper/1") / "failed.json").read_text())
    assert failed["error"] == (
        "ValueError: bases/1 in float32: the model has changed since world/dss/1 was run; use another name, or delete "
        "that run"
    )
    with (copy / "test.jsonl").open("a") as file:
        file.write("\n")
    capsys.readouterr()
    assert study(copy) == 2
    assert "was run with content of test.jsonl = " in capsys.readouterr().err


def test_a_preset_of_another_version_is_noticed(copy, monkeypatch):
    path = write(copy, arms=STUDY["arms"] | {"paper": {"preset": "paper"}})
    before, old = (read_study(path).identity(read_study(path).runs[i]) for i in (1, 0))
    assert "content of preset paper" in before and not any("preset" in name for name in old)
    monkeypatch.setitem(presets.PRESETS, "paper", presets.PRESETS["paper"] | {"beta": 2.0})
    after = read_study(path).identity(read_study(path).runs[1])
    assert {name for name in after if after[name] != before[name]} == {"content of preset paper"}


def test_a_failed_run_is_recorded_and_tried_again_by_the_next_command(inputs, tmp_path, monkeypatch, capsys):
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    original, calls = run_module.evaluate, []

    def fails(config, *args):
        calls.append(config.output_dir)
        if "paper/0" in config.output_dir:
            raise RuntimeError("out of\nluck")
        return original(config, *args)

    monkeypatch.setattr(run_module, "evaluate", fails)
    assert study(tmp_path, "--seeds", "0") == 1
    assert "1 runs are not finished:\nworld/paper/0: failed: RuntimeError: out of luck" in capsys.readouterr().err
    assert sum("paper/0" in call for call in calls) == 1
    failed = folder_of(tmp_path, "world/paper/0") / "failed.json"
    assert "in fails" in json.loads(failed.read_text())["traceback"]
    assert "- world/paper/0: failed: RuntimeError: out of luck" in (tmp_path / "results/report.md").read_text()
    assert (folder_of(tmp_path, "world/dss/0") / "result.json").is_file()
    monkeypatch.setattr(run_module, "evaluate", original)
    assert study(tmp_path, "--seeds", "0") == 0
    assert not failed.exists() and len(contents(tmp_path)) == 2


KILLED = """
import os, signal, sys
import molsaki.study.run as run
from molsaki.cli import main

def evaluate(config, *args, whole=run.evaluate):
    if "dss/1/tests/more" in config.output_dir:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(config, *args)

run.evaluate = evaluate
main(["study", sys.argv[1], "--threads", "1"])
"""


def test_killed_and_resumed(finished, inputs, tmp_path):
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    done = python(KILLED, str(write(tmp_path)))
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = contents(tmp_path)
    assert len(before) == 2  # and the third is in the middle of its evaluation
    assert (folder_of(tmp_path, "world/dss/1") / "tests/test/summary.json").is_file()
    assert study(tmp_path) == 0
    after = contents(tmp_path)
    assert len(after) == 4 and before.items() <= after.items()
    for run in RUNS:
        assert log(tmp_path, run) == log(finished, run)


PROGRAM = "import sys\nfrom molsaki.cli import main\nif __name__ == '__main__':\n    sys.exit(main(sys.argv[1:]))"


def test_processes_run_every_run_once(inputs, tmp_path):
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    done = python(PROGRAM, "study", str(write(tmp_path)), "--processes", "2", "--threads", "1")
    assert done.returncode == 0, done.stderr
    started = [line.partition(":")[0] for line in done.stderr.splitlines() if line.startswith("world/")]
    assert sorted(started) == sorted(RUNS)
    assert len(contents(tmp_path)) == 4
    assert len(list((tmp_path / "results/stores").iterdir())) == 1
    assert len(table(tmp_path / "results/results.csv")) == 8


def test_sigterm_to_the_command_alone_ends_its_processes(inputs, tmp_path):
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    words = ["study", str(write(tmp_path, options=STUDY["options"] | {"max_steps": 100_000})), "--processes", "2"]
    env, log = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, tmp_path / "stderr"
    with log.open("w") as stderr:
        command = subprocess.Popen([sys.executable, "-c", PROGRAM, *words], cwd=ROOT, env=env, stderr=stderr)
    try:
        end = time.monotonic() + 120
        while len(list(tmp_path.glob("results/world/*/0"))) < 2:  # both processes work
            assert time.monotonic() < end and command.poll() is None, log.read_text()
            time.sleep(0.1)
        command.terminate()
        assert command.wait(timeout=30) == 143
    finally:
        command.kill()
    assert "molsaki study: terminated. All finished runs are kept. To continue: molsaki study" in log.read_text()


def test_own_scores_and_seeds_that_are_missing(copy, capsys):
    (copy / "own_scores.py").write_text(
        "def lengths(rows, replies):\n"
        "    first = [7, *[None] * (len(rows) - 1)]\n"
        "    return {'reply': [len(reply) for reply in replies], 'asked': [len(row['question']) for row in rows],\n"
        "            'first': first, 'never': [None] * len(rows)}\n"
        "def short(rows, replies):\n    return {'reply': [1]}\n"
        "def none(rows, replies):\n    return [1 for row in rows]\n"
    )
    shutil.move(folder_of(copy, "world/paper/1"), folder_of(copy, "world/old/1"))
    assert study(copy, "--report", score="own_scores:lengths") == 0
    rows = table(copy / "results/results.csv")
    assert len(rows) == 6
    predictions = folder_of(copy, "world/paper/0") / "tests/test/predictions.jsonl"
    found = [json.loads(line) for line in predictions.read_text().splitlines()]
    row = next(row for row in rows if (row["arm"], row["test"]) == ("paper", "test"))
    assert float(row["score.reply"]) == pytest.approx(np.mean([len(one["reply"]) for one in found]))
    assert float(row["score.asked"]) == pytest.approx(np.mean([len(one["question"]) for one in found]))
    assert float(row["score.first"]) == 7 and "score.never" not in row
    compared = table(copy / "results/comparisons.csv")
    assert [row["pairs"] for row in compared] == ["", "1", "", "1"]
    assert [row["over"] for row in compared] == ["seeds and problems", "problems"] * 2
    text = (copy / "results/report.md").read_text()
    assert "3 of 4 runs are finished" in text and "- world/paper/1: missing" in text
    assert "They are in no table:\n\n- world/old/1" in text
    assert "| arm | reply | asked | first |" in text
    capsys.readouterr()
    for name, message in (
        ("short", "score: expected 6 numbers for 'reply' of own_scores:short, got 1"),
        ("none", "score: expected own_scores:none to return a dict of one number per example, got list"),
        ("lacking", "score: expected module:name that can be imported, got 'own_scores:lacking'"),
    ):
        assert study(copy, "--report", score=f"own_scores:{name}") == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baselines": "dss"}, "study.yaml: baselines: no such key; did you mean baseline?"),
        ({"seeds": []}, "study.yaml: seeds: required, got []"),
        ({"seeds": [1, 1]}, "seeds: expected a list of different whole numbers, got [1, 1]"),
        ({"baseline": "vanilla"}, "baseline: expected one of the arms dss, paper, got 'vanilla'"),
        (
            {"arms": {"a": {"mixtures": "last"}}, "baseline": "a"},
            "study.yaml: arms.a: mixtures: no such key; did you mean mixture?",
        ),
        ({"arms": {"a": {"beta": "much"}}, "baseline": "a"}, "arms.a: --beta: invalid float value: 'much'"),
        ({"arms": {"a": {"beta": -1}}, "baseline": "a"}, "arms.a: beta: expected at least 0, got -1"),
        ({"arms": {"a": {"objective": "ds"}}, "baseline": "a"}, "arms.a: objective: expected one of vanilla, "),
        ({"arms": {"a": {"seed": 1}}, "baseline": "a"}, "arms.a: seed: must not be set: it is the run's"),
        ({"arms": {"a": {"full_determinism": True}}, "baseline": "a"}, "arms.a: full_determinism: must be in options"),
        ({"arms": {"a/b": {}}}, "arms: expected names of letters, digits and . _ + -, got 'a/b'"),
        ({"options": {"student": "x"}}, "options: student: must be in an arm or outside of options"),
        ({"evaluate": {"mode": "guess"}}, "evaluate: --mode: invalid choice: 'guess'"),
        ({"evaluate": {"model": "x"}}, "study.yaml: evaluate: model: no such key"),
        ({"extract": {"key": "numbers"}}, "study.yaml: extract: key: no such key"),
        ({"extract": {"data_format": "math"}}, "study.yaml: extract: data_format: no such key"),
        ({"options": {"eval_file": ["a.jsonl"]}}, "study.yaml: options.eval_file: expected a name, got ['a.jsonl']"),
        ({"arms": {"dss": {"streaming": True}}}, "arms.dss: streaming: must not be set: the arms share their examples"),
        ({"teacher": None}, "arms.paper: teacher: required by its objective, got none"),
        ({"student": "no/{seed}"}, "world/dss/0: student: no model folder or hub name: 'no/0'"),
        ({"data": {"world": {"train_file": "none.jsonl", "tests": {"t": "test.jsonl"}}}}, "train_file: no such file: "),
        ({"data": {"world": {"train_file": "train.jsonl", "tests": {"t": "{data}.jsonl"}}}}, "world.jsonl"),
        (
            {"data": {"world": {"train_file": "train.jsonl"}}},
            "data.world.tests: expected `name: value` lines, got None",
        ),
        ({"curve": {"every": 0, "data_file": "test.jsonl"}}, "curve.every: expected a number of steps of at least 1"),
        ({"curve": {"every": 5}}, "curve.data_file: no such file: None"),
        ({"arms": {"dss": {"seeds": [0, 2]}}}, "arms.dss.seeds: expected some of [0, 1], got [0, 2]"),
        ({"arms": {"dss": {"seeds": 0}}}, "arms.dss.seeds: expected a list of different whole numbers, got 0"),
        ({"arms": {"dss": {"baseline": "c"}}}, "arms.dss.baseline: expected one of the arms dss, got 'c'"),
        ({"baseline": ["dss"]}, "study.yaml: baseline: expected one of the arms dss, paper, got ['dss']"),
        ({"primary": {"test": ["t"], "arms": ["paper"]}}, "primary: test: expected one that all data sets have"),
        (
            {"arms": {"dss": {"seeds": [0]}, "paper": {"seeds": [1]}}},
            "arms.paper: shares no seed with dss, the arm that it is compared with",
        ),
        ({"score": 3}, "study.yaml: score: expected a name, got 3"),
        ({"data": {"w": {"train_file": "train.jsonl", "tests": {"t": 3}}}}, "data.w.tests.t: expected a name, got 3"),
        ({"arms": {"dss": {"live_teacher": "x"}}}, "arms.dss.live_teacher: expected true or false, got 'x'"),
        (
            {"primary": {"test": "t", "arms": ["paper"]}},
            "primary: test: expected one that all data sets have (test, more), got 't'",
        ),
        ({"primary": {"test": "test", "arms": ["dss"]}}, "primary: arms: expected some of paper, got 'dss'"),
        ({"primary": {"test": "test"}}, "primary: arms: expected a list of different arms, got None"),
        ({"primary": {"test": "test", "arms": ["paper"]}, "baseline": None}, "primary: expected a baseline as well"),
        ({"score": "nowhere:f"}, "score: expected module:name that can be imported, got 'nowhere:f'"),
    ],
)
def test_refused_before_anything_runs(inputs, changes, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert study(inputs, **changes) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (inputs / "results").exists()


def test_flags_are_checked(inputs, capsys):
    for flags, message in (
        (["--processes", "0"], "--processes: expected at least 1, got 0"),
        (["--arms", "no"], "--arms: expected some of dss, paper, got no"),
        (["--seeds", "3"], "--seeds: expected some of 0, 1, got 3"),
    ):
        assert study(inputs, *flags) == 2
        assert message in capsys.readouterr().err
    arms = STUDY["arms"] | {"paper": {"seeds": [0]}}
    assert study(inputs, "--arms", "paper", "--seeds", "1", arms=arms) == 2
    assert "--arms, --seeds: no run of " in capsys.readouterr().err
    assert not (inputs / "results").exists()


def test_the_order_of_runs_and_the_options_of_data_sets_and_arms(inputs):
    one = {"train_file": "train.jsonl", "tests": {"t": "test.jsonl"}}
    arms = {
        "dss": {"objective": "dss", "alpha": 0.1, "evaluate": {"mode": "rationale"}},
        "live": {"live_teacher": True},
        "stored": {"store": "bases"},
        "heads": {"map_heads": "each", "mixture": "last", "key": "random", "seeds": [0]},
    }
    data = {"a": one | {"options": {"alpha": 0.2, "beta": 7.0}, "evaluate": {"batch_size": 5}}, "b": one}
    found = read_study(write(inputs, data=data, arms=arms))
    runs = found.runs
    names = [f"{d}/{arm}/{seed}" for seed in (0, 1) for d in ("a", "b") for arm in arms]
    names = [name for name in names if name[2:] != "heads/1"]
    assert [str(run) for run in runs] == names
    dss, live, stored, heads = runs[:4]
    assert (dss.options["alpha"], dss.options["beta"], live.options["alpha"]) == (0.1, 7.0, 0.2)
    assert dss.evaluate == {"max_new_tokens": 3, "batch_size": 5, "mode": "rationale"}
    assert live.options["teacher"] == "teacher" and live.extract is None
    assert "teacher" not in stored.options and stored.extract is None and "teacher" not in dss.options
    options = extract_config(found, heads, found.distill_config(heads))
    assert (options.map_heads, options.key, options.all_layers, options.mixture) == ("each", "random", True, "mixture")
    assert (options.teacher, options.data_files) == (str(inputs / "teacher"), [str(inputs / "train.jsonl")])


def test_arms_share_tokenized_data_only_if_they_read_it_alike(inputs):
    study = read_study(write(inputs))
    keys = {
        run_module._key_of_data(study, one, study.distill_config(one, **more))
        for one in study.runs[:1]
        for more in (
            {},
            {"beta": 2.0},
            {"data_format": "molsaki"},
            {"limit": 3},
            {"cot_template": "{rationale}|{answer}"},
        )
    }
    assert len(keys) == 4  # beta changes nothing


def test_the_source_of_ones_own_functions_is_a_part_of_a_run(inputs, tmp_path, monkeypatch):
    """Beside the study's file, wherever the command runs; a changed one gives another identity."""
    folder = shutil.copytree(inputs, tmp_path / "study")
    monkeypatch.setattr(sys, "path", list(sys.path))
    module = folder / "study_functions.py"
    source = "def key(text):\n    return []\ndef ends(text):\n    return []\ndef pairs(t, s):\n    return [(0, 0)]\n"
    arms = {"dss": {"objective": "dss"}, "own": {"key": "study_functions:key", "splitter": "study_functions:ends"}}
    path = write(folder, arms=arms | {"pairs": {"mixture": "study_functions:pairs"}})
    found = []
    for text in (source, source.replace("return []", "return list()")):
        module.write_text(text)
        sys.modules.pop("study_functions", None)
        study = read_study(path)
        found.append({run.arm: study.identity(run) for run in study.runs})
    assert {name for name in found[0] if found[0][name] != found[1][name]} == {"own", "pairs"}
    sys.modules.pop("study_functions")
    from molsaki.text import key_words, sentences

    key_words._own_selector.cache_clear()
    sentences._own_splitter.cache_clear()
