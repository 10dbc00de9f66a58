from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from molsaki.batches.dataset import prepare
from molsaki.batches.tokenized import TokenizerSpec
from molsaki.config import ExtractConfig, TextOptions
from molsaki.run_files import CONFIG, ROUTER
from molsaki.store.map_store import Store
from molsaki.teacher.extract import extract
from molsaki.text.examples import Example
from molsaki.training.config import DistillConfig
from molsaki.training.distill import distill
from molsaki.training.trainer import DistillTrainer
from tests.helpers import tiny
from tests.helpers.tiny import one_thread  # noqa: F401
from tests.helpers.training import LOSSES, OTHER, TOKENIZER, StopAt, config, examples, gradients, logged, trainer


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
        args=config(tmp_path / "stored", store=str(stored / "store"), **options),
        model=tiny.model(2),
        processing_class=TOKENIZER,
        train_dataset=examples(),
    )
    assert held.teacher is None and live.teacher is not None
    a, b = gradients(live), gradients(held)
    for name in ("loss", "loss_pre", "loss_exp", "loss_att", "loss_att_uniform", "entropy_teacher"):
        x, y = (row[0] for t in (live, held) for row in logged(t, name))
        # A divergence is a difference of terms of order one: float32 leaves it a step of that size.
        assert x == pytest.approx(y, rel=2e-6, abs=torch.finfo(torch.float32).eps), name
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert (b[name] - value).norm() <= 2e-6 * value.norm(), name


def test_packing_that_a_student_cannot_do(tmp_path, monkeypatch):
    monkeypatch.setattr("molsaki.modeling.packing_probe.can_pack", lambda model: False)
    collator = trainer(tmp_path).data_collator
    assert not collator.packing and not collator.share_question
    with pytest.raises(ValueError, match="--packing: LlamaForCausalLM does not keep packed texts separate"):
        trainer(tmp_path, packing=True)


def test_sharing_that_a_student_cannot_do(tmp_path, monkeypatch):
    assert trainer(tmp_path).data_collator.share_question
    assert not trainer(tmp_path, share_question=False).data_collator.share_question
    monkeypatch.setattr("molsaki.training.setup.can_share_prefix", lambda model: False)
    collator = trainer(tmp_path).data_collator
    assert collator.packing and not collator.share_question
    with pytest.raises(
        ValueError, match="--share_question: LlamaForCausalLM gives different results if the shared prefix"
    ):
        trainer(tmp_path, share_question=True)
    for options in ({"packing": False}, {"objective": "vanilla"}):
        with pytest.raises(ValueError, match="share_question: expected packing and an objective of both tasks, got"):
            trainer(tmp_path, share_question=True, **options)


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
        args=config(tmp_path, per_device_eval_batch_size=3, save_strategy="no"),
        model=tiny.model(2),
        processing_class=TOKENIZER,
        teacher_model=tiny.model(3, len(OTHER), seed=1),
        teacher_processing_class=OTHER,
        train_dataset=examples(),
        eval_dataset=examples(7),
    )
    metrics = t.evaluate()
    whole = t.data_collator([t.eval_dataset[i] for i in range(7)])
    with torch.no_grad():
        out = t._forward(t.model.eval(), whole)
    for name in ("loss", "loss_pre", "loss_exp", "loss_att", "entropy_teacher", "words_mean"):
        assert metrics[f"eval_{name}"] == pytest.approx(out[name].double().mean().item(), rel=1e-4)
    assert metrics["eval_without_words"] == 0


def test_examples_without_words_add_no_attention_loss(tmp_path):
    wordless = Example("w", "Who has nuts?", "Ann has nuts. They are small.", "Ann")
    t = trainer(tmp_path, data=examples(3) + [wordless], per_device_train_batch_size=4, max_steps=1, save_strategy="no")
    out = t._forward(t.model, t.data_collator([t.train_dataset[i] for i in range(4)]))
    assert out["loss_att"][3] == 0
    assert (out["loss_att"][:3] > 0).all()
    t.train()
    assert logged(t, "without_words", "words_mean") == [(1, 27 / 4)]
    with pytest.raises(ValueError, match="key: numbers finds no key word in any of the 1 examples of train_dataset"):
        trainer(tmp_path / "b", data=[wordless])


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
    assert len(batch["inputs"].ids) == len(batch["inputs"]) == 2
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
    straight.save_model()  # over the first one
    assert not (tmp_path / "a/adapter_model.safetensors").exists()
    assert (tmp_path / "a/adapter/adapter_model.safetensors").is_file()
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
    with pytest.raises(ValueError, match="--freeze: 'layer9' matches no parameter"):
        trainer(tmp_path, freeze=["layer9"])


