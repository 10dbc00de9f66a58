"""Each objective trains, and packing changes neither its losses nor its gradients."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from molsaki.config import ExtractConfig
from molsaki.method.objectives import OBJECTIVES, Objective, vanilla
from molsaki.teacher.extract import extract
from molsaki.training.trainer import DistillTrainer
from tests.helpers import tiny
from tests.helpers.budget import assert_within_budget
from tests.helpers.tiny import one_thread  # noqa: F401
from tests.helpers.training import OTHER, TOKENIZER, config, examples, logged, trainer

ROOT = Path(__file__).parents[2]
PLAIN = {"save_strategy": "no"}


MINE = """
import torch
from molsaki.method.objectives import Objective, molsaki

def loss(student, batch, options):
    return {"loss": student.explain.cross_entropy}

rationale = Objective(loss)

def squares(student, batch, options):
    term = (student.maps.mixed - batch.teacher_map).square().sum((1, 2, 3))
    return molsaki(student, batch, options) | {"loss": student.explain.cross_entropy + term, "loss_squares": term}

square = Objective(squares, maps=True)
attended = Objective(molsaki, maps=True, attention_loss=True)

def crossed(teacher, student):
    return [(teacher - 1 - layer, layer) for layer in range(student)]

def too_far(teacher, student):
    return [(teacher, 0)]

nothing = 3

def numpy_pairs(teacher, student):
    import numpy as np
    return np.array([[0, 0], [1, 1]])

def flat(teacher, student):
    return [0, 1]

mean = Objective(lambda student, batch, options: {"loss": student.explain.cross_entropy.mean()})
scalar = Objective(lambda student, batch, options: loss(student, batch, options) | {"three": torch.tensor(3.0)})
without = Objective(lambda student, batch, options: {"cross": student.explain.cross_entropy})
counted = Objective(lambda *args: loss(*args) | {"discount": torch.ones(len(args[1]))})
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's own in the current directory."""
    (tmp_path / "my_methods.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
    monkeypatch.delitem(sys.modules, "my_methods", raising=False)


def test_an_objective_of_ones_own(tmp_path, mine):
    """It is named, not entered in a table; one with maps gets those of the teacher, and its terms are logged."""
    options = config(tmp_path / "a", objective="my_methods:rationale", max_steps=2, save_strategy="no")
    t = DistillTrainer(tiny.model(2), args=options, processing_class=TOKENIZER, train_dataset=examples())
    t.train()
    (first, words), (second, _) = logged(t, "loss", "words_mean")
    assert 0 < second < first and words == 9
    options = {"objective": "my_methods:square", "mixture": "my_methods:crossed", "max_steps": 2, "save_strategy": "no"}
    t = trainer(tmp_path / "b", **options)
    t.train()
    for loss, square, pre, att in logged(t, "loss", "loss_squares", "loss_pre", "loss_att"):
        assert loss > square > 0 and pre > 0 and att > 0
    assert t.model.mixture._teacher_pairs.argmax(1).tolist() == [2, 1]
    reverse = trainer(tmp_path / "c", mixture="single", teacher_layer=2, student_layer=0, **PLAIN)
    pairs = trainer(tmp_path / "d", mixture="my_methods:crossed", **PLAIN)
    batch = pairs.data_collator([pairs.train_dataset[0]])
    second = trainer(tmp_path / "e", mixture="single", teacher_layer=1, student_layer=1, **PLAIN)
    parts = [x._forward(x.model, batch)["loss_att"].item() for x in (reverse, second)]
    assert pairs._forward(pairs.model, batch)["loss_att"].item() == pytest.approx(sum(parts) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"objective": "my_methods:missing"}, ValueError, "objective: expected module:name that can be imported, got "),
        (
            {"objective": "no_such_module:x"},
            ValueError,
            "objective: expected module:name that can be imported, got 'no",
        ),
        ({"objective": "my_methods:nothing"}, TypeError, "objective: expected my_methods:nothing to be an Objective"),
        (
            {"objective": "rationale"},
            ValueError,
            f"objective: expected one of {', '.join(OBJECTIVES)}, or",
        ),
        (
            {"mixture": "my_methods:nothing"},
            TypeError,
            "mixture: expected my_methods:nothing to be a function, got int",
        ),
        ({"mixture": "my_methods:too_far"}, ValueError, r"mixture: expected one of 3 layers \(-3 to 2\), got 3"),
        (
            {"mixture": "crossed"},
            ValueError,
            "mixture: expected one of mixture, matched, .*, or module:name, got 'cros",
        ),
    ],
)
def test_what_is_not_one(tmp_path, mine, options, error, message):
    with pytest.raises(error, match=message):
        trainer(tmp_path / "run", **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mean", r"objective: loss: expected one number per example, \(2,\), got \(\)"),
        ("scalar", r"objective: three: expected one number per example, \(2,\), got \(\)"),
        ("without", "objective: expected a dict with 'loss' from its loss function, got one with cross"),
    ],
)
def test_a_loss_of_another_shape_is_refused(tmp_path, mine, name, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "run", objective=f"my_methods:{name}", max_steps=1, **PLAIN).train()


