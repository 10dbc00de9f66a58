from __future__ import annotations

import json
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from molsaki.batches.data import Example
from molsaki.config import DistillConfig, ExtractConfig
from molsaki.teacher.extract import extract
from molsaki.training.trainer import ROUTER, DistillTrainer, checkpoints, last_checkpoint
from tests.helpers import tiny
from tests.helpers.budget import assert_within_budget
from tests.helpers.tiny import one_thread  # noqa: F401

TOKENIZER, OTHER = tiny.tokenizer(), tiny.tokenizer(60)


def examples(count: int = 8) -> list[Example]:
    return [Example(r["id"], r["question"], r["rationale"], r["answer"]) for r in tiny.problems(count)]


def config(folder: Path, **options) -> DistillConfig:
    options = dict(
        max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, save_steps=3, use_cpu=True,
        disable_tqdm=True, seed=3, dataloader_num_workers=0,
    ) | options  # fmt: skip
    return DistillConfig(output_dir=str(folder), **options)


def trainer(folder: Path, data=None, student=None, **options) -> DistillTrainer:
    return DistillTrainer(
        config(folder, **options), student or tiny.model(2), TOKENIZER, tiny.model(3, len(OTHER), seed=1), OTHER,
        train_dataset=data or examples(),
    )  # fmt: skip


def logged(t: DistillTrainer, *names: str) -> list[tuple]:
    return [tuple(entry[name] for name in names) for entry in t.state.log_history if "loss" in entry]


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


