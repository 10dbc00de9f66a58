from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import molsaki
from molsaki import cli, exits
from molsaki.annotation import annotate as annotate_module
from molsaki.cli import main
from molsaki.evaluation import evaluate as evaluate_module
from tests.helpers import processes, tiny
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
        (["distill", "--use_cpu", "--train_file", "none.jsonl", "--student", "/no/model"], "none.jsonl: no such file"),
        (["distill", "--use_cpu", "--train_file", __file__, "--student", "/no/model"], "--student: no such folder"),
        (["extract", "--data_files", "none.jsonl", "--store", "s"], "none.jsonl: no such file"),
        (["keys", "--data_file", "none.jsonl"], "top, top_share: expected one of them, got None and None"),
        (["keys", "--top", "3", "--data_file", "none.jsonl", "--output_file", "k.jsonl"], "none.jsonl: no such file"),
        (["evaluate", "--mode", "guess"], "invalid choice: 'guess'"),
        (["plot"], "--run, --data_file: expected at least one of them, got neither"),
        (["store", "info", "/no/store"], "/no/store: no store there"),
        (["distill", "--config", "none.yaml"], "--config: none.yaml: no such file"),
        (["distill", "--config", "."], "--config: .: expected a YAML file"),
        (
            ["keys", "--top", "3", "--data-file", "a.jsonl", "b.jsonl"],
            "--data_file: expected one value, got 2: a",
        ),
        (["keys", "--data_file", "a.jsonl", "--data-file", "b.jsonl"], "--data_file: given 2 times; expected one file"),
        (["extract", "--data_files", "a", "--data-files=b"], "--data_files: given 2 times; give all values once"),
        (["plot", "--limit", "3"], "--limit: no such flag; did you mean --examples?"),
        (["distill", "--lr", "3"], "--lr: no such flag; did you mean --learning_rate?"),
        (["keys", "--data_files", "a"], "--data_files: no such flag; did you mean --data_file?"),
        (["distill", "--learning_rate", "-1e-3"], "--learning_rate: expected a value; one that begins with a dash is"),
        (["extract", "--data_files", "-a.jsonl"], "written --data_files=VALUE"),
        (["study", "s.yaml", "--seeds"], "error: --seeds: expected a value"),
        (["distill", "--learning-rate", "a"], "error: --learning_rate: invalid float value: 'a'"),
        (["evaluate", "stray"], "stray: no such flag"),
        (["study", "s.yaml", "--procesess", "3"], "--procesess: no such argument; did you mean --processes?"),
        (["study"], "the following arguments are required: FILE"),
        (["store", "look", "s"], "invalid choice: 'look'"),
        (["trian"], "trian: no such command"),
        (["extrakt"], "extrakt: no such command; did you mean extract?"),
        (["evaluate", "--log_format", "xml"], "--log_format, MOLSAKI_LOG: expected one of text, json, got 'xml'"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(argv, message, capsys):
    assert run(*argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("molsaki" if "no such command" in message else f"molsaki {argv[0]}: error: ")
    assert message in error


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import molsaki", ["torch", "transformers", "numpy"]),
        ("import molsaki; molsaki.segment('Why 4?', 'So 5.')", ["torch", "transformers"]),
        ("import molsaki.evaluation.statistics, molsaki.evaluation.compare", ["torch", "transformers"]),
        ("from molsaki.cli import main; main(['--help'])", ["torch", "transformers", "numpy", "yaml"]),
        (
            "from molsaki.cli import COMMANDS, main\nfor command in COMMANDS: main([command, '--help'])",
            ["torch", "transformers", "numpy", "yaml", "matplotlib"],
        ),
    ],
)
def test_imports(code, absent):
    """In a fresh process: nothing slow is imported before it is needed."""
    check = f"import atexit, sys\natexit.register(lambda: print([m for m in {absent} if m in sys.modules]))\n{code}"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]"), done.stderr


