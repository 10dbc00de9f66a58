"""Runs each example of examples/ on its tiny models and checks what it finds.

Those of examples/training_loops have tests/distill/test_training_loops.py and test_attention_loss.py.
"""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.helpers.tiny import one_thread  # noqa: F401

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "tiny_models")
RATE = "3e-3"


def example(name: str) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py")))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, str]:
    """The paths of the tiny models and data, by the examples' names of them."""
    folder = tmp_path_factory.mktemp("tiny")
    example("tiny_models").write(folder)
    files = {name: str(folder / name) for name in ("student", "teacher", "other_teacher")}
    return files | {"train_file": str(folder / "train.jsonl")}


def first_and_last(logged: list[dict], name: str) -> tuple[float, float]:
    return float(logged[0][name]), float(logged[-1][name])


def test_kernel_only(capsys):
    example("kernel_only").main()
    first, *_, last = re.findall(r"'([\d.]+)'\]", capsys.readouterr().out)
    assert float(last) > 10 * float(first)


def test_capture_maps(tiny, capsys):
    maps = example("capture_maps").main(tiny["teacher"])
    assert maps.shape == (1, 3, 4, 9)
    header, *steps = capsys.readouterr().out.splitlines()[-5:]
    assert header.split() == ["4", "16", "17", "16", "17", "272", "272", "4", "1088"]
    assert len(steps) == 4 and steps[-1].endswith("1088 letters.")
    assert steps[0].split()[3:9] == ["0.00"] * 6  # the question does not see the rationale
    assert torch.equal(maps[0, :, 0, 3:], torch.zeros(3, 6)) and maps[0, :, 3].min() > 0


def test_distill(tiny, tmp_path, capsys):
    logged = example("distill").main(tiny["student"], tiny["teacher"], str(tmp_path), RATE)
    for name, most in (("loss_pre", 0.5), ("loss_exp", 0.8), ("loss_att", 0.7)):
        first, last = first_and_last(logged, name)
        assert 0 < last < most * first, name
    first, last = first_and_last(logged, "map_overlap")
    assert first < last <= 1
    header, *rows = capsys.readouterr().out.rstrip().splitlines()[-6:]
    assert header.split() == ["3", "8", "5", "3", "8", "24", "5", "24", "5", "19"] and len(rows) == 5
    assert not any("router" in name for name, _ in AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())


def test_key_words(tiny, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    found = example("key_words").main(tiny["student"], tiny["teacher"], str(tmp_path), RATE)
    assert {key: value["words"] for key, value in found.items()} == {
        "keywords": ["car", "van", "car", "van", "van", "car"],
        r"regex:\b(?:behind|in front)\b": ["behind", "in front", "behind", "in front"],
        "given": ["Ann", "the blue van"],
        "key_words:colours": ["red", "blue", "red", "blue", "red"],
    }
    for value in found.values():  # the training had the same words
        assert float(value["words_mean"]) == len(value["words"]) and float(value["loss_att"]) > 0


def test_two_tokenizers(tiny, tmp_path):
    paths = [tiny[name] for name in ("student", "other_teacher", "train_file")]
    found = example("two_tokenizers").main(*paths, str(tmp_path), RATE)
    (tokens, shape), (other_tokens, other_shape) = found["shapes"].values()
    assert (shape, other_shape) == ((2, 5, 9), (3, 5, 9)) and other_tokens < 0.7 * tokens
    first, last = first_and_last(found["logged"], "loss_att")
    assert 0 < last < first


def test_lora(tiny, tmp_path):
    paths = [tiny[name] for name in ("student", "teacher", "train_file")]
    found = example("lora").main(*paths, str(tmp_path), RATE)
    # Two layers; rank 4; inputs of 32; outputs of 32, 16 and 16.
    assert found["trained"] == 2 * 4 * ((32 + 32) + (32 + 16) + (32 + 16))
    assert found["difference"] < 1e-4
    first, last = first_and_last(found["logged"], "loss_att")
    assert 0 < last < first
    before, after = load_file(f"{tiny['student']}/model.safetensors"), load_file(tmp_path / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{n}.self_attn.{part}_proj.weight" for n in range(2) for part in "qkv"}


def test_own_trainer(tiny, tmp_path):
    paths = [tiny[name] for name in ("student", "teacher", "train_file")]
    logged = example("own_trainer").main(*paths, str(tmp_path), RATE)
    assert len(logged) == 20
    first, last = first_and_last(logged, "loss_att")
    assert 0 < last < 0.7 * first
    first, last = first_and_last(logged, "map_overlap")
    assert first < last <= 1
    AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.slow
def test_two_processes_without_arguments():
    """As the page says, from a command line; both processes have the same weights, and share out the four files."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, EXAMPLES / "two_processes.py"], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"processes"')))
    one, two = found["processes"]
    assert one["weights"] == two["weights"] and one["examples"] == two["examples"] == 16
    assert one["shards_written"] + two["shards_written"] == 4
    first, last = first_and_last(found["logged"], "loss")
    assert last < first


@pytest.mark.parametrize("name", NAMES)
def test_options_are_the_parameters_of_main(name):
    """`arguments` returns the values in the order of its names, which has to be that of the parameters."""
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    options: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "arguments":
            options += [ast.literal_eval(one) for one in node.args[1:] if isinstance(one, ast.Constant)]
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "names":  # arguments(__doc__, *names)
            options += ast.literal_eval(node.value)
    parameters = [one.arg for one in main.args.args]
    assert options == (["model"] if name == "capture_maps" else parameters)


@pytest.mark.parametrize(("given", "rate"), [([], "3e-3"), (["--student", "some/name"], "1e-4")])
def test_what_is_not_given_is_tiny(monkeypatch, given, rate):
    monkeypatch.setattr(sys, "argv", ["an_example.py", *given])
    names = ("student", "teacher", "train_file", "output_dir", "learning_rate")
    found = dict(zip(names, example("tiny_models").arguments("", *names), strict=True))
    assert found["learning_rate"] == rate and len(Path(found["train_file"]).read_text().splitlines()) == 16
    assert found["student"] == (given[1] if given else str(Path(found["teacher"]).with_name("student")))
    assert (Path(found["teacher"]) / "model.safetensors").is_file() and not Path(found["output_dir"]).exists()


def test_the_page_names_every_example():
    """And every command of the page is that of a file which exists."""
    page = (ROOT / "docs/examples.md").read_text(encoding="utf-8")
    commands = set(re.findall(r"`python (examples/\S+\.py)`", page))
    assert commands == {f"examples/{name}.py" for name in NAMES}
    for path in re.findall(r"(?<!tests/)examples/\S+?\.(?:py|yaml|sh)", page):
        assert (ROOT / path).is_file(), path
    for path in (EXAMPLES / "training_loops").glob("*.py"):
        assert path.name in page
