"""Dry runs: their counts are those of the command itself, and nothing is written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from molsaki.annotation.endpoint import Endpoint
from molsaki.cli import main
from molsaki.config import AnnotateConfig, EvaluateConfig, ExtractConfig, KeysConfig
from molsaki.dry_run.annotate import dry_run_annotate
from molsaki.dry_run.distill import dry_run_distill
from molsaki.dry_run.evaluate import dry_run_evaluate
from molsaki.dry_run.extract import dry_run_extract
from molsaki.dry_run.keys import dry_run_keys
from molsaki.dry_run.text import render
from molsaki.store.map_store import Store
from molsaki.teacher.extract import extract
from molsaki.training.config import DistillConfig
from molsaki.training.distill import distill
from molsaki.training.probe import Plan
from tests.helpers import tiny
from tests.helpers.tiny import one_thread  # noqa: F401

MORE = {"id": "long", "question": "How many?", "rationale": "There are 7. " * 200, "answer": "7"}
BLANK = {"id": "blank", "question": "How many?", "rationale": " ", "answer": "7"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry")
    tiny.save(folder / "teacher", 3, tiny.tokenizer(60), seed=1)
    tiny.save(folder / "student", 2)
    tiny.write_jsonl(folder / "train.jsonl", [*tiny.problems(20), MORE, BLANK, {"id": "bad"}])
    tiny.write_jsonl(folder / "test.jsonl", tiny.problems(6))
    return folder


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_extract(work, tmp_path):
    config = ExtractConfig(teacher=str(work / "teacher"), data_files=[str(work / "train.jsonl")], shard_size=8,
                           store=str(tmp_path / "store"), batch_tokens=200)  # fmt: skip
    found = dry_run_extract(config)
    assert files(tmp_path) == set()
    done = extract(config)
    assert found["examples"]["used"] == 20 and found["examples"]["left_out"] == done["left_out"]
    assert found["examples"]["not_read"] == done["not_read"] == 1
    assert found["work"]["tokens"] == done["tokens"] and found["work"]["shards"] == done["shards_written"] == 3
    maps = [entry.maps for entry in Store(config.store) if entry.maps is not None]
    assert found["per_example"]["steps"]["max"] == max(one.shape[1] for one in maps)
    assert found["store"]["bytes_per_example"] == pytest.approx(done["bytes_per_example"], rel=0.15)
    assert found["memory"]["peak"] > found["memory"]["teacher"] > 100_000
    assert 0 < found["time"]["of_which_loading"] < found["time"]["seconds"] < 60
    again = dry_run_extract(config)
    assert again["work"]["shards_finished"] == 3 and again["work"]["tokens"] == 0
    config.splitter = "periods"
    with pytest.raises(ValueError, match="splitter"):
        dry_run_extract(config)


@pytest.mark.parametrize("options", [
    {"num_train_epochs": 1.5, "gradient_accumulation_steps": 2},
    {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1},
    {"num_train_epochs": 1, "dataloader_drop_last": True, "eval_strategy": "epoch"},
])  # fmt: skip
def test_distill(work, tmp_path, options):
    config = DistillConfig(
        output_dir=str(tmp_path / "run"), student=str(work / "student"), teacher=str(work / "teacher"), use_cpu=True,
        train_file=[str(work / "train.jsonl")], per_device_train_batch_size=3, disable_tqdm=True, save_strategy="no",
        eval_file=[str(work / "test.jsonl")] if "eval_strategy" in options else [], **options,
    )  # fmt: skip
    found = dry_run_distill(config)
    assert files(tmp_path) == set()
    done = distill(config)
    state = json.loads((tmp_path / "run/trainer_state.json").read_text())
    assert found["work"]["optimizer_steps"] == state["max_steps"] == state["global_step"]
    assert found["work"]["evaluations"] == sum("eval_loss" in entry for entry in state["log_history"])
    assert (found["examples"]["used"], found["examples"]["left_out"]) == (done["examples"], done["left_out"])
    assert found["per_example"]["key_words"] == {"mean": 9.0, "max": 9}
    parts = found["memory"]
    assert parts["optimizer"] == pytest.approx(2 * parts["gradients"], rel=0.01)  # Adam has two moments
    assert parts["student"] >= parts["gradients"] > 50_000 and parts["teacher"] > parts["student"]
    assert parts["activations_of_the_longest_batch"] > parts["student"]
    assert parts["peak"] > parts["sum"] - parts["program"]
    assert 0 < found["time"]["seconds_per_step"] < 10


def test_distill_counts_what_is_left_and_refuses_what_the_command_refuses(work, tmp_path):
    options = dict(output_dir=str(tmp_path), student=str(work / "student"), train_file=[str(work / "train.jsonl")],
                   use_cpu=True, disable_tqdm=True, max_steps=3, save_steps=2)  # fmt: skip
    distill(DistillConfig(**options))
    before = {path: path.stat().st_mtime_ns for path in files(tmp_path)}
    with pytest.raises(ValueError, match="holds the checkpoints of another run"):
        dry_run_distill(DistillConfig(**options))
    found = dry_run_distill(DistillConfig(**options | {"resume": True, "max_steps": 5}))
    assert found["work"]["optimizer_steps"] == 5 and found["work"]["steps_done"] == 3
    assert {path: path.stat().st_mtime_ns for path in files(tmp_path)} == before


def test_distill_of_a_stream(work, tmp_path):
    config = DistillConfig(output_dir=str(tmp_path / "run"), student=str(work / "student"), max_steps=7, use_cpu=True,
                           train_file=[str(work / "train.jsonl")], streaming=True, disable_tqdm=True)  # fmt: skip
    found = dry_run_distill(config)
    assert found["work"]["optimizer_steps"] == 7 and "of the first 20 of a stream" in found["examples"]["note"]
    assert files(tmp_path) == set()


@pytest.mark.parametrize(("examples", "options", "steps"), [
    (100, {"per_device_train_batch_size": 8}, 39),
    (100, {"per_device_train_batch_size": 8, "dataloader_drop_last": True}, 36),
    (100, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}, 12),
    (100, {"per_device_train_batch_size": 8, "num_train_epochs": 0.5}, 7),
    (3, {"per_device_train_batch_size": 8, "max_steps": 11}, 11),
])  # fmt: skip
def test_the_number_of_steps(tmp_path, examples, options, steps):
    config = DistillConfig(output_dir=str(tmp_path), use_cpu=True, **options)
    assert Plan.of(config, examples, 1000.0).steps == steps


def test_keys_and_evaluate(work, tmp_path):
    found = dry_run_keys(KeysConfig(teacher=str(work / "teacher"), data_file=str(work / "train.jsonl"), top=3,
                                    output_file=str(tmp_path / "k.jsonl")))  # fmt: skip
    assert found["examples"]["used"] == 20 and sum(found["examples"]["left_out"].values()) == 2
    assert found["per_example"]["candidates"]["max"] > 20 and found["work"]["tokens"] > 500
    found = dry_run_evaluate(EvaluateConfig(model=str(work / "student"), data_file=str(work / "test.jsonl"),
                                            output_dir=str(tmp_path / "e"), batch_size=4, mode="rationale",
                                            max_new_tokens=5))  # fmt: skip
    assert found["work"] == {"questions": 6, "batches": 2, "longest_reply": 5}
    with pytest.raises(ValueError, match="dry_run: expected no --predictions"):
        dry_run_evaluate(EvaluateConfig(predictions=["a"]))
    assert files(tmp_path) == set()


def test_annotate(work, tmp_path, monkeypatch):
    options = dict(data_file=str(work / "test.jsonl"), output_file=str(tmp_path / "a.jsonl"), shots=1,
                   max_new_tokens=8, keywords="teacher")  # fmt: skip
    found = dry_run_annotate(AnnotateConfig(teacher=str(work / "teacher"), **options))
    assert found["work"]["replies"] == {"phase_1": 6, "phase_2_at_most": 6, "key_words_at_most": 6, "at_most": 18}
    assert found["per_example"]["tokens"]["longest"] > 100 and found["time"]["seconds_at_most"] > 0
    monkeypatch.setattr(Endpoint, "ask", lambda *args: pytest.fail("asked"))
    found = dry_run_annotate(AnnotateConfig(teacher="gpt", endpoint="http://localhost:1/v1", price_in=1.0,
                                            price_out=2.0, samples=2, temperature=0.5, **options))  # fmt: skip
    assert found["work"]["requests"]["phase_1"] == 12
    first, both = (found["cost"][f"{name}_at_most"] for name in ("phase_1", "both_phases"))
    assert 0 < 2 * first < both < 3 * first  # the hint makes the prompts longer
    assert files(tmp_path) == set()


def test_study(work, tmp_path, capsys):
    (tmp_path / "study.yaml").write_text(json.dumps({
        "output_dir": "results", "student": str(work / "student"), "seeds": [0, 1],
        "data": {"sums": {"train_file": str(work / "train.jsonl"), "tests": {"test": str(work / "test.jsonl")}}},
        "options": {"max_steps": 2, "use_cpu": True}, "arms": {"dss": {"objective": "dss"}},
    }))  # fmt: skip
    assert main(["study", str(tmp_path / "study.yaml"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"runs +2\n", text) and re.search(r"left +2\n", text) and re.search(r"sums/dss +2\n", text)
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


def test_the_flag_and_the_yaml_key(work, tmp_path, capsys, monkeypatch):
    values = {"model": str(work / "student"), "data_file": str(work / "test.jsonl"), "output_dir": str(tmp_path / "e"),
              "dry_run": True, "max_new_tokens": 3}  # fmt: skip
    (tmp_path / "c.yaml").write_text(json.dumps(values))
    assert main(["evaluate", "--config", str(tmp_path / "c.yaml")]) == 0
    text = capsys.readouterr().out
    assert text.startswith("dry run: nothing was written\nexamples\n") and re.search(r"[MG]iB", text)  # of this process
    assert not (tmp_path / "e").exists()
    assert main(["evaluate", "--config", str(tmp_path / "c.yaml"), "--dry_run", "false"]) == 0
    assert (tmp_path / "e/summary.json").exists()
    assert main(["plot", "--dry_run"]) == 2


def test_units():
    found = {
        "memory": {"a": 1023, "b": 3 * 2**30, "c": 150 * 2**20},
        "time": {"x": 61.0, "y": 700.0, "z": 7200.0, "u": None},
    }
    text = render(found)
    for part in ("a  1023 bytes", "b  3 GiB", "c  150 MiB", "x  61 s", "y  12 min", "z  2.0 h", "u  unknown"):
        assert part in text
