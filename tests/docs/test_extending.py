"""docs/extending.md: its files and commands run as printed, and results, gradients and training are right."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import molsaki_kernels as mk
from molsaki.cli import main
from molsaki.training.trainer import DistillTrainer
from molsaki_kernels import engine_selection, reference
from tests.helpers import tiny
from tests.helpers.tiny import one_thread  # noqa: F401
from tests.helpers.training import config, examples

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)  # language and text
FILES = {text.split()[1]: text for language, text in BLOCKS if language == "python"}  # a block begins with "# NAME.py"
COMMANDS = [
    shlex.split(command.replace("\\\n", " "))
    for language, text in BLOCKS
    if not language
    for command in re.split(r"\n(?=molsaki)", text.strip())
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder that the page describes, as the current directory; nothing of it stays imported or registered."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    tiny.save(tmp_path / "student", 2)
    tiny.save(tmp_path / "teacher", 4, seed=1)
    tiny.write_jsonl(tmp_path / "train.jsonl", tiny.problems(8))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    engines, first = dict(engine_selection.ENGINES), dict(engine_selection.FIRST)
    yield tmp_path
    for table, kept in ((engine_selection.ENGINES, engines), (engine_selection.FIRST, first)):
        table.clear()
        table.update(kept)
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)
    from molsaki.text import key_words, sentences

    key_words._own_selector.cache_clear()
    sentences._own_splitter.cache_clear()


def test_the_page_has_four_recipes():
    modules = {name for name in FILES if name.startswith("my_")}
    assert modules == {"my_engine.py", "my_objective.py", "my_mixture.py", "my_words.py"}
    assert {f"test_{name}" for name in modules} <= FILES.keys()
    assert all(re.fullmatch(r"\w+\.py", name) for name in FILES)
    assert [command[:2] for command in COMMANDS] == [
        ["molsaki", verb] for verb in ("distill", "distill", "extract", "distill", "extract", "distill")
    ]


@pytest.mark.slow
def test_the_tests_of_the_page(folder):
    """In a process of their own, as a user runs them."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)]
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout + found.stderr
    assert re.search(r"\b26 passed", found.stdout), found.stdout


def test_the_test_of_the_engine_can_fail(folder):
    """Without the fold, the map as the only source of gradient gives no gradient."""
    text = FILES["my_engine.py"].replace("out, dout = fold_dlse_into_out(out, dout, gradients.dlse)", "pass")
    assert text != FILES["my_engine.py"]
    (folder / "my_engine.py").write_text(text)
    page = importlib.import_module("test_my_engine")
    exact = page.results(reference.stepwise_attention, torch.float64, 0.0, {})
    found = page.results(mk.stepwise_attention, torch.float32, 0.0, {"engine": "aten_cpu"})
    assert page.error(found["maps"], exact["maps"]) < 1e-5 < 0.5 < page.error(found["dk"], exact["dk"])


def test_training_with_the_engine(folder):
    """ "auto" takes it in every layer of both models, and the losses are those of the package's own engine."""
    calls = {"forward": 0, "backward": 0}
    engine = importlib.import_module("my_engine")

    def counted(name: str):
        function = getattr(engine, name)

        def call(*args):
            calls[name] += 1
            return function(*args)

        return call

    for name in calls:
        setattr(engine, name, counted(name))
    found = runpy.run_path("train_with_my_engine.py")["trainer"].state.log_history
    steps = 3
    assert calls["backward"] == steps * 2 * 2  # layers of the student, texts of both tasks
    assert calls["forward"] >= steps * (2 * 2 + 4)
    engine_selection.FIRST.clear()
    source = FILES["train_with_my_engine.py"].replace(', first_on=("cpu",)', "").replace("run-engine", "run-without")
    (folder / "without.py").write_text(source)
    expected = runpy.run_path("without.py")["trainer"].state.log_history
    assert calls["backward"] == steps * 2 * 2
    assert found[-1]["train_loss"] == pytest.approx(expected[-1]["train_loss"], rel=1e-4)


def test_the_commands(folder, capsys):
    """In the order of the page: each trains, and the weights change."""
    before = load_file("student/model.safetensors")
    for command in COMMANDS:
        if command[1] == "extract":
            assert main(command[1:]) == 0, capsys.readouterr()
            continue
        assert main([*command[1:], "--use_cpu", "true", "--disable_tqdm", "true"]) == 0, capsys.readouterr()
        output = Path(command[command.index("--output_dir") + 1])
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        steps = [entry for entry in history if "loss" in entry]
        assert len(steps) == 4 and all(math.isfinite(entry["loss"]) for entry in steps)
        own = "loss_distance" if output.name == "run-objective" else "loss_att"
        assert all(entry[own] > 0 for entry in steps), output
        after = load_file(output / "model.safetensors")
        assert any(not after[name].equal(tensor) for name, tensor in before.items())
        if output.name == "run-words":
            assert {entry["words_mean"] for entry in steps} == {5}  # Ann, She, How; There, After


@pytest.mark.parametrize(
    ("options", "term"),
    [({"objective": "my_objective:distance"}, "loss_distance"), ({"mixture": "my_mixture:every_second"}, "loss_att")],
)
def test_gradients_of_training(folder, options, term):
    """The gradient in the student's weights is the slope of the loss, in float64, and the term has a part in it."""
    student, teacher = tiny.model(2).double(), tiny.model(4, seed=1).double()
    tokenizer = tiny.tokenizer()
    trainer = DistillTrainer(
        student,
        teacher,
        config(folder / "run", save_strategy="no", **options),
        train_dataset=examples(2),
        processing_class=tokenizer,
        teacher_processing_class=tokenizer,
    )
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(2)])
    trainer.model.beta = beta = 1000.0  # so that most of the gradient is the term's
    parameters = [p for p in trainer.model.student.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(trainer._forward(trainer.model, batch)["loss"].sum(), parameters)
    length = torch.stack([g.norm() for g in gradients]).norm()

    def values(step: float) -> dict[str, float]:
        """The sums of loss and term after a step of this length along the gradient."""
        originals = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p += step * g / length
            out = trainer._forward(trainer.model, batch)
            for p, original in zip(parameters, originals, strict=True):
                p.copy_(original)
        return {name: out[name].sum().item() for name in ("loss", term)}

    step = 1e-3  # norms are computed in float32, as the model does them
    above, below = values(step), values(-step)
    slopes = {name: (above[name] - below[name]) / (2 * step) for name in above}
    assert length.item() == pytest.approx(slopes["loss"], rel=5e-3)
    assert beta * slopes[term] > 0.5 * slopes["loss"]
