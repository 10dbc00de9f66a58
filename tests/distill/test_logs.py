"""Logs as text and as JSON lines, and what goes to which stream."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from molsaki import logs
from molsaki.cli import main
from tests.helpers import tiny
from tests.helpers.tiny import one_thread  # noqa: F401

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clean(monkeypatch):
    """The package's logger and the root logger as in a fresh process."""
    for logger in (logging.getLogger("molsaki"), logging.getLogger()):
        monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logging.getLogger("molsaki"), "level", logging.NOTSET)
    monkeypatch.delenv("MOLSAKI_LOG", raising=False)
    monkeypatch.setattr(logging, "captureWarnings", lambda on: None)


@pytest.mark.parametrize(("rank", "level"), [("0", logging.INFO), ("1", logging.WARNING)])
def test_the_log_is_shown_once(clean, monkeypatch, capsys, rank, level):
    monkeypatch.setenv("RANK", rank)
    logger = logging.getLogger("molsaki")
    monkeypatch.setattr(logger, "propagate", False)  # no handler above it
    logs.show()
    logs.show()
    logger.info("read")
    assert (len(logger.handlers), logger.level) == (1, level)
    assert capsys.readouterr().err == ("read\n" if rank == "0" else "")


def test_json_lines(clean, monkeypatch, capsys):
    monkeypatch.setenv("MOLSAKI_LOG", "json")
    logs.show()
    logs.show()
    logging.getLogger("molsaki.training").info("step %d", 3, extra={"values": {"loss": float("nan"), "level": 1}})
    try:
        raise KeyError("x")
    except KeyError:
        logging.getLogger("another").exception("lost\nit")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert first.pop("time").endswith("+00:00")
    assert first == {"level": "info", "name": "molsaki.training", "message": "step 3", "loss": None}
    assert second["message"] == "lost\nit" and "KeyError: 'x'" in second["traceback"]


def test_a_library_writes_json_too(clean, monkeypatch, capsys):
    library = logging.getLogger("transformers")
    monkeypatch.setattr(library, "handlers", [logging.StreamHandler(sys.stderr)])
    monkeypatch.setattr(library, "propagate", False)
    monkeypatch.setenv("MOLSAKI_LOG", "json")
    logs.show()
    logs.take_over_libraries()
    library.warning("careful")
    assert json.loads(capsys.readouterr().err)["message"] == "careful"


def test_numbers_that_json_does_not_have():
    numbers = {"a": float("inf"), "b": [1.5, float("nan")], "c": {"d": True}}
    assert json.loads(logs.as_json(numbers)) == {"a": None, "b": [1.5, None], "c": {"d": True}}


def test_errors_and_results_in_json(clean, capsys, tmp_path):
    words = ["evaluate", "--log-format=json", "--moddel", "m"]
    assert main(words) == 2
    out, error = capsys.readouterr()
    line = json.loads(error)
    assert out == "" and (line["level"], line["exit_code"], line["command"]) == ("error", 2, "evaluate")
    assert line["message"] == "--moddel: no such flag; did you mean --model?"
    assert not logs.is_json()  # the flag is of that call
    tiny.save(tmp_path / "model", 2)
    tiny.write_jsonl(tmp_path / "test.jsonl", tiny.problems(3))
    files = ["--model", str(tmp_path / "model"), "--data_file", str(tmp_path / "test.jsonl")]
    assert main(["evaluate", "--log_format", "json", *files, "--output_dir", str(tmp_path / "e")]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 3


@pytest.mark.slow
def test_every_line_is_json(tmp_path):
    """In a fresh process: each line of standard error is JSON, and standard output is one object, the result."""
    tiny.save(tmp_path / "student", 2)
    tiny.write_jsonl(tmp_path / "train.jsonl", tiny.problems(8))
    code = (
        "import sys; from molsaki.cli import main; sys.exit(main(sys.argv[1:]))"  # as the program, without torch before
    )
    words = [
        "distill", "--student", "student", "--train_file", "train.jsonl", "--output_dir", "run", "--max_steps", "2",
        "--logging_steps", "1", "--use_cpu", "--save_strategy", "no",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MOLSAKI_LOG": "json", "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-c", code, *words]
    done = subprocess.run(start, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["examples"] == 8 and isinstance(result["train_loss"], float)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert all({"time", "level", "name", "message"} <= line.keys() for line in lines)
    steps = [line for line in lines if line["name"] == "molsaki.training"]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(isinstance(line["loss_exp"], float) and line["max_steps"] == 2 for line in steps)
