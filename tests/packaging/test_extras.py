"""Runs the commands without optional packages: every error names the extra to install, and the help needs none.

A package is hidden from a new process by None in ``sys.modules``, for which Python refuses the import.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import pytest

from molsaki import extras
from molsaki.cli import COMMANDS
from tests.helpers import tiny
from tests.packaging.test_imports import python

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]\n")[2]
DECLARED = dict(re.findall(r"^([\w-]+) = \[(.*?)\](?=\n|  #)", SECTION.partition("\n[")[0], re.MULTILINE | re.DOTALL))
NOT_IMPORTED = {"trl", "demo", "test", "docs", "dev", "all"}  # extras of examples and tools, or made of others
MODULE_OF = {
    "pyyaml": "yaml", "flash-attn": "flash_attn", "liger-kernel": "liger_kernel", "math-verify": "math_verify",
}  # fmt: skip
OF_ANOTHER = {"jinja2": "torch", "packaging": "transformers", "flash_attn_4": "flash"}  # which requires it
EVERYTHING = [name for names in extras.MODULES.values() for name in names if name != "triton"]

RUN = """
import contextlib, io, json, sys
hidden, commands = json.loads(sys.argv[1])
sys.modules.update(dict.fromkeys(hidden))
from molsaki.cli import main
found = []
for argv in commands:
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = main(argv)
    found.append([code, out.getvalue(), error.getvalue()])