def test_every_term_is_logged(tmp_path, mine):
    t = trainer(tmp_path / "run", objective="my_methods:counted", mixture="mixture", max_steps=1, **PLAIN)
    t.train()
    assert logged(t, "discount") == [(1,)]
    pairs = trainer(tmp_path / "b", mixture="my_methods:numpy_pairs", **PLAIN)
    assert pairs.model.mixture._teacher_pairs.argmax(1).tolist() == [0, 1]
    with pytest.raises(ValueError, match="explain_texts: expected True with maps"):
        Objective(lambda *args: {}, maps=True, explain_texts=False)


def test_a_pairing_of_ones_own_needs_a_store_of_every_layer(tmp_path, mine):
    data, store = [str(tiny.write_jsonl(tmp_path / "train.jsonl", tiny.problems(8)))], str(tmp_path / "store")
    options = ExtractConfig(data_files=data, store=store, mixture="my_methods:crossed")
    teacher = tiny.model(3, len(OTHER), seed=1)
    with pytest.raises(ValueError, match="mixture: my_methods:crossed needs a store of every layer"):
        extract(options, teacher, OTHER)
    extract(dataclasses.replace(options, all_layers=True), teacher, OTHER)
    live = trainer(tmp_path / "live", mixture="my_methods:crossed", max_steps=1, **PLAIN)
    args = config(tmp_path / "stored", mixture="my_methods:crossed", store=store, max_steps=1, **PLAIN)
    stored = DistillTrainer(tiny.model(2), args=args, processing_class=TOKENIZER, train_dataset=examples())
    for t in (live, stored):
        t.train()
    assert logged(stored, "loss_att")[0] == pytest.approx(logged(live, "loss_att")[0], rel=2e-3)  # float16


NEW_ENTRY = """
import sys
from molsaki.cli import main
from molsaki.method import objectives

def halved(student, batch, options):
    return {"loss": student.predict.cross_entropy / 2}

objectives.OBJECTIVES["half"] = objectives.Objective(halved, explain_texts=False, help="half of the answers")
sys.exit(main(sys.argv[1:]))
"""


