"""The examples that add the attention loss to trainers of other libraries, each on tiny models in a process."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import molsaki
from tests.helpers import small_tokenizers, tiny
from tests.helpers.tiny import one_thread  # noqa: F401

EXAMPLES = Path(__file__).parents[2] / "examples/training_loops"
OPTIONS = {
    "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "report_to": "none",
    "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "dataloader_num_workers": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of one tokenizer with a chat template, and the problems in the format of each example."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = small_tokenizers.CHATML
    for name, layers in (("student", 2), ("teacher", 3)):
        tiny.save(folder / name, layers, tokenizer, seed=layers)
    rows = tiny.problems(8)
    turns = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["rationale"]}]
        for row in rows
    ]
    tiny.write_jsonl(folder / "rationales.jsonl", rows)
    pairs = [{"prompt": row["question"], "completion": " " + row["rationale"]} for row in rows]
    tiny.write_jsonl(folder / "pairs.jsonl", pairs)
    tiny.write_jsonl(folder / "messages.jsonl", [{"messages": messages} for messages in turns])
    return folder


def run(example: str, models: Path, data: str, output: Path, monkeypatch, **options):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "attention_mixin", raising=False)
    argv = [str(path) for path in (models / "student", models / "teacher", models / data, output)]
    return runpy.run_path(str(EXAMPLES / example))["main"](*argv, **OPTIONS | options)


def check(trainer, output: Path) -> None:
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 3
    assert all(row["loss_att"] > 0 and 0 < row["map_overlap"] < 1 for row in rows)
    router = [*trainer.attention_loss.parameters()]
    assert router and all(parameter.any() for parameter in router)  # trained: they begin at 0
    again = AutoModelForCausalLM.from_pretrained(output)  # an ordinary folder, without the router
    assert type(again).__name__ == "LlamaForCausalLM"
    assert not any("attention_loss" in name for name, _ in trainer.model.named_parameters())


def test_transformers_trainer(models, tmp_path, monkeypatch):
    check(run("transformers_trainer.py", models, "rationales.jsonl", tmp_path, monkeypatch), tmp_path)


def test_accumulation_is_one_large_batch(models, tmp_path, monkeypatch):
    """The attention loss counts once per step of the optimizer, not once per batch."""
    weights = []
    for name, batch in (("whole", 4), ("parts", 2)):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch, "max_steps": 1}
        options |= {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.1, "max_grad_norm": 1e9}
        trainer = run("transformers_trainer.py", models, "rationales.jsonl", tmp_path / name, monkeypatch, **options)
        weights.append(dict(trainer.model.named_parameters()) | dict(trainer.attention_loss.named_parameters()))
        assert weights[-1]["mixture.router.weight"].any()
    before = dict(AutoModelForCausalLM.from_pretrained(models / "student").named_parameters())
    for name, whole in weights[0].items():
        start = before.get(name, torch.zeros_like(whole))
        torch.testing.assert_close(weights[1][name] - start, whole - start, rtol=1e-2, atol=1e-6)


def test_evaluation_and_resume(models, tmp_path, monkeypatch):
    """Accumulation does not change an evaluation's loss; a checkpoint has the router; train() may be repeated."""
    losses = []
    for steps in (1, 4):
        folder = tmp_path / str(steps)
        options = {"gradient_accumulation_steps": steps, "max_steps": 1, "learning_rate": 0.0}
        trainer = run("transformers_trainer.py", models, "rationales.jsonl", folder, monkeypatch, **options)
        losses.append(trainer.evaluate(trainer.train_dataset)["eval_loss"])
        trainer.train()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "learning_rate": 0.1}
    whole = run("transformers_trainer.py", models, "rationales.jsonl", tmp_path / "whole", monkeypatch, **options)
    again = run("transformers_trainer.py", models, "rationales.jsonl", tmp_path / "again", monkeypatch, **options)
    for parameter in again.attention_loss.parameters():
        parameter.data.fill_(7)
    again.train(resume_from_checkpoint=str(tmp_path / "again/checkpoint-1"))
    for a, b in zip(again.attention_loss.parameters(), whole.attention_loss.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_packing_is_refused(models, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    with pytest.raises(ValueError, match="packing, padding_free: expected False, got batches that are not padded"):
        run("trl_sft.py", models, "pairs.jsonl", tmp_path, monkeypatch, packing=True)


@pytest.mark.slow
def test_trl_sft(models, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    check(run("trl_sft.py", models, "pairs.jsonl", tmp_path, monkeypatch), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("on_policy", [0.0, 1.0])
def test_trl_gkd(models, tmp_path, monkeypatch, on_policy):
    """With texts of the data, and with texts that the student wrote, whose prompts are padded on the left."""
    pytest.importorskip("trl")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    rows = json.loads(json.dumps([json.loads(line) for line in (models / "messages.jsonl").open()]))
    rows[0]["messages"][0]["content"] = "Ann has 3 nuts. How many?"  # shorter than the others
    tiny.write_jsonl(models / "uneven.jsonl", rows)
    options = {"lmbda": on_policy, "max_new_tokens": 24, "temperature": 0.5}
    before, after, original = [], [], molsaki.right_padded

    def right_padded(inputs):
        before.append(inputs["attention_mask"])
        after.append(original(inputs))
        return after[-1]

    monkeypatch.setattr(molsaki, "right_padded", right_padded)
    trainer = run("trl_gkd.py", models, "uneven.jsonl", tmp_path, monkeypatch, **options)
    assert any((mask[:, 0] == 0).any() for mask in before)  # padded on the left
    assert all((batch["attention_mask"].diff(dim=1) <= 0).all() for batch in after)
    if on_policy:  # what an untrained student writes has hardly any numbers, so the loss may be 0
        rows = [row for row in trainer.state.log_history if "loss" in row]
        assert len(rows) == 3 and all(math.isfinite(row["loss"] + row["loss_att"]) for row in rows)
    else:
        check(trainer, tmp_path)
