from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import molsaki
from molsaki import cli, doctor
from molsaki.cli import main
from molsaki.evaluation import evaluate as evaluate_module
from tests.helpers import tiny
from tests.helpers.tiny import one_thread  # noqa: F401

ROOT = Path(__file__).parents[2]
TRAJECTORY = Path(__file__).with_name("trajectory.json")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with models and data, the teacher's store and a short run, all written by the commands."""
    folder = tmp_path_factory.mktemp("cli")
    tiny.save(folder / "teacher", 3, tiny.tokenizer(60), seed=1)
    tiny.save(folder / "student", 2)
    tiny.write_jsonl(folder / "train.jsonl", tiny.problems(16))
    tiny.write_jsonl(folder / "test.jsonl", [{**record, "id": "t/" + record["id"]} for record in tiny.problems(6)])
    extract = ["extract", "--teacher", folder / "teacher", "--data_files", folder / "train.jsonl"]
    assert run(*extract, "--store", folder / "store", "--shard_size", 8) == 0
    assert run(*distill(folder), "--output_dir", folder / "run") == 0
    return folder


def run(*argv) -> int:
    return main([str(word) for word in argv])


def distill(folder: Path) -> list:
    config = folder / "distill.yaml"
    config.write_text(
        "max_steps: 6\nper_device_train_batch_size: 4\nlearning_rate: 3.0e-3\nlogging_steps: 1\nsave_steps: 3\n"
        "use_cpu: true\ndisable_tqdm: true\nrouter_learning_rate: 1.0e-4\nadam_epsilon: 1.0e-4\n"
    )
    files = ["--student", folder / "student", "--store", folder / "store", "--train_file", folder / "train.jsonl"]
    return ["distill", "--config", config, *files]


def history(folder: Path) -> list[dict]:
    return [e for e in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in e]


def test_trajectory(work):
    """The losses of a run are those of the committed one; MOLSAKI_PIN=1 writes them again."""
    names = (
        "loss",
        "loss_pre",
        "loss_exp",
        "loss_att",
        "loss_att_uniform",
        "entropy_teacher",
        "entropy_student",
        "grad_norm",
    )
    found = [{name: entry[name] for name in names} for entry in history(work / "run")]
    if os.environ.get("MOLSAKI_PIN"):
        TRAJECTORY.write_text(json.dumps(found, indent=1) + "\n")
    expected = json.loads(TRAJECTORY.read_text())
    assert len(found) == len(expected) == 6
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def test_evaluate_plot_and_store(work, capsys):
    assert run("evaluate", "--model", work / "run", "--data_file", work / "test.jsonl", "--output_dir", work / "e") == 0
    assert len((work / "e/predictions.jsonl").read_text().splitlines()) == 6
    student = ["--student", work / "run", "--run", work / "run", "--data_file", work / "test.jsonl"]
    assert run("plot", "--teacher", work / "teacher", *student, "--output_dir", work / "plots", "--examples", 2) == 0
    names = {re.sub("-[0-9a-f]{8}[.]", ".", path.name) for path in (work / "plots").iterdir()}
    pictures = ("map_t_p0", "map_t_p1", "attention_t_p0", "attention_t_p1", "losses", "layer_weights")
    assert names == {f"{picture}.{suffix}" for picture in pictures for suffix in ("png", "svg")}
    stored = ["--store", work / "store", "--data_file", work / "train.jsonl", "--ids", "p3", "--format", "svg"]
    assert run("plot", *stored, "--output_dir", work / "stored") == 0
    assert [path.name for path in (work / "stored").iterdir()] == ["map_p3.svg"]
    capsys.readouterr()
    assert run("store", "verify", work / "store") == 0
    assert capsys.readouterr().out == "16 examples in 2 shards, all whole\n"
    assert run("store", "info", work / "store") == 0
    assert "num_layers: 3" in capsys.readouterr().out
    assert run("store", "head", work / "store", "-n", 2) == 0
    assert "p0: map 1 x 5 x 9" in capsys.readouterr().out


def test_store_verify_finds_a_flipped_byte(work, tmp_path, capsys):
    shutil.copytree(work / "store", tmp_path, dirs_exist_ok=True)
    shard = tmp_path / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    assert run("store", "verify", tmp_path) == 1
    assert capsys.readouterr().out.startswith("shard-00001.safetensors: ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["distill", "--lerning_rate", "1"], "--lerning_rate: no such flag; did you mean --learning_rate?"),
        (["distill", "--use_cpu"], "--train_file: required"),
        (["distill", "--use_cpu", "--train_file", "none.jsonl", "--student", "/no/model"], "--student: no such folder"),
        (["extract", "--data_files", "none.jsonl", "--store", "s"], "none.jsonl: no such file"),
        (["keys", "--data_file", "none.jsonl"], "top, top_share: expected one of them, got None and None"),
        (["keys", "--top", "3", "--data_file", "none.jsonl", "--output_file", "k.jsonl"], "none.jsonl: no such file"),
        (["evaluate", "--mode", "guess"], "invalid choice: 'guess'"),
        (["plot"], "nothing to draw: give --run, or --data_file with"),
        (["store", "info", "/no/store"], "/no/store: no store there"),
        (["distill", "--config", "none.yaml"], "none.yaml"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(argv, message, capsys):
    assert run(*argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"molsaki {argv[0]}: error: ")
    assert message in error


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import molsaki", ["torch", "transformers", "numpy"]),
        ("import molsaki; molsaki.segment('Why 4?', 'So 5.')", ["torch", "transformers"]),
        ("import molsaki.evaluation.statistics, molsaki.evaluation.compare", ["torch", "transformers"]),
        ("from molsaki.cli import main; main(['--help'])", ["torch", "transformers", "numpy", "yaml"]),
        ("from molsaki.cli import main; main(['extract', '--help'])", ["torch", "accelerate", "matplotlib"]),
        ("from molsaki.cli import main; main(['keys', '--help'])", ["torch", "accelerate", "matplotlib"]),
        ("from molsaki.cli import main; main(['distill', '--help'])", ["torch", "accelerate", "matplotlib"]),
    ],
)
def test_imports(code, absent):
    """In a fresh process: nothing slow is imported before it is needed."""
    check = f"import atexit, sys\natexit.register(lambda: print([m for m in {absent} if m in sys.modules]))\n{code}"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]"), done.stderr