def test_a_new_objective_is_one_entry(tmp_path):
    """It is in the help text and a value of the option, and it trains."""
    tiny.model(2).save_pretrained(tmp_path / "student")
    TOKENIZER.save_pretrained(tmp_path / "student")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(dataclasses.asdict(one)) + "\n" for one in examples()))
    run = [sys.executable, "-c", NEW_ENTRY, "distill"]
    shown = subprocess.run([*run, "--help"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "half = half of the answers" in " ".join(shown.split())
    options = ["--objective", "half", "--max_steps", "1", "--use_cpu", "true", "--logging_steps", "1"]
    paths = [
        "--student",
        tmp_path / "student",
        "--train_file",
        tmp_path / "train.jsonl",
        "--output_dir",
        tmp_path / "o",
    ]
    subprocess.run([*run, *options, *map(str, paths)], check=True, cwd=ROOT, capture_output=True)
    history = json.loads((tmp_path / "o/trainer_state.json").read_text())["log_history"]
    assert history[0]["loss"] > 0 and "loss_pre" not in history[0]


def test_an_objective_of_ones_own_with_the_attention_loss(tmp_path, mine):
    """Beta is held as a share of the gradient; without the mark that is refused."""
    options = {"attention_share": 0.2, "share_steps": 1, "max_steps": 2, "mixture": "last", **PLAIN}
    t = trainer(tmp_path / "run", objective="my_methods:attended", **options)
    t.train()
    assert logged(t, "attention_share")[0][0] > 0 and logged(t, "beta")[0] != (1.0,)
    with pytest.raises(ValueError, match="share_steps, attention_share: expected an objective with attention_loss"):
        trainer(tmp_path / "b", objective="my_methods:counted", **options)
    with pytest.raises(ValueError, match="maps: expected True with attention_loss, got False"):
        Objective(vanilla, attention_loss=True)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_train(tmp_path, objective):
    t = DistillTrainer(
        args=config(tmp_path, objective=objective, max_steps=4, save_strategy="no", per_device_train_batch_size=8),
        model=tiny.model(2),
        processing_class=TOKENIZER,
        teacher_model=tiny.model(3, len(TOKENIZER), seed=1),
        teacher_processing_class=TOKENIZER,
        train_dataset=examples(),
    )
    t.train()
    rows = logged(t, "loss", "loss_pre")
    assert rows[-1][1] < rows[0][1]
    assert (t.model.mixture is None) == (objective != "molsaki")
    assert (t.teacher is None) == (objective in ("vanilla", "cot", "dss", "mmi"))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_packing_changes_nothing(tmp_path, objective):
    """Losses and gradients of packed batches, with the question once or twice, also by the model's own head, within the
    budget of padded ones. With fewer examples than eight the budget of a loss is a matter of chance."""
    found = {}
    for packing, sharing, own, dtype in (
        (False, False, False, torch.float64), (False, False, True, torch.float32), (True, False, False, torch.float32),
        (True, False, True, torch.float32), (True, True, False, torch.float32), (True, True, True, torch.float32),
    ):  # fmt: skip
        sharing &= OBJECTIVES[objective].explain_texts
        t = DistillTrainer(
            args=config(tmp_path, objective=objective, packing=packing, share_question=sharing),
            model=tiny.model(2),
            processing_class=TOKENIZER,
            teacher_model=tiny.model(3, len(TOKENIZER), seed=1),
            teacher_processing_class=TOKENIZER,
            train_dataset=examples(8),
        )
        t.model.to(dtype)
        t.model.head = None if own else t.model.head
        if t.model.mixture is not None:  # at zero the router passes no gradient on
            for p in t.model.mixture.parameters():
                p.data.copy_(torch.linspace(-0.02, 0.02, p.numel()).view_as(p))
        if t.teacher is not None:
            t.teacher.to(dtype)
        batch = t.data_collator([t.train_dataset[i] for i in range(8)])
        assert len(batch.student) == (2 if OBJECTIVES[objective].explain_texts and not packing else 1)
        assert (batch.student[0].cu_seq_lens_q is not None) == packing
        assert (batch.student[0].shared_prefix is not None) == sharing
        out = t._forward(t.model, batch)
        out["loss"].sum().backward()
        grads = {n: p.grad for n, p in t.model.named_parameters()}
        found[packing, sharing, own] = {n: x.detach() for n, x in out.items() if x.is_floating_point()} | grads
    oracle, padded = found.pop((False, False, False)), found.pop((False, False, True))
    for values in found.values():
        for name, value in values.items():
            assert_within_budget(name, value, oracle[name], padded[name])


def test_cot_trains_one_text_of_rationale_and_answer(tmp_path):
    options = config(tmp_path, objective="cot", cot_template="{rationale} So {answer}!")
    t = DistillTrainer(args=options, model=tiny.model(2), processing_class=TOKENIZER, train_dataset=examples(2))
    (item, _), example = t.train_dataset[0], examples(1)[0]
    ids = item.predict.input_ids
    assert TOKENIZER.decode(ids[item.predict.target_start :]).strip() == (
        f"{example.rationale} So {example.answer}!{TOKENIZER.eos_token}"
    )
    assert TOKENIZER.decode(ids[: item.predict.target_start]).strip() == example.question
    with pytest.raises(ValueError, match="cot_template: expected a text with {rationale} and then {answer}"):
        config(tmp_path, cot_template="{answer} because {rationale}")