def test_a_teacher_that_the_objective_does_not_use(tmp_path, caplog):
    assert trainer(tmp_path).objective.maps and "not used" not in caplog.text
    assert not trainer(tmp_path, objective="dss").objective.maps
    assert "objective: dss uses no teacher, so the teacher is not used" in caplog.text
    assert not DistillTrainer(
        args=config(tmp_path), model=tiny.model(2), processing_class=TOKENIZER, train_dataset=examples()
    ).objective.maps


def test_names_in_place_of_models(tmp_path):
    """Names, a folder of a store, and the same names in the options, give the training of the models themselves."""
    teacher, options = tiny.save(tmp_path / "teacher", 3, OTHER, seed=1), {"max_steps": 2, "save_strategy": "no"}
    student = tiny.save(tmp_path / "student", 2)
    rows = tiny.problems(8)
    data = [str(tiny.write_jsonl(tmp_path / "train.jsonl", rows))]
    extract(ExtractConfig(teacher=str(teacher), data_files=data, store=str(tmp_path / "store")))
    expected = trainer(tmp_path / "models", **options)
    expected.train()
    made = [
        lambda args: DistillTrainer(str(student), str(teacher), args, rows),
        lambda args: DistillTrainer(student, args=args, train_dataset=rows, store=tmp_path / "store"),
        lambda args: DistillTrainer(tiny.model(2), str(teacher), args, rows, processing_class=TOKENIZER),
    ]
    for number, make in enumerate(made):
        t = make(config(tmp_path / str(number), **options))
        t.train()
        pair = (torch.tensor(logged(one, *LOSSES)) for one in (t, expected))
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-7)
        t.save_model()
        recorded = json.loads((tmp_path / str(number) / CONFIG).read_text())
        assert recorded["student"] == (None if number == 2 else str(student))
        assert recorded["teacher"] == (None if number == 1 else str(teacher))
    same = config(tmp_path / "same", student=str(student), **options)
    assert DistillTrainer(str(student), args=same, train_dataset=rows).objective.maps is False
    with pytest.raises(ValueError, match="model, args.student: expected one of them or the same, got .*other"):
        DistillTrainer(str(tmp_path / "other"), args=same, train_dataset=rows)
    with pytest.raises(ValueError, match="store, args.store: expected one of them"):
        DistillTrainer(str(student), args=config(tmp_path, store="another"), store=str(tmp_path / "store"))


def test_the_callers_options_stay_as_they_are(tmp_path):
    args = config(tmp_path / "run")
    student, teacher = tiny.save(tmp_path / "student", 2), tiny.save(tmp_path / "teacher", 3, OTHER, seed=1)
    assert DistillTrainer(str(student), str(teacher), args, examples()).objective.maps
    assert (args.student, args.teacher, args.objective) == (None, None, None)
    assert not DistillTrainer(str(student), None, args, examples()).objective.maps
    with pytest.raises(TypeError, match="store: expected a Store, its folder or None, got int"):
        DistillTrainer(str(student), args=args, train_dataset=examples(), store=3)
    data = [str(tiny.write_jsonl(tmp_path / "train.jsonl", tiny.problems(8)))]
    extract(ExtractConfig(teacher=str(teacher), data_files=data, store=str(tmp_path / "store")))
    other = config(tmp_path / "other", store="another")
    with pytest.raises(ValueError, match="store, args.store: expected the same, got .*store' and 'another'"):
        DistillTrainer(str(student), args=other, train_dataset=examples(), store=Store(tmp_path / "store"))


def test_a_frame_of_pandas(tmp_path):
    pandas = pytest.importorskip("pandas")
    rows = tiny.problems(4)
    rows[2]["keywords"] = ["nuts"]  # the others have none
    frame = pandas.DataFrame(rows)
    args = config(tmp_path, objective="dss")
    t = DistillTrainer(tiny.model(2), args=args, train_dataset=frame, processing_class=TOKENIZER)
    assert [e.id for e in t.train_dataset.examples] == [row["id"] for row in rows]
    assert t.train_dataset.examples[2].keywords == ("nuts",) and t.train_dataset.examples[1].keywords is None