def test_layers_that_are_not_there_are_refused_before_the_model_runs(work, capsys, tmp_path):
    files = ["--data_file", work / "train.jsonl", "--output_file", tmp_path / "k.jsonl"]
    assert run("keys", "--top", 3, "--layers", 0, 3, "--teacher", work / "teacher", *files) == 2
    assert "--layers: expected some of 0 1 2, got 3" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_list_for_one_value_in_yaml(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("data_file: [a.jsonl, b.jsonl]\ntop: 3\n")
    assert run("keys", "--config", tmp_path / "c.yaml") == 2
    assert "c.yaml: data_file: expected one value, got ['a.jsonl', 'b.jsonl']" in capsys.readouterr().err


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

    def terminate(config):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

    monkeypatch.setattr(evaluate_module, "evaluate", terminate)
    assert run("evaluate") == 143
    assert "molsaki evaluate: terminated. Run it again." in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:  # not of this command
        assert run("evaluate") == 143

    def ends(config):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            try:
                raise OSError
            except OSError:
                terminate(config)
            raise

    capsys.readouterr()
    monkeypatch.setattr(evaluate_module, "evaluate", ends)
    assert run("evaluate") == 130
    assert "molsaki evaluate: interrupted. Run it again." in capsys.readouterr().err
    monkeypatch.setattr(annotate_module, "annotate", interrupt)
    assert run("annotate", "--teacher", "my model", "--limit", 3) == 130
    error = capsys.readouterr().err
    assert "All replies so far are kept. To continue: molsaki annotate --teacher 'my model' --limit 3" in error


def raise_type_error(config):
    return len(config)


def refuse(config):
    raise ValueError("beta: too large")


def out_of_memory(config):
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:113] DefaultCPUAllocator: can't allocate memory: you tried 9 TB")


@pytest.mark.parametrize(
    ("function", "code", "messages"),
    [
        (refuse, 2, ["molsaki evaluate: error: beta: too large\n"]),
        (out_of_memory, 2, ["molsaki evaluate: error: out of memory: "]),
        (raise_type_error, 70, ["Traceback (most recent", "return len(config)", "internal error: TypeError: object of",
                                "Please report it with the lines above, the command, and the output of"]),
    ],
)  # fmt: skip
def test_a_fault_of_the_program_is_not_a_mistake_of_the_user(monkeypatch, capsys, function, code, messages):
    monkeypatch.setattr(evaluate_module, "evaluate", function)
    assert run("evaluate") == code
    out, error = capsys.readouterr()
    assert out == "" and all(message in error for message in messages), error
    assert ("Traceback" in error) is (code == 70)


def test_the_traceback_of_a_mistake_on_request(monkeypatch):
    monkeypatch.setenv("MOLSAKI_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        run("extract", "--data_files", "none.jsonl", "--store", "s")


def test_version_and_no_command(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"molsaki {molsaki.__version__}\n"
    assert run() == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("usage: molsaki COMMAND")


def test_a_reader_that_has_enough():
    """As in `molsaki --help | head -1`."""
    code = "import sys; from molsaki import cli\nfor _ in range(4000): code = cli.main(['--help'])\nsys.exit(code)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read().decode()
    assert (process.wait(), error) == (0, "")  # after the first 141, what follows goes nowhere


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
    process = processes.torchrun("command", *argv)
    assert process.returncode == 0, process.stderr
    names = ("loss", "loss_pre", "loss_exp", "loss_att", "entropy_teacher", "words_mean", "grad_norm")
    for a, b in zip(history(folder), history(work / "run"), strict=True):
        assert [a[n] for n in names] == pytest.approx([b[n] for n in names], rel=1e-4)
    a, b = (load_file(path / "model.safetensors") for path in (folder, work / "run"))
    assert all(torch.allclose(a[name], b[name], rtol=1e-3, atol=1e-4) for name in b)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("raise ValueError('a')", True),
        ("raise ValueError(\n    'a'\n    'b'\n) from None", True),
        ("try:\n    int('x')\nexcept ValueError as e:\n    raise ValueError(\n        f'a {e}'\n    ) from e", True),
        ("int('x')", False),
        ("a, b = [1]", False),
        ("None + 1", False),
    ],
)
def test_what_is_raised_by_a_raise_statement(tmp_path, statement, expected):
    """So under every Python: which line of a statement a traceback names has changed between versions."""
    path = tmp_path / "code.py"
    path.write_text(statement + "\n")
    with pytest.raises((ValueError, TypeError)) as caught:
        exec(compile(path.read_text(), str(path), "exec"), {})
    assert exits._is_deliberate(caught.value) is expected


@pytest.mark.parametrize("text", ["--- well-known step-by-step", "--think-step-by-step, please"])
def test_a_text_that_begins_with_dashes_is_not_changed(text):
    words = ["--out-put", text, "--in-put=a-b", "my-run_1"]
    assert cli._underscores(words) == ["--out_put", text, "--in_put=a-b", "my-run_1"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "redirection, code, message",
    [
        (">/dev/full", 2, "molsaki --help: error: [Errno 28] No space left on device\n"),
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        ("| (exec <&-; sleep 0.5)", 141, ""),
    ],
)
def test_output_that_cannot_be_written(redirection, code, message, unbuffered):
    """The exit code says so, in the command's own words, also if Python would write only at its end."""
    command = f'set -o pipefail; "{sys.executable}" -m molsaki.cli --help {redirection}'
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered, "NO_COLOR": "1"}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, message)