LOSSES = ("step", "loss", "loss_pre", "loss_exp", "loss_att", "entropy_student", "grad_norm", "learning_rate")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Six steps without interruption."""
    t = trainer(tmp_path_factory.mktemp("straight"))
    t.train()
    t.save_model()
    return t


def same_files(a: Path, b: Path) -> bool:
    x, y = load_file(a), load_file(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize("fault", [None, "interrupted", "flipped byte", "truncated"])
def test_resume_is_bitwise(straight, tmp_path, fault):
    first = trainer(tmp_path, save_steps=1 if fault else 3, max_steps=6)
    first.add_callback(StopAt(3))
    first.train()
    file = tmp_path / "checkpoint-3/model.safetensors"
    if fault == "interrupted":
        (tmp_path / "checkpoint-3/sealed.json").unlink()
    elif fault == "flipped byte":
        file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    assert last_checkpoint(tmp_path) == str(tmp_path / ("checkpoint-2" if fault else "checkpoint-3"))
    resumed = trainer(tmp_path, resume=True)
    resumed.train()
    assert len(logged(straight, *LOSSES)) == 6
    assert logged(resumed, *LOSSES) == logged(straight, *LOSSES)
    whole = Path(straight.args.output_dir)
    assert same_files(whole / "checkpoint-6/model.safetensors", tmp_path / "checkpoint-6/model.safetensors")
    assert same_files(whole / "checkpoint-6" / ROUTER, tmp_path / "checkpoint-6" / ROUTER)
    a, b = (torch.load(folder / "checkpoint-6/optimizer.pt")["state"] for folder in (whole, tmp_path))
    assert all(torch.equal(value, b[k][name]) for k, state in a.items() for name, value in state.items())
    assert (whole / "layer_weights.jsonl").read_text() == (tmp_path / "layer_weights.jsonl").read_text()


def test_what_is_logged(straight):
    names = [
        "loss", "loss_pre", "loss_exp", "loss_att", "loss_att_uniform", "entropy_teacher", "entropy_student",
        "steps_mean", "words_mean", "without_words",
    ]  # fmt: skip
    rows = logged(straight, *names)
    for row in rows:
        entry = dict(zip(names, row, strict=True))
        assert entry["loss"] == pytest.approx(
            0.5 * entry["loss_pre"] + 0.5 * entry["loss_exp"] + entry["loss_att"], abs=1e-4
        )
        assert (entry["steps_mean"], entry["words_mean"], entry["without_words"]) == (5, 9, 0)
    first = dict(zip(names, rows[0], strict=True))
    assert first["entropy_student"] == pytest.approx(torch.tensor(2.0).log().item())  # the router starts at zero
    assert first["loss_att"] == pytest.approx(first["loss_att_uniform"])
    assert dict(zip(names, rows[-1], strict=True))["entropy_student"] < first["entropy_student"] - 1e-3
    weights = [json.loads(x) for x in Path(straight.args.output_dir, "layer_weights.jsonl").read_text().splitlines()]
    assert [row["step"] for row in weights] == [1, 2, 3, 4, 5, 6]
    for row in weights:
        assert (len(row["teacher"]), len(row["student"])) == (3, 2)
        assert sum(row["teacher"]) == pytest.approx(1)
        assert sum(row["student"]) == pytest.approx(1)


def test_exported_student_is_a_plain_model(straight):
    folder = Path(straight.args.output_dir)
    names = {path.name for path in folder.iterdir() if path.is_file()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "distill.json"} <= names
    assert not names & {ROUTER, "sealed.json"}
    assert not [path for path in folder.iterdir() if path.name.startswith(".part")]
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([TOKENIZER("Ann has 3 nuts.").input_ids])
    straight.model.eval()
    torch.testing.assert_close(model(ids).logits, straight.model.student(ids).logits)
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|end|>"
    assert {name.partition(".")[0] for name in load_file(folder / "checkpoint-6" / ROUTER)} != {"student"}
    AutoModelForCausalLM.from_pretrained(folder / "checkpoint-6")


def gradients(t: DistillTrainer) -> dict[str, torch.Tensor]:
    """The gradient that the first optimizer step sees."""
    seen = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.update({n: p.grad.clone() for n, p in t.model.named_parameters() if p.grad is not None})

    t.add_callback(Look())
    t.train()
    return seen


def test_accumulation_gives_the_gradient_of_the_big_batch(tmp_path):
    options = dict(max_steps=1, max_grad_norm=1e9, save_strategy="no")
    big = gradients(trainer(tmp_path / "a", per_device_train_batch_size=8, **options))
    for size, steps in ((2, 4), (3, 3)):  # 3 + 3 + 2: the short batch's examples count once, too
        small = gradients(
            trainer(
                tmp_path / f"b{size}", per_device_train_batch_size=size, gradient_accumulation_steps=steps, **options
            )
        )
        assert small.keys() == big.keys()
        for name, value in big.items():
            torch.testing.assert_close(small[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", ["vanilla", "dss", "mmi", "logits", "molsaki"])
def test_packing_changes_nothing(tmp_path, objective):
    """Losses and gradients of packed batches, with the question once or twice, also by the model's own head, within the
    budget of padded ones."""
    found = {}
    for packing, sharing, own, dtype in (
        (False, False, False, torch.float64), (False, False, True, torch.float32), (True, False, False, torch.float32),
        (True, False, True, torch.float32), (True, True, False, torch.float32), (True, True, True, torch.float32),
    ):  # fmt: skip
        sharing &= objective != "vanilla"
        t = DistillTrainer(
            config(tmp_path, objective=objective, packing=packing, share_question=sharing), tiny.model(2), TOKENIZER,
            tiny.model(3, len(TOKENIZER), seed=1), TOKENIZER, train_dataset=examples(4),
        )  # fmt: skip
        t.model.to(dtype)
        t.model.head = None if own else t.model.head
        if t.model.mixture is not None:  # at zero the router hands no gradient on
            for p in t.model.mixture.parameters():
                p.data.copy_(torch.linspace(-0.02, 0.02, p.numel()).view_as(p))
        if t.teacher is not None:
            t.teacher.to(dtype)
        batch = t.data_collator([t.train_dataset[i] for i in range(4)])
        assert len(batch["tasks"]) == (1 if packing or objective == "vanilla" else 2)
        assert ("cu_seq_lens_q" in batch["tasks"][0]) == packing
        assert ("branches" in batch["tasks"][0]) == sharing
        out = t._forward(t.model, batch)
        out["loss"].sum().backward()
        grads = {n: p.grad for n, p in t.model.named_parameters()}
        found[packing, sharing, own] = {n: x.detach() for n, x in out.items() if x.is_floating_point()} | grads
    oracle, padded = found.pop((False, False, False)), found.pop((False, False, True))
    for values in found.values():
        for name, value in values.items():
            assert_within_budget(name, value, oracle[name], padded[name])


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Models, data and the teacher's store."""
    folder = tmp_path_factory.mktemp("stored")
    tiny.save(folder / "teacher", 3, OTHER, seed=1)
    tiny.write_jsonl(folder / "train.jsonl", tiny.problems(8))
    extract(
        ExtractConfig(teacher=str(folder / "teacher"), data_files=[str(folder / "train.jsonl")],
                      store=str(folder / "store"))
    )  # fmt: skip
    return folder