def test_adapters_of_a_peft_config(tmp_path):
    """They train as the same adapters of the option do; of the two, and of a student that has some, one is enough."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=16, target_modules="all-linear")
    options = {"max_steps": 2, "save_strategy": "no"}
    rows = []
    for more, given in (({"lora_rank": 2}, {}), ({}, {"peft_config": lora})):
        t = DistillTrainer(
            tiny.model(2),
            tiny.model(3, len(OTHER), seed=1),
            config(tmp_path / str(len(rows)), **options, **more),
            examples(),
            processing_class=TOKENIZER,
            teacher_processing_class=OTHER,
            **given,
        )
        assert all("lora" in n or "mixture" in n for n, p in t.model.named_parameters() if p.requires_grad)
        t.train()
        rows.append(logged(t, *LOSSES))
    assert rows[0] == rows[1]
    adapted = peft.get_peft_model(tiny.model(2), lora)
    for student, more, error, message in (
        (tiny.model(2), {"lora_rank": 2}, ValueError, "peft_config, lora_rank: expected one of them, got both"),
        (adapted, {}, ValueError, "model: expected one without adapters, since --lora_rank or peft_config adds some"),
    ):
        with pytest.raises(error, match=message):
            args = config(tmp_path / "wrong", **more)
            DistillTrainer(student, args=args, train_dataset=examples(), processing_class=TOKENIZER, peft_config=lora)
    with pytest.raises(TypeError, match="peft_config: expected a peft.PeftConfig, got dict"):
        args = config(tmp_path / "wrong")
        DistillTrainer(tiny.model(2), args=args, train_dataset=examples(), processing_class=TOKENIZER, peft_config={})


def test_bad_input(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="args: expected a DistillConfig, got dict"):
        DistillTrainer(args={})
    with pytest.raises(
        TypeError, match="model: expected a model, its name or None, got DistillConfig; give it as args"
    ):
        DistillTrainer(config(tmp_path))
    with pytest.raises(ValueError, match="--student: required"):
        DistillTrainer(args=config(tmp_path))
    with pytest.raises(ValueError, match="--teacher: required"):
        DistillTrainer(
            args=config(tmp_path, objective="molsaki"),
            model=tiny.model(2),
            processing_class=TOKENIZER,
            train_dataset=examples(),
        )
    with pytest.raises(ValueError, match="--student: no such folder"):
        DistillTrainer(args=config(tmp_path, student="/no/such/model"))
    with pytest.raises(ValueError, match="objective: logits needs one vocabulary"):
        trainer(tmp_path, objective="logits")
    untaught = prepare(examples(2), TextOptions(), TokenizerSpec(TOKENIZER, "plain", None))
    with pytest.raises(ValueError, match="train_dataset, eval_dataset: expected the teacher's stored maps or tokens"):
        trainer(tmp_path, data=untaught, max_steps=1).train()
    monkeypatch.setattr(DistillConfig, "n_gpu", 4)
    with pytest.raises(ValueError, match="4 GPUs are visible to this one process; start one process per GPU"):
        trainer(tmp_path)


def test_a_peft_student_is_exported_whole(tmp_path):
    """A user's own adapters, as those of --lora_rank."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    student = peft.get_peft_model(tiny.model(2), lora)
    t = trainer(tmp_path, student=student, max_steps=1, save_steps=1)
    t.train()
    t.save_model()
    ids = torch.tensor([TOKENIZER("Ann has 3 nuts.").input_ids])
    expected = student.eval()(input_ids=ids).logits
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in loaded.named_parameters())
    again = peft.PeftModel.from_pretrained(tiny.model(2), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(input_ids=ids).logits, expected)
    assert (tmp_path / "checkpoint-1/adapter_model.safetensors").is_file()


def test_adapters_that_would_not_be_trained_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(
        ValueError, match="student: expected adapters within the layers, such as LoRA, got .*PROMPT_TUN"
    ):
        trainer(tmp_path, student=peft.get_peft_model(tiny.model(2), prompts))
    student = tiny.model(2)
    student.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="student: expected a model without adapters or a PeftModel"):
        trainer(tmp_path, student=student)


@pytest.mark.parametrize(("own", "expected"), [(5, 1), (None, 1), ([0, 5, 999], [1, 0]), ([1, 0], [1, 0])])
def test_the_export_stops_where_training_ended(tmp_path, own, expected):
    """At the tokenizer's end token, and at others of the student only where they are special tokens."""
    student = tiny.model(2)
    student.generation_config.eos_token_id = own
    t = trainer(tmp_path, student=student, max_steps=1, save_strategy="no")
    t.train()
    t.save_model()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = model.generation_config.eos_token_id
    assert (found if isinstance(expected, list) or isinstance(found, int) else found[0]) == expected
    assert found in (1, [1]) or expected == [1, 0]
    torch.nn.init.zeros_(model.model.embed_tokens.weight)  # all logits are equal: token 0, and never an end token
    out = model.generate(torch.tensor([[7]]), max_new_tokens=3, do_sample=False)
    assert out.shape == (1, 2 if expected == [1, 0] else 4)