def test_public_names():
    assert {name for name in dir(molsaki) if not name.startswith("_")} >= set(molsaki.__all__) - {"__version__"}
    assert all(getattr(molsaki, name) is not None for name in molsaki.__all__)
    assert molsaki.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="module 'molsaki' has no attribute 'teach'"):
        molsaki.teach  # noqa: B018


def test_interruption_says_how_to_continue(monkeypatch, capsys):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_module, "evaluate", interrupt)
    assert run("evaluate") == 130
    assert "molsaki evaluate: interrupted. Run it again." in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "inherited"), [("--help", False), ("--help_all", True)])
def test_help_of_distill(capsys, flag, inherited):
    """The options of TrainingArguments, which take seconds to import, are listed on request."""
    with pytest.raises(SystemExit) as caught:
        run("distill", flag)
    listed = capsys.readouterr().out
    assert caught.value.code == 0 and "--objective" in listed and "--help_all" in listed
    assert ("--learning_rate" in listed) is inherited


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as caught:
        run("train")
    assert caught.value.code == 2
    assert "invalid choice: 'train'" in capsys.readouterr().err


def test_doctor(capsys):
    assert run("doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["engines"]["eager"] == "ready"
    assert {"flash_attn", "flex"} <= found["engines"].keys() and found["auto"]["cpu"] == "native, then sdpa, then eager"
    assert found["packages"]["torch"][0].isdigit()
    assert found["optional"]["deepspeed"][0].isdigit() or "needed for" in found["optional"]["deepspeed"]
    assert run("doctor") == 0
    assert "engines" in capsys.readouterr().out


@pytest.mark.parametrize("kept", [False, True])
def test_doctor_says_what_gpu_packages_need(monkeypatch, kept):
    monkeypatch.setattr(doctor, "_version", lambda package: "4.0.0b36")
    monkeypatch.setenv("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1" if kept else "0")
    notes = doctor._notes(None)
    assert "missing here: a C compiler" in notes["triton"]
    assert ("again in every process unless" in notes["flash-attn-4"]) is not kept
    assert "FA4" in notes["flash-attn-4 in PyTorch"]
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    assert doctor._notes("cc") == {} and "notes" not in doctor.render({"a": {"b": 1}, "notes": {}})


KILLED = """
import os, signal, sys, torch
from molsaki import cli
from molsaki.training import checkpoints

def seal(folder, whole=checkpoints.seal):
    if folder.name == "checkpoint-3":
        os.kill(os.getpid(), signal.SIGKILL)
    whole(folder)

checkpoints.seal = seal
torch.set_num_threads(1)
cli.main(sys.argv[1:])
"""


def test_killed_and_resumed_is_bitwise_the_same(work):
    """SIGKILL in the middle of a checkpoint."""
    folder = work / "killed"
    argv = [str(a) for a in [*distill(work), "--output_dir", folder, "--save_steps", 1]]
    process = subprocess.run([sys.executable, "-c", KILLED, *argv], cwd=ROOT, capture_output=True, check=False)
    assert process.returncode == -signal.SIGKILL
    assert (folder / "checkpoint-3/trainer_state.json").exists()
    assert run(*argv, "--resume") == 0
    names = ("step", "loss", "loss_att", "entropy_student", "grad_norm")
    assert [[e[n] for n in names] for e in history(folder)] == [[e[n] for n in names] for e in history(work / "run")]
    assert (folder / "model.safetensors").read_bytes() == (work / "run/model.safetensors").read_bytes()
    assert (folder / "layer_weights.jsonl").read_text() == (work / "run/layer_weights.jsonl").read_text()


def test_two_processes_are_one_with_twice_the_batch(work):
    """Two gloo processes under torchrun: the same losses, gradients and weights to rounding."""
    folder = work / "two"
    argv = [str(a) for a in [*distill(work), "--output_dir", folder, "--per_device_train_batch_size", 2]]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "molsaki.cli", *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": "0"}
    process = subprocess.run(torchrun, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    names = ("loss", "loss_pre", "loss_exp", "loss_att", "entropy_teacher", "words_mean", "grad_norm")
    for a, b in zip(history(folder), history(work / "run"), strict=True):
        assert [a[n] for n in names] == pytest.approx([b[n] for n in names], rel=1e-4)
    a, b = (load_file(path / "model.safetensors") for path in (folder, work / "run"))
    assert all(torch.allclose(a[name], b[name], rtol=1e-3, atol=1e-4) for name in b)


def test_the_log_is_shown_once(monkeypatch, capsys):
    logger = logging.getLogger("molsaki")
    for rank, level in (("0", logging.INFO), ("1", logging.WARNING)):
        monkeypatch.setattr(logger, "handlers", [])
        monkeypatch.setattr(logger, "level", logging.NOTSET)
        monkeypatch.setattr(logger, "propagate", False)  # no handler above it
        monkeypatch.setenv("RANK", rank)
        cli._show_log()
        cli._show_log()
        logger.info("read")
        assert (len(logger.handlers), logger.level) == (1, level)
        assert capsys.readouterr().err == ("read\n" if rank == "0" else "")
