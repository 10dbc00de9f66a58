"""Checks the dry run of a training where the system does not tell how much memory a process has, as on Windows."""

from __future__ import annotations

import json

from molsaki.cli import main
from molsaki.dry_run import distill, timing
from tests.helpers import tiny


def test_a_dry_run_with_unknown_memory(monkeypatch, capsys, tmp_path):
    """What is not known is left out of the parts and their sum, or null; it is not 0."""
    student, data = tiny.save(tmp_path / "student", 2), tiny.write_jsonl(tmp_path / "train.jsonl", tiny.problems(4))
    argv = ["distill", "--student", student, "--train_file", data, "--objective", "dss", "--use_cpu", "--max_steps", 2]
    argv = [str(word) for word in [*argv, "--output_dir", tmp_path / "run", "--dry_run", "--log_format", "json"]]
    assert main(argv) == 0
    known = json.loads(capsys.readouterr().out)["memory"]
    monkeypatch.setattr(distill, "resident", lambda: None)
    monkeypatch.setattr(timing, "peak_of_process", lambda: None)
    assert main(argv) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert known["program"] > 0 and known["peak"] > 0
    assert known.keys() - memory.keys() == {"program"} and memory["peak"] is None
    parts = [memory[name] for name in memory.keys() - {"sum", "peak", "measured"}]
    assert memory["sum"] == sum(parts) == known["sum"] - known["program"] > 0
