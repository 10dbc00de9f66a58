"""The help of every command: groups, defaults, examples that the program takes, widths; and shell completion."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
import shutil
import subprocess

import pytest
import yaml
from transformers import TrainingArguments

from molsaki import cli, completion, extras
from molsaki.cli import COMMANDS, CONFIGURED, main, run_by_position
from molsaki.command_help import HELP, TRAINING
from molsaki.config import DistillOptions
from molsaki.flags import MEANT, nearest, parse_command
from molsaki.terminal import has_colours
from molsaki.training.config import REFUSED, DistillConfig


def config_class(command: str) -> type:
    module, name, _ = CONFIGURED[command]
    return DistillOptions if command == "distill" else getattr(importlib.import_module(module), name)


def help_of(command: str, capsys, *flags: str) -> str:
    assert main([command, *(flags or ["--help"])]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [command for command in CONFIGURED if command in HELP])
def test_every_option_is_in_one_group(command):
    names = [name for group in HELP[command].groups.values() for name in group]
    fields = {field.name for field in dataclasses.fields(config_class(command)) if field.init}
    more = {"output_dir", *TRAINING} if command == "distill" else set()
    assert len(names) == len(set(names))
    assert set(names) == fields | more
    assert next(iter(HELP[command].groups)).startswith(("required", "what is drawn"))


def test_the_defaults_of_training_are_those_of_transformers():
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    for name, (_, default) in TRAINING.items():
        found = defaults[name]
        found = getattr(found, "value", found)
        assert found == default or (found is None and default == 0), name


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("columns", [80, 60, 200])
def test_the_help_fits_the_terminal(command, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = help_of(command, capsys)
    too_long = [line for line in text.splitlines() if len(line) > columns and len(line.split()) > 2]
    assert too_long == []
    assert "\033" not in text
    if command in HELP:
        assert text.startswith(f"usage: molsaki {command} ") and text.count("\nexamples:\n") == 1
        assert 2 <= len(HELP[command].examples) <= 4
    if columns == 200 and command == "extract":
        assert max(map(len, text.splitlines())) > 100  # and no more than is easy to read
        assert max(map(len, text.splitlines())) <= 120


def test_each_option_has_its_default(capsys):
    text = " ".join(help_of("extract", capsys).split())
    for part in ("[default: 8192]", "Temperature of the student's layer weights (Eq. 5). [default: 0.5]",
                 "--all_layers [true|false] Store the map of every layer, so that any mixture can be used later. "
                 "[default: false]"):  # fmt: skip
        assert part in text
    assert "%%" not in text


def test_ours_come_before_the_inherited_ones(capsys):
    short, whole = help_of("distill", capsys), help_of("distill", capsys, "--help-all")
    assert "--objective" in short and "--learning_rate" in short and "--adam_beta2" not in short
    assert whole.index("--objective") < whole.index("--adam_beta2")
    assert "--help_all" in short
    options = {line.split()[0] for line in whole.splitlines() if re.match(r"  --\w", line)}
    fields = {f"--{field.name}" for field in dataclasses.fields(DistillConfig) if field.init}
    assert {f"--{name}" for name in REFUSED} & fields - options
    assert fields - options <= {f"--{name}" for name in REFUSED} | {"--_n_gpu"}
    assert main(["distill", "--help_all"]) == 0


@pytest.mark.parametrize(
    ("command", "line"),
    [(name, line) for name, about in HELP.items() if name in CONFIGURED for _, line in about.examples],
)
def test_the_examples_are_taken(command, line, tmp_path, monkeypatch):
    """Every flag and value of every example."""
    words = shlex.split(line)
    words = run_by_position(command, words[words.index(command) + 1 :])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump({"student": "s", "train_file": ["t.jsonl"]}))
    words = [word for word in words if word != "--bf16"]  # refused on some processors
    module, name, _ = CONFIGURED[command]
    config, dry_run = parse_command(getattr(importlib.import_module(module), name), words, None, HELP[command].dry_run)
    assert dry_run is ("--dry_run" in words)
    assert config is not None


@pytest.mark.parametrize(("name", "names", "expected"), [
    ("lerning_rate", ["learning_rate", "seed"], "; did you mean --learning_rate?"),
    ("train", ["seed", "train_file"], "; did you mean --train_file?"),
    ("limit", ["examples", "ids"], "; did you mean --examples?"),
    ("limit", ["limits", "seed"], "; did you mean --limits?"),
    ("xyz", ["seed"], ""),
])  # fmt: skip
def test_nearest(name, names, expected):
    assert nearest(f"--{name}", names, "--") == expected


def test_what_is_meant_exists():
    options = {field.name for command in CONFIGURED for field in dataclasses.fields(config_class(command))}
    options |= {field.name for field in dataclasses.fields(DistillConfig)} | {"log_format"}
    assert {one for several in MEANT.values() for one in several} <= options


@pytest.mark.parametrize(("variables", "terminal", "expected"), [
    ({}, True, True),
    ({}, False, False),
    ({"NO_COLOR": "1"}, True, False),
    ({"NO_COLOR": ""}, True, True),
    ({"FORCE_COLOR": "1"}, False, True),
    ({"FORCE_COLOR": "0"}, True, False),
    ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False),
    ({"TERM": "dumb"}, True, False),
])  # fmt: skip
def test_colours(monkeypatch, capsys, variables, terminal, expected):
    import sys

    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert has_colours(sys.stdout) is expected
    main(["store", "--help"])
    assert ("\033[" in capsys.readouterr().out) is expected


def test_completion_without_shtab(monkeypatch, capsys):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    assert main(["completion", "bash"]) == 2
    assert 'run pip install "molsaki-kernels[completion]"' in capsys.readouterr().err


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    pytest.importorskip("shtab")
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "fish", "zsh"):
        (folder / shell).write_text(completion.script(shell, cli.parsers(inherited=True), COMMANDS))
    (folder / "train.jsonl").write_text("")
    return folder


CASES = [
    ("dis", "distill"),
    ("distill --objec", "--objective"),
    ("distill --adam_beta", "--adam_beta1"),
    ("extract --map_heads ", "each"),
    ("extract --data_files ./tr", "./train.jsonl"),
    ("store ver", "verify"),
]


@pytest.mark.parametrize(("typed", "expected"), CASES)
def test_bash_completes(scripts, typed, expected):
    code = (
        'source ./bash; words=(molsaki $1); [ "${1% }" != "$1" ] && words+=(""); COMP_WORDS=("${words[@]}")\n'
        'COMP_CWORD=$((${#words[@]}-1)); f=$(complete -p molsaki | sed "s/.*-F \\([^ ]*\\).*/\\1/"); $f\n'
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", code, "bash", typed], cwd=scripts, capture_output=True, text=True, check=False)
    assert expected in done.stdout.split(), done.stderr


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
@pytest.mark.parametrize(("typed", "expected"), CASES)
def test_fish_completes(scripts, typed, expected):
    code = f'source ./fish; complete -C "molsaki {typed}"'
    done = subprocess.run(["fish", "-c", code], cwd=scripts, capture_output=True, text=True, check=False)
    assert expected in [line.split("\t")[0] for line in done.stdout.splitlines()], done.stderr


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_the_zsh_script_is_valid(scripts):
    assert subprocess.run(["zsh", "-n", "zsh"], cwd=scripts, check=False).returncode == 0