@pytest.mark.parametrize(
    "layout", [{}, {"share_question": False}, {"packing": False}], ids=["shared", "packed", "padded"]
)
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2}, {"dataloader_num_workers": 2}, {"bf16": True},
     {"bf16": True, "gradient_accumulation_steps": 2, "dataloader_num_workers": 2, "gradient_checkpointing": True}],
    ids=["plain", "accumulation", "workers", "bf16", "all"],
)  # fmt: skip
def test_the_store_is_the_live_teacher(stored, tmp_path, layout, options, monkeypatch):
    """Loss and gradients of the first step, to float32 rounding; under autocast the teacher runs in its own dtype."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    options = dict(max_steps=1, save_strategy="no", beta=10.0) | layout | options
    live = trainer(tmp_path / "live", **options)
    held = DistillTrainer(
        config(tmp_path / "stored", store=str(stored / "store"), **options), tiny.model(2), TOKENIZER,
        train_dataset=examples(),
    )  # fmt: skip
    assert held.teacher is None and live.teacher is not None
    a, b = gradients(live), gradients(held)
    for name in ("loss", "loss_pre", "loss_exp", "loss_att", "loss_att_uniform", "entropy_teacher"):
        x, y = (row[0] for t in (live, held) for row in logged(t, name))
        # A divergence is a difference of terms of order one: float32 leaves it a step of that size.
        assert x == pytest.approx(y, rel=2e-6, abs=torch.finfo(torch.float32).eps), name
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert (b[name] - value).norm() <= 2e-6 * value.norm(), name


@pytest.mark.parametrize(
    "options",
    [{"packing": False}, {"bf16": True, "gradient_accumulation_steps": 2, "dataloader_num_workers": 2}],
    ids=["padded", "packed, bf16, accumulation, workers"],
)
def test_resume_is_bitwise_however_batches_are_made(tmp_path, options, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    runs = {}
    for name, stop in (("whole", None), ("resumed", 3)):
        t = trainer(tmp_path / name, **options)
        if stop:
            t.add_callback(StopAt(stop))
            t.train()
            t = trainer(tmp_path / name, resume=True, **options)
        t.train()
        runs[name] = t
    assert len(logged(runs["whole"], *LOSSES)) == 6
    assert logged(runs["whole"], *LOSSES) == logged(runs["resumed"], *LOSSES)
    for file in ("model.safetensors", ROUTER):
        assert same_files(tmp_path / "whole/checkpoint-6" / file, tmp_path / "resumed/checkpoint-6" / file)


def test_packing_that_a_student_cannot_do(tmp_path, monkeypatch):
    monkeypatch.setattr("molsaki.training.trainer.can_pack", lambda model: False)
    collator = trainer(tmp_path).data_collator
    assert not collator.packing and not collator.share_question
    with pytest.raises(ValueError, match="--packing: texts that share a row change one another in LlamaForCausalLM"):
        trainer(tmp_path, packing=True)


def test_sharing_that_a_student_cannot_do(tmp_path, monkeypatch):
    assert trainer(tmp_path).data_collator.share_question
    assert not trainer(tmp_path, share_question=False).data_collator.share_question
    monkeypatch.setattr("molsaki.training.trainer.can_branch", lambda model: False)
    collator = trainer(tmp_path).data_collator
    assert collator.packing and not collator.share_question
    with pytest.raises(ValueError, match="--share_question: the end of a text, run by itself, .* in LlamaForCausalLM"):
        trainer(tmp_path, share_question=True)
    for options in ({"packing": False}, {"objective": "vanilla"}):
        with pytest.raises(ValueError, match="share_question: expected packing and an objective of both tasks, got"):
            config(tmp_path, share_question=True, **options)


def test_a_full_disk_leaves_the_checkpoint_before(straight, tmp_path):
    """A write fails in the middle of a checkpoint; resumed, the run ends as one without interruption."""
    t = trainer(tmp_path, save_steps=2)

    class Fill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:  # from now on no file gets longer than this
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as on a full disk: an error, not a signal
    t.add_callback(Fill())
    try:
        with pytest.raises(Exception, match="(?i)file too large|write|failed"):
            t.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    resumed = trainer(tmp_path, resume=True)
    resumed.train()
    assert logged(resumed, *LOSSES) == logged(straight, *LOSSES)
    assert same_files(
        Path(straight.args.output_dir, "checkpoint-6/model.safetensors"), tmp_path / "checkpoint-6/model.safetensors"
    )


def test_gradient_checkpointing_changes_nothing(tmp_path):
    options = dict(max_steps=1, save_strategy="no")
    plain = gradients(trainer(tmp_path / "a", **options))
    light = gradients(trainer(tmp_path / "b", gradient_checkpointing=True, **options))
    assert light.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(light[name], value, rtol=1e-4, atol=1e-6)


def test_bf16_autocast_is_near_float32(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # transformers 4 leaves its own there
    options = dict(max_steps=2, save_strategy="no")
    exact, mixed = (trainer(tmp_path / name, bf16=name == "b", **options) for name in "ab")
    for t in (exact, mixed):
        t.train()
    for a, b in zip(logged(exact, "loss", "loss_att"), logged(mixed, "loss", "loss_att"), strict=True):
        assert b == pytest.approx(a, rel=0.05)
    assert mixed.model.student.dtype == torch.float32


def test_no_gradient_reaches_the_teacher_side(straight, tmp_path):
    t = trainer(tmp_path, save_strategy="no")
    batch = t.data_collator([t.train_dataset[i] for i in range(2)])
    assert not any(p.requires_grad for p in t.teacher.parameters())
    out = t._forward(t.model, batch)
    assert not out["teacher_weights"].requires_grad
    out["loss"].sum().backward()
    assert all(p.grad is None for p in t.teacher.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in t.model.parameters())


def test_evaluation_counts_each_example_once(tmp_path):
    t = DistillTrainer(
        config(tmp_path, per_device_eval_batch_size=3, save_strategy="no"), tiny.model(2), TOKENIZER,
        tiny.model(3, len(OTHER), seed=1), OTHER, train_dataset=examples(), eval_dataset=examples(7),
    )  # fmt: skip
    metrics = t.evaluate()
    whole = t.data_collator([t.eval_dataset[i] for i in range(7)])
    with torch.no_grad():
        out = t._forward(t.model.eval(), whole)
    for name in ("loss", "loss_pre", "loss_exp", "loss_att", "entropy_teacher", "words_mean"):
        assert metrics[f"eval_{name}"] == pytest.approx(out[name].double().mean().item(), rel=1e-4)
    assert metrics["eval_without_words"] == 0


def test_best_checkpoint_is_loaded_with_its_router(tmp_path):
    t = DistillTrainer(
        config(tmp_path, max_steps=4, learning_rate=0.3, eval_strategy="steps", eval_steps=1, save_steps=1,
               save_total_limit=1, load_best_model_at_end=True),
        tiny.model(2), TOKENIZER, tiny.model(3, len(OTHER), seed=1), OTHER,
        train_dataset=examples(), eval_dataset=examples(2),
    )  # fmt: skip
    t.train()
    best = Path(t.state.best_model_checkpoint)
    losses = {e["step"]: e["eval_loss"] for e in t.state.log_history if "eval_loss" in e}
    assert best.name == f"checkpoint-{min(losses, key=losses.get)}"
    assert len(checkpoints(tmp_path)) <= 2
    router = load_file(best / ROUTER)
    assert all(torch.equal(value, t.model.mixture.state_dict()[name]) for name, value in router.items())
    embedding = load_file(best / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embedding, t.model.student.get_input_embeddings().weight)


@pytest.mark.parametrize("objective", ["vanilla", "dss", "mmi", "logits", "molsaki"])
def test_objectives_train(tmp_path, objective):
    t = DistillTrainer(
        config(tmp_path, objective=objective, max_steps=4, save_strategy="no", per_device_train_batch_size=8),
        tiny.model(2), TOKENIZER, tiny.model(3, len(TOKENIZER), seed=1), TOKENIZER, train_dataset=examples(),
    )  # fmt: skip
    t.train()
    rows = logged(t, "loss", "loss_pre")
    assert rows[-1][1] < rows[0][1]
    assert (t.model.mixture is None) == (objective != "molsaki")
    assert (t.teacher is None) == (objective in ("vanilla", "dss", "mmi"))


def test_examples_without_words_add_no_attention_loss(tmp_path):
    wordless = Example("w", "Who has nuts?", "Ann has nuts. They are small.", "Ann")
    t = trainer(tmp_path, data=examples(3) + [wordless], per_device_train_batch_size=4, max_steps=1, save_strategy="no")
    out = t._forward(t.model, t.data_collator([t.train_dataset[i] for i in range(4)]))
    assert out["loss_att"][3] == 0
    assert (out["loss_att"][:3] > 0).all()
    t.train()
    assert logged(t, "without_words", "words_mean") == [(1, 27 / 4)]
    alone = trainer(tmp_path / "b", data=[wordless], per_device_train_batch_size=1, max_steps=1, save_strategy="no")
    alone.train()
    assert logged(alone, "loss_att", "without_words") == [(0.0, 1)]


def test_nan_stops_and_saves_the_batch(tmp_path):
    t = trainer(tmp_path, save_steps=1, max_steps=3)

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                next(t.model.student.parameters()).data.fill_(float("nan"))

    t.add_callback(Break())
    with pytest.raises(
        FloatingPointError, match=r"not finite after step 2, on example\(s\) p\d, p\d; the batch is saved"
    ):
        t.train()
    (saved,) = tmp_path.glob("bad_batch_step2_rank0.pt")
    batch = torch.load(saved, weights_only=False)
    assert len(batch["inputs"]["ids"]) == len(batch["inputs"]["plan"]) == 2
    assert not torch.isfinite(batch["losses"]["loss"]).all()


def test_lora_trains_adapters_and_exports_a_merged_model(tmp_path):
    pytest.importorskip("peft")
    options = dict(lora_rank=2, max_steps=4, save_steps=2)
    straight = trainer(tmp_path / "a", **options)
    assert all("lora" in n or "mixture" in n for n, p in straight.model.named_parameters() if p.requires_grad)
    straight.train()
    assert (tmp_path / "a/checkpoint-4/adapter_model.safetensors").is_file()
    first = trainer(tmp_path / "b", **options)
    first.add_callback(StopAt(2))
    first.train()
    resumed = trainer(tmp_path / "b", resume=True, **options)
    resumed.train()
    assert logged(resumed, *LOSSES) == logged(straight, *LOSSES)
    straight.save_model()
    assert not (tmp_path / "a/adapter_model.safetensors").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    ids = torch.tensor([TOKENIZER("Ann has 3 nuts.").input_ids])
    expected = straight.model.student.eval()(input_ids=ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - tiny.model(2)(ids).logits).abs().max() > 1e-3


def test_the_router_may_have_its_own_learning_rate(tmp_path):
    t = trainer(tmp_path, router_learning_rate=0.0, max_steps=2, save_strategy="no")
    before = {name: p.clone() for name, p in t.model.named_parameters()}
    t.train()
    for name, p in t.model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("mixture.")


def test_freezing(tmp_path):
    t = trainer(tmp_path, freeze=["embed_tokens", r"layers\.0\."], max_steps=1, save_strategy="no")
    before = {name: p.clone() for name, p in t.model.student.named_parameters()}
    t.train()
    for name, p in t.model.student.named_parameters():
        frozen = "embed_tokens" in name or "layers.0." in name
        assert torch.equal(p, before[name]) == frozen
    with pytest.raises(ValueError, match="--freeze: 'layer9' is the name of no parameter"):
        trainer(tmp_path, freeze=["layer9"])


def test_a_folder_with_checkpoints_is_not_overwritten(straight):
    with pytest.raises(ValueError, match="holds the checkpoints of another run; continue it with --resume"):
        trainer(Path(straight.args.output_dir)).train()


def test_resume_with_nothing_to_resume_starts(tmp_path):
    t = trainer(tmp_path, resume=True, max_steps=1, save_strategy="no")
    t.train()
    assert t.state.global_step == 1


def test_a_checkpoint_of_another_student_is_refused(straight, tmp_path):
    other = trainer(tmp_path, student=tiny.model(3))
    shutil.copytree(Path(straight.args.output_dir, "checkpoint-3"), tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match="the checkpoint is of another student: it lacks"):
        other.train(resume_from_checkpoint=True)


def test_bad_input(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="config: expected a DistillConfig, got dict"):
        DistillTrainer({})
    with pytest.raises(ValueError, match="--student: required"):
        DistillTrainer(config(tmp_path))
    with pytest.raises(ValueError, match="--teacher: required"):
        DistillTrainer(config(tmp_path), tiny.model(2), TOKENIZER, train_dataset=examples())
    with pytest.raises(ValueError, match="--student: no such folder"):
        DistillTrainer(config(tmp_path, student="/no/such/model"))
    with pytest.raises(ValueError, match="objective: logits needs one vocabulary"):
        trainer(tmp_path, objective="logits")
    monkeypatch.setattr(DistillConfig, "n_gpu", 4)
    with pytest.raises(ValueError, match="4 GPUs are visible to this one process; start one process a GPU"):
        trainer(tmp_path)
