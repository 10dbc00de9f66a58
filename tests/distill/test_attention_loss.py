"""The attention loss in a user's loop, against that of `DistillTrainer` and in several processes."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

import molsaki
from molsaki.batches.tokenized import spans_of
from molsaki.config import ExtractConfig, TextOptions
from molsaki.method.losses import overlap
from molsaki.teacher.extract import extract
from tests.helpers import processes, tiny
from tests.helpers.tiny import one_thread, plan_of  # noqa: F401
from tests.helpers.training import OTHER, TOKENIZER, examples, trainer

KINDS = [
    {},
    {"mixture": "last"},
    {"mixture": "uniform", "normalise": "sum"},
    {"mixture": "matched", "map_heads": "each", "teacher_layers": [1, 5], "normalise": "sum", "causal_words": True},
    {"router": "shared", "value_heads": "mean", "teacher_temperature": 0.5},
]


def run(attention_loss, model, tokenizer, spans):
    texts = [text.text + tokenizer.eos_token for text in spans]
    with attention_loss.capture(model, molsaki.plan(spans, tokenizer)) as record:
        model(**tokenizer(texts, return_tensors="pt", padding=True))
    return record


@pytest.mark.parametrize("options", KINDS, ids=lambda options: "-".join(map(str, options.values())) or "paper")
def test_it_is_the_loss_of_the_trainer(tmp_path, options):
    """Losses, logs and every gradient; the maps of the teacher live or from a store, whose texts are checked."""
    t = trainer(tmp_path / "run", packing=False, **options)
    batch = t.data_collator([t.train_dataset[i] for i in range(4)])
    t.model.keeps_graph = True
    expected = t._forward(t.model, batch)
    expected["loss_att"].mean().backward()

    student, teacher = tiny.model(2), tiny.model(3, len(OTHER), seed=1)
    spans = [spans_of(example, TextOptions()) for example in examples(4)]
    attention_loss = molsaki.StepwiseAttentionLoss.for_models(student, teacher, **options)
    with torch.no_grad():
        wanted = run(attention_loss, teacher, OTHER, spans)
    loss, logs = attention_loss(run(attention_loss, student, TOKENIZER, spans), wanted)
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss_att"].mean().item(), rel=1e-5)
    for name, value in logs.items():
        torch.testing.assert_close(value, expected[name].mean(0), rtol=1e-4, atol=1e-6)
    for ours, theirs in ((student, t.model.student), (attention_loss.mixture, t.model.mixture)):
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)
    if "student_layers" in options or options.get("mixture") == "uniform":
        return  # its store depends on the student's folder
    data = str(tiny.write_jsonl(tmp_path / "train.jsonl", tiny.problems(4)))
    stored = {name: value for name, value in options.items() if name in ("mixture", "map_heads", "teacher_layers")}
    extract(ExtractConfig(data_files=[data], store=str(tmp_path / "store"), **stored), teacher, OTHER)
    store = molsaki.Store(tmp_path / "store")
    again = molsaki.StepwiseAttentionLoss.for_models(student, store, **options)
    ids = [example.id for example in examples(4)]
    stored_loss, stored_logs = again(run(again, student, TOKENIZER, spans), store.batch(ids, spans))
    assert stored_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert stored_logs.keys() == logs.keys()
    with pytest.raises(ValueError, match="example 'p0' has another text"):
        store.batch(ids, spans[::-1])
    for wrong in ((ids, spans[:1]), ([], [])):
        with pytest.raises(ValueError, match="ids, spans: expected the same number of both, at least one"):
            store.batch(*wrong)
    with pytest.raises(TypeError, match="ids: expected names, got 3"):
        store.batch([3], spans[:1])
    with pytest.raises(ValueError, match="this store was written with another"):
        molsaki.StepwiseAttentionLoss.for_models(student, store, mixture="reverse")


def test_maps_of_every_layer_and_steps_that_count(tmp_path):
    student, teacher = tiny.model(2), tiny.model(3, len(OTHER), seed=1)
    spans = [spans_of(example, TextOptions()) for example in examples(3)]
    data = str(tiny.write_jsonl(tmp_path / "train.jsonl", tiny.problems(3)))
    extract(ExtractConfig(data_files=[data], store=str(tmp_path / "store"), all_layers=True), teacher, OTHER)
    store = molsaki.Store(tmp_path / "store")
    attention_loss = molsaki.StepwiseAttentionLoss.for_models(student, store, normalise="sum")
    with torch.no_grad():
        wanted = run(attention_loss, teacher, OTHER, spans)
        found = run(attention_loss, student, TOKENIZER, spans)
    ids = [example.id for example in examples(3)]
    whole = attention_loss(found, wanted)[0].item()
    assert attention_loss(found, store.batch(ids, spans))[0].item() == pytest.approx(whole, rel=2e-3)  # float16
    steps = torch.tensor([[start >= text.rationale_start for start, _ in text.steps] for text in spans])
    parts = [attention_loss(found, wanted, steps=mask)[0].item() for mask in (steps, ~steps)]
    first, second = steps.sum(1)[0].item(), (~steps).sum(1)[0].item()
    assert steps.sum(1).unique().numel() == 1
    assert (first * parts[0] + second * parts[1]) / (first + second) == pytest.approx(whole, rel=1e-5)
    record = run(attention_loss, teacher, OTHER, spans[:2])
    with pytest.raises(
        ValueError, match="teacher: expected a record of the student's texts in the same order, got different"
    ):
        attention_loss(found, record)
    with pytest.raises(ValueError, match=r"steps: expected bool, \(N, S\) = \(3, 5\), got torch.int64, \(3, 5\)"):
        attention_loss(found, wanted, steps=steps.long())


def test_a_teacher_in_another_order_is_refused():
    """Of texts with other numbers of steps or words, although the largest numbers are the same."""
    student, teacher = tiny.model(2), tiny.model(3, len(OTHER), seed=1)
    attention_loss = molsaki.StepwiseAttentionLoss.for_models(student, teacher)
    spans = [molsaki.segment("Ann has 3. And 4.", "So 7."), molsaki.segment("Ann has 3.", "So 7.")]
    found = run(attention_loss, student, TOKENIZER, spans)
    with pytest.raises(
        ValueError, match=r"same order, got different numbers of steps: \[2, 3\], the student's \[3, 2\]"
    ):
        attention_loss(found, run(attention_loss, teacher, OTHER, spans[::-1]))


def test_a_copy_averages_over_processes_too():
    student, teacher = tiny.model(2), tiny.model(3, len(OTHER), seed=1)
    attention_loss = copy.deepcopy(molsaki.StepwiseAttentionLoss.for_models(student, teacher))
    spans = [molsaki.segment("Ann has 3. And 4.", "So 7.")]
    attention_loss(run(attention_loss, student, TOKENIZER, spans), run(attention_loss, teacher, OTHER, spans))
    again = copy.deepcopy(attention_loss)
    again(run(again, student, TOKENIZER, spans), run(again, teacher, OTHER, spans))
    for module in (attention_loss, again):
        assert [len(p._post_accumulate_grad_hooks) for p in module.parameters()] == [1, 1]


def test_overlap_by_hand():
    plan = plan_of((2, 2))
    student = torch.tensor([[[[0.2, 0.2], [0.0, 0.3]]]])
    teacher = torch.tensor([[[[0.3, 0.1], [0.1, 0.1]]]])
    assert overlap(student, teacher, plan).tolist() == pytest.approx([(0.5 + 0.25 + 0.5) / 2])
    assert overlap(teacher, teacher, plan).item() == pytest.approx(1)
    assert overlap(student, torch.zeros_like(teacher), plan).isnan().all()
    only = torch.tensor([[[False], [True]]])
    assert overlap(student, teacher, plan, entries=only).tolist() == pytest.approx([0.5])


def test_the_trainer_logs_the_overlap(tmp_path):
    """The mean over the examples that have a step to compare."""
    wordless = dataclasses.replace(examples(1)[0], id="w", question="Who has nuts?", rationale="Ann has nuts.")
    t = trainer(tmp_path, data=[*examples(3), wordless], max_steps=1, per_device_train_batch_size=4, save_strategy="no")
    values = t._forward(t.model, t.data_collator([t.train_dataset[i] for i in range(4)]))["map_overlap"]
    assert values.isnan().tolist() == [False, False, False, True]
    t.train()
    (row,) = [entry for entry in t.state.log_history if "loss" in entry]
    assert row["map_overlap"] == pytest.approx(values[:3].mean().item(), rel=1e-5)


def test_bad_options():
    student, teacher = tiny.model(2), tiny.model(3)
    with pytest.raises(TypeError, match="mixtures: expected one of normalise, causal_words, teacher_temperature, mixt"):
        molsaki.StepwiseAttentionLoss.for_models(student, teacher, mixtures="last")
    with pytest.raises(ValueError, match="map_heads: expected one of mean, each"):
        molsaki.StepwiseAttentionLoss.for_models(student, teacher, map_heads="all")
    with pytest.raises(ValueError, match="mixture: expected one of mixture"):
        molsaki.StepwiseAttentionLoss.for_models(student, teacher, mixture="first")
    with pytest.raises(ValueError, match="normalise: expected one of softmax, sum"):
        molsaki.StepwiseAttentionLoss.for_models(student, teacher, normalise="max")
    with pytest.raises(ValueError, match="teacher_temperature: expected a positive number"):
        molsaki.StepwiseAttentionLoss.for_models(student, teacher, teacher_temperature=0.0)


@pytest.mark.slow
def test_the_gradients_of_the_router_are_averaged_over_processes(tmp_path):
    done = processes.ranks("router_gradients", tmp_path / "found")
    assert done.returncode == 0, done.stderr
    alone = [processes.gradients_of_a_router(number) for number in range(2)]
    assert any((alone[0][name] != alone[1][name]).any() for name in alone[0])
    for rank in range(2):
        found = torch.load(f"{tmp_path / 'found'}.{rank}")
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, (alone[0][name] + alone[1][name]) / 2)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.save(folder / "teacher", 3, tiny.tokenizer(60), seed=1)
    tiny.save(folder / "student", 2)
    tiny.write_jsonl(folder / "train.jsonl", tiny.problems(8))
    return folder


def test_a_loop_of_ones_own(models, tmp_path):
    """Two tokenizers; what is logged is finite, and the student is written."""
    argv = [models / "student", models / "teacher", models / "train.jsonl", tmp_path / "out"]
    done = processes.ranks("example", "training_loops/plain_loop.py", tmp_path / "report", *argv, processes=1)
    assert done.returncode == 0, done.stderr
    logged = json.loads(Path(f"{tmp_path / 'report'}.0").read_text())
    assert len(logged) == 2 and all(math.isfinite(x) for row in logged for x in row.values())
    assert {"loss", "loss_att", "map_overlap", "entropy_student", "entropy_teacher"} == set(logged[0])
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.slow
def test_accelerate_with_ddp_and_fsdp2(models, tmp_path):
    """Two processes train alike when the student is sharded and when it is not."""
    logged = {}
    for kind in ("ddp", "fsdp2"):
        argv = [models / "student", models / "teacher", models / "train.jsonl", tmp_path / kind]
        words = ["example", "training_loops/accelerate_fsdp2.py", tmp_path / f"{kind}_report", *argv]
        if kind == "ddp":
            done = processes.ranks(*words, ACCELERATE_USE_CPU="true")
        else:
            launch = ["accelerate.commands.launch", "--config_file", processes.FSDP, "--main_process_port", 0]
            done = processes.python("-m", *launch, processes.__file__, *words, ACCELERATE_USE_CPU="true")
        assert done.returncode == 0, done.stderr
        ranks = [json.loads(Path(f"{tmp_path / f'{kind}_report'}.{rank}").read_text()) for rank in range(2)]
        assert ranks[0] == ranks[1] and len(ranks[0]) == 2
        logged[kind] = ranks[0]
        assert (tmp_path / kind / "model.safetensors").is_file()
    for a, b in zip(logged["ddp"], logged["fsdp2"], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