@pytest.mark.parametrize("rows", [(258, 270), (270, 258), (264, 270)])
def test_logits_over_padded_embeddings(tmp_path, rows):
    """The rows after the last token are not tokens, on either side; also with a custom head."""
    losses = []
    for number, (a, b) in enumerate([(258, 258), rows]):
        student, teacher = tiny.model(2, 258), tiny.model(3, 258, seed=1)
        for model, size in ((student, a), (teacher, b)):
            if size > 258:
                model.resize_token_embeddings(size, mean_resizing=False)
                model.get_input_embeddings().weight.data[258:] = 1.0
        t = DistillTrainer(
            args=config(tmp_path / str(number), objective="logits", max_steps=1, save_strategy="no"),
            model=student,
            processing_class=TOKENIZER,
            teacher_model=teacher,
            teacher_processing_class=TOKENIZER,
            train_dataset=examples(),
        )
        t.train()
        losses.append(logged(t, "loss_logits")[0][0])
        t.model.head = None  # the model's own forward
        batch = t.data_collator([t.train_dataset[n] for n in range(2)])
        t._forward(t.model, batch)["loss"].sum().backward()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_optimizer_of_the_caller(tmp_path):
    """The router joins it; one that would not train the student is refused, and so is one with a scheduler."""

    def made(optimizer, scheduler=None, student=None, **options):
        return DistillTrainer(
            args=config(tmp_path, save_strategy="no", max_steps=2, **options),
            model=student,
            processing_class=TOKENIZER,
            teacher_model=tiny.model(3, len(OTHER), seed=1),
            teacher_processing_class=OTHER,
            train_dataset=examples(),
            optimizers=(optimizer, scheduler),
        )

    student = tiny.model(2)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    t = made(optimizer, student=student, router_learning_rate=1e-3)
    before = {name: p.clone() for name, p in t.model.named_parameters()}
    t.train()
    assert all(not torch.equal(p, before[name]) for name, p in t.model.named_parameters())
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1e-2, 1e-3]
    for stranger, options in ((tiny.model(2), {}), (student, {"lora_rank": 2})):
        other = torch.optim.SGD(stranger.parameters(), lr=1.0)
        with pytest.raises(
            ValueError, match="optimizers: the optimizer holds no parameter of the student that is trai"
        ):
            made(other, student=tiny.model(2) if stranger is not student else student, **options)
    student = tiny.model(2)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="optimizers: the router's parameters cannot join"):
        made(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0), student=student)


def test_the_router_does_not_change_the_clipping_of_the_student(tmp_path):
    seen = []
    for number, factor in enumerate((1.0, 1e6)):
        t = trainer(tmp_path / str(number), max_steps=1, save_strategy="no", max_grad_norm=0.5)
        for p in t.model.mixture.parameters():
            p.register_hook(lambda grad, factor=factor: grad * factor)
        seen.append((gradients(t), logged(t, "grad_norm")))
    (a, norm), (b, other) = seen
    assert norm == other and norm[0][0] > 0.5
    student = [value for name, value in a.items() if name.startswith("student.")]
    assert all(torch.equal(b[name], value) for name, value in a.items() if name.startswith("student."))
    assert torch.stack([g.norm() for g in student]).norm() == pytest.approx(0.5, rel=1e-4)
    router = [value for name, value in b.items() if name.startswith("mixture.")]
    assert torch.stack([g.norm() for g in router]).norm() == pytest.approx(0.5, rel=1e-4)


def test_left_out_examples_are_reported(tmp_path, caplog):
    many = examples(4)
    many[1] = Example("none", many[1].question, " ", "1")
    trainer(tmp_path, data=many)
    assert "train_dataset: 3 examples, 0 without key words; 1 left out: no rationale (none)" in caplog.text


def test_distill_reports_what_it_left_out(stored, tmp_path):
    rows = tiny.problems(4)
    rows[2]["rationale"] = ""
    files = dict(train_file=str(tiny.write_jsonl(tmp_path / "train.jsonl", rows)), teacher=str(stored / "teacher"))
    tiny.save(tmp_path / "student", 2)
    result = distill(config(tmp_path / "run", student=str(tmp_path / "student"), max_steps=1, **files))
    assert (result["examples"], result["without_words"], result["left_out"]) == (3, 0, {"no rationale": 1})
    assert json.loads((tmp_path / "run/left_out.json").read_text()) == {"no rationale": ["p2"]}