print(json.dumps(found))
"""


def run_without(hidden: list[str], commands: list[list[str]]) -> list[tuple[int, str, str]]:
    """The exit code, output and error of each command in one process from which modules are hidden."""
    lines = python(RUN, json.dumps([hidden, commands])).splitlines()
    return [tuple(found) for found in json.loads(lines[-1])]


def pip_line(extra: str) -> str:
    return f'run pip install "molsaki-kernels[{extra}]"\n'


def test_the_modules_are_those_of_pyproject():
    assert len(DECLARED) >= 15
    packages = {
        extra: {re.match(r"[\w-]+", text).group() for text in re.findall(r'"([^"]+)"', listed)}
        for extra, listed in DECLARED.items()
        if extra not in NOT_IMPORTED
    }
    modules = {extra: {MODULE_OF.get(name, name) for name in names} for extra, names in packages.items()}
    assert modules == {extra: set(names) for extra, names in extras.MODULES.items()}
    assert set(extras.FOR_ONE_OPTION) < set(extras.MODULES["train"])


def test_every_import_is_of_an_extra():
    known = {"torch", "numpy", "molsaki", "molsaki_kernels", *sys.stdlib_module_names, *OF_ANOTHER}
    known |= {name for names in extras.MODULES.values() for name in names} | {"_typeshed"}  # of mypy
    unknown = set()
    for package in ("molsaki", "molsaki_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                unknown |= {f"{path.name}: {name}" for name in names if name.split(".")[0] not in known}
    assert unknown == set()


def test_the_help_of_every_command_needs_no_extra():
    found = run_without(EVERYTHING, [[command, "--help"] for command in COMMANDS])
    for command, (code, out, error) in zip(COMMANDS, found, strict=True):
        assert (code, error) == (0, "") and out.startswith(f"usage: molsaki {command}"), error


def test_every_command_of_a_core_install_names_the_extra(tmp_path):
    """doctor needs none."""
    (tmp_path / "study.yaml").write_text("arms: {}\n")
    extra_of = dict.fromkeys(COMMANDS, "train") | {"completion": "completion"}
    arguments = {"study": [str(tmp_path / "study.yaml")], "store": ["info", "maps"], "completion": ["bash"]}
    commands = [[command, *arguments.get(command, [])] for command in COMMANDS] + [["distill", "--help_all"]]
    for argv, (code, out, error) in zip(commands, run_without(EVERYTHING, commands), strict=True):
        if argv == ["doctor"]:
            assert code == 0 and "self-test" in out and error == ""
        else:
            assert code == 2 and out == "" and error.endswith(pip_line(extra_of[argv[0]])), (argv, error)


def test_completion_needs_no_other_extra():
    pytest.importorskip("shtab")
    hidden = [name for name in EVERYTHING if name != "shtab"]
    ((code, out, error),) = run_without(hidden, [["completion", "bash"]])
    assert (code, error) == (0, "") and "--objective" in out and "--adam_beta1" not in out


def test_an_endpoint_without_httpx():
    argv = ["annotate", "--endpoint", "http://localhost:8000/v1", "--teacher", "m", "--data_file", "q.jsonl"]
    ((code, _, error),) = run_without(["httpx"], [[*argv, "--output_file", "train.jsonl"]])
    assert code == 2 and error.endswith(f"httpx: expected to be installed; {pip_line('train')}")


@pytest.mark.slow
def test_an_option_without_its_extra(tmp_path):
    """With the extra train, but for the packages of one option, every command runs and such an option is refused."""
    model = str(tiny.save(tmp_path / "model", 2))
    data = str(tiny.write_jsonl(tmp_path / "train.jsonl", tiny.problems(4)))
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    (tmp_path / "study.yaml").write_text("nothing: 1\n")
    written = ["--output_file", str(tmp_path / "keys.jsonl")]
    extract = ["extract", "--teacher", model, "--data_files", data, "--store", str(tmp_path / "maps")]
    distill = ["distill", "--student", model, "--objective", "dss", "--train_file", data, "--output_dir"]
    distill += [str(tmp_path / "run"), "--use_cpu"]
    keys = ["keys", "--teacher", model, "--top", "2", *written, "--data_file"]
    refused = {
        ("plot", "--run", str(tmp_path)): ("matplotlib: expected to be installed", "plot"),
        (*keys, str(tmp_path / "t.parquet")): ("t.parquet: Parquet needs the package pyarrow", "parquet"),
        (*extract, "--splitter", "sentencex:en"): ("splitter: sentencex:en needs the package sentencex", "languages"),
        (*extract, "--quantize", "8bit"): ("--quantize: 8bit needs the package bitsandbytes", "quantize"),
        (*distill, "--lora_rank", "2"): ("--lora_rank, peft_config: LoRA needs the package peft", "train"),
        (*distill, "--report_to", "tensorboard"): ("report_to: tensorboard needs the package tensorboard", "train"),
        ("completion", "bash"): ("shtab: expected to be installed", "completion"),
    }
    allowed = {
        ("keys", "--top", "2"): "--data_file: required",
        ("evaluate",): "--data_file: required",
        ("extract",): "--store: required",
        ("report",): "--run: required",
        ("study", str(tmp_path / "study.yaml")): "nothing: no such key",
        ("store", "info", "maps"): "maps",
        ("annotate", "--endpoint", "http://localhost:1/v1"): "--data_file: required",
    }
    hidden = [name for name in EVERYTHING if name not in extras.MODULES["train"]]
    hidden += [*extras.FOR_ONE_OPTION, "datasets"]  # which transformers imports if it is there, and needs pandas
    found = run_without(hidden, [list(argv) for argv in (*refused, *allowed)])
    for argv, (code, _, error) in zip((*refused, *allowed), found, strict=True):
        assert code == 2 and "Traceback" not in error, error
        if argv in refused:
            begin, extra = refused[argv]
            assert begin in error and error.endswith(pip_line(extra)), (argv, error)
        else:
            assert allowed[argv] in error and "install" not in error, (argv, error)


SEGMENT = """
import molsaki
molsaki.segment("Why 4?", "So 5.")
"""
TO_PANDAS = """
import numpy
from molsaki.modeling.attention_map import AttentionMap
AttentionMap(numpy.ones((1, 1, 1)), ["a"], ["b"], [0], [], []).to_pandas()
"""


@pytest.mark.parametrize(
    ("source", "module", "begin", "extra"),
    [
        (SEGMENT, "regex", "regex: expected to be installed; ", "train"),
        (TO_PANDAS, "pandas", "to_pandas: needs the package pandas, which is not installed; ", "notebook"),
    ],
)
def test_a_function_of_python_names_the_extra(source, module, begin, extra):
    hidden = f"import sys\nsys.modules[{module!r}] = None\nfrom molsaki.extras import MissingExtra\ntry:"
    called = source.replace("\n", "\n    ")
    assert python(f"{hidden}{called}pass\nexcept MissingExtra as error:\n    print(error)") == begin + pip_line(extra)
