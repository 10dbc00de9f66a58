"""The attention loss's share of the gradient: measured against the gradients themselves, held, and switched off."""

from __future__ import annotations

import pytest
import torch

from molsaki.config import ExtractConfig
from molsaki.teacher.extract import extract
from molsaki.text.examples import Example
from molsaki.training.trainer import DistillTrainer
from tests.helpers import tiny
from tests.helpers.tiny import one_thread  # noqa: F401
from tests.helpers.training import OTHER, TOKENIZER, StopAt, config, examples, gradients, logged, trainer

OPTIONS = {"learning_rate": 1e-3, "max_grad_norm": 1e9, "save_strategy": "no"}


def norm_of_gradient(t: DistillTrainer, beta: float) -> torch.Tensor:
    t.model.zero_grad()
    batch = t.data_collator([t.train_dataset[i] for i in range(8)])
    t.model.beta = beta
    t._forward(t.model, batch)["loss"].mean().backward()
    return torch.cat([p.grad.flatten() for p in t.model.student.parameters() if p.grad is not None])


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"lora_rank": 2}])
def test_the_share_is_that_of_the_gradients(tmp_path, options):
    if "lora_rank" in options:
        pytest.importorskip("peft")
    t = trainer(tmp_path, beta=3.0, share_steps=2, per_device_train_batch_size=8, max_steps=3, **OPTIONS, **options)
    rest = norm_of_gradient(t, 0.0)
    attention = norm_of_gradient(t, 1.0) - rest
    expected = 3 * (attention.norm() / rest.norm()).item()
    t.train()
    rows = [entry for entry in t.state.log_history if "attention_share" in entry]
    assert rows[0]["attention_share"] == pytest.approx(expected, rel=1e-3) and rows[0]["beta"] == 3
    shares = [row["attention_share"] for row in rows]
    assert shares[0] == shares[1] != shares[2]  # measured at steps 0 and 2


def test_measuring_changes_no_gradient(tmp_path):
    plain = gradients(trainer(tmp_path / "a", max_steps=1, **OPTIONS))
    measured = gradients(trainer(tmp_path / "b", max_steps=1, share_steps=1, **OPTIONS))
    assert plain.keys() == measured.keys()
    for name, value in plain.items():
        torch.testing.assert_close(measured[name], value, rtol=0, atol=0)


def test_a_held_share(tmp_path):
    t = trainer(tmp_path, attention_share=0.2, share_steps=1, per_device_train_batch_size=8, max_steps=8, **OPTIONS)
    t.train()
    rows = logged(t, "attention_share", "beta", "loss", "loss_att", "loss_pre", "loss_exp")
    for share, *_ in rows:
        assert share == pytest.approx(0.2, rel=0.3)
    betas = [beta for _, beta, *_ in rows]
    assert len(set(betas)) == len(betas)
    for _, beta, loss, att, pre, exp in rows:
        assert loss == pytest.approx(0.5 * pre + 0.5 * exp + beta * att, abs=2e-4)


def test_a_resumed_run_continues_with_its_beta(tmp_path):
    options = OPTIONS | {"save_strategy": "steps", "save_steps": 3, "attention_share": 0.2, "share_steps": 2}
    whole = trainer(tmp_path / "a", max_steps=6, **options)
    whole.train()
    first = trainer(tmp_path / "b", max_steps=6, **options)
    first.add_callback(StopAt(3))
    first.train()
    second = trainer(tmp_path / "b", max_steps=6, resume=True, **options)
    second.train()
    names = ("step", "beta", "loss", "loss_att")
    assert logged(second, *names) == logged(whole, *names)


def test_the_loss_can_end_early(tmp_path):
    t = trainer(tmp_path, beta=3.0, beta_until=0.5, max_steps=4, **OPTIONS)
    t.train()
    for step, (loss, att, pre, exp) in enumerate(logged(t, "loss", "loss_att", "loss_pre", "loss_exp")):
        beta = 3 if step < 2 else 0
        assert loss == pytest.approx(0.5 * pre + 0.5 * exp + beta * att, abs=2e-4)
    t = trainer(tmp_path / "b", beta=3.0, beta_until=0.5, max_steps=4, share_steps=1, **OPTIONS)
    t.train()
    rows = [entry for entry in t.state.log_history if "loss" in entry]
    assert [row["beta"] for row in rows] == [3, 3, 0, 0]
    assert ["attention_share" in row for row in rows] == [True, True, False, False]


def test_a_map_of_another_example(tmp_path):
    """The losses are those of a batch whose teacher's maps are exchanged."""
    found = {}
    for control in ("none", "other_example"):
        t = trainer(tmp_path / control, control=control, per_device_train_batch_size=4, **OPTIONS)
        batch = t.data_collator([t.train_dataset[i] for i in range(4)])
        seen: list = []
        t.model.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        t._forward(t.model, batch)
        found[control] = seen[0]
    own, other = found["none"].teacher_map, found["other_example"].teacher_map
    torch.testing.assert_close(other, own[[1, 2, 3, 0]])
    assert not torch.equal(other, own)
    for wrong in (
        {"per_device_train_batch_size": 1},
        {"per_device_eval_batch_size": 1},
        {"auto_find_batch_size": True},
    ):
        options = {"per_device_train_batch_size": 2} | wrong
        with pytest.raises(ValueError, match="control: other_example needs another example"):
            config(tmp_path, control="other_example", **options)


def test_only_what_both_examples_have_is_compared(tmp_path):
    """Examples of other shapes, one of them without words, and a batch of one example, which has no attention loss."""
    data = [
        *examples(2),
        Example("short", "Ann has 3 nuts.", "She eats 1.", "2"),
        Example("none", "Who has nuts?", "Ann has. Bob has not. So Ann.", "Ann"),
    ]
    t = trainer(tmp_path, data=data, control="other_example", mixture="last", normalise="sum", **OPTIONS)
    batch = t.data_collator([t.train_dataset[i] for i in range(4)])
    seen: list = []
    t.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    t._forward(t.model, batch)
    given, steps, words = seen[0], batch.plan.step_mask.sum(1).tolist(), batch.plan.word_mask.sum(1).tolist()
    assert words[3] == 0 and words[2] < words[0]
    for n, donor in enumerate((1, 2, 0, 0)):  # the next one that has words
        both = given.teacher_entries[n] & batch.plan.step_mask[n][:, None] & batch.plan.word_mask[n]
        assert both.sum() == min(steps[n], steps[donor]) * min(words[n], words[donor])
    alone = t.data_collator([t.train_dataset[0]])
    assert t._forward(t.model, alone)["loss_att"].tolist() == [0]


def test_batches_without_a_choice_of_words_are_not_measured(tmp_path):
    """What is left of their gradient is rounding: beta would become enormous."""
    data = [
        Example("a", "Ann has 3 nuts.", "She eats some.", "x"),
        Example("b", "Who?", "Ann does.", "Ann"),
        *examples(2),
    ]
    options = OPTIONS | {"attention_share": 0.2, "share_steps": 1, "train_sampling_strategy": "sequential"}
    t = trainer(tmp_path, data=data, max_steps=4, **options)
    t.train()
    rows = [entry for entry in t.state.log_history if "loss" in entry]
    assert rows[0]["beta"] == 1 and "attention_share" not in rows[0]
    assert rows[1]["attention_share"] == pytest.approx(0.2, rel=0.01) and 0.1 < rows[1]["beta"] < 1e4
    assert rows[2]["beta"] == rows[1]["beta"]
    assert all(row["loss"] < 20 for row in rows)


def test_the_loss_of_evaluation_has_one_beta(tmp_path):
    t = trainer(tmp_path, beta=50.0, beta_until=0.5, max_steps=4, **OPTIONS)
    t.train()
    found = t.evaluate(examples(4))
    expected = 0.5 * found["eval_loss_pre"] + 0.5 * found["eval_loss_exp"] + 50 * found["eval_loss_att"]
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_matched_weights_are_resumed_for_their_layers_only(tmp_path):
    options = OPTIONS | {"save_strategy": "steps", "save_steps": 2, "mixture": "matched", "map_heads": "each"}
    first = trainer(tmp_path, max_steps=4, teacher_layers=[1, 5], **options)
    first.add_callback(StopAt(2))
    first.train()
    with pytest.raises(ValueError, match=r"teacher_layers: expected those of .*; got \[0, 2\]"):
        trainer(tmp_path, max_steps=4, teacher_layers=[0, 2], resume=True, **options).train()
    second = trainer(tmp_path, max_steps=4, teacher_layers=[1, 5], resume=True, **options)
    second.train()
    assert second.state.global_step == 4


def test_steps_of_the_rationale_only(tmp_path):
    t = trainer(tmp_path, map_steps="rationale", **OPTIONS)
    items = [t.train_dataset[i] for i in range(4)]
    batch = t.data_collator(items)
    for n, (item, _) in enumerate(items):
        spans = item.spans
        expected = [start >= spans.rationale_start for start, _ in spans.steps]
        assert batch.rationale_steps[n, : len(expected)].tolist() == expected and True in expected and False in expected
        assert not batch.rationale_steps[n, len(expected) :].any()
    everything = trainer(tmp_path / "all", **OPTIONS)
    got, whole = (x._forward(x.model, batch)["loss_att"] for x in (t, everything))
    assert (got != whole).any()


@pytest.mark.parametrize(
    ("mixture", "all_layers"),
    [
        ("mixture", False),
        ("mixture", True),
        ("matched", False),
        ("matched", True),
        ("single", False),
        ("uniform", True),
    ],
)
def test_maps_of_single_heads(tmp_path, mixture, all_layers):
    """A store of heads gives the losses of a live teacher, and the student's pairs are learnt."""
    data = tiny.write_jsonl(tmp_path / "train.jsonl", tiny.problems(8))
    heads = {"map_heads": "each", "mixture": mixture, "teacher_layers": [1, 5] if mixture == "matched" else []}
    heads |= {"teacher_layer": 4, "student_layer": 2}
    teacher = tiny.model(3, len(OTHER), seed=1)
    store = str(tmp_path / "store")
    extract(ExtractConfig(data_files=[str(data)], store=store, all_layers=all_layers, **heads), teacher, OTHER)
    rows = []
    for source in ({"store": store}, {}):
        options = config(tmp_path / f"run{len(rows)}", max_steps=3, normalise="sum", **OPTIONS, **heads, **source)
        live = {} if source else {"teacher_model": tiny.model(3, len(OTHER), seed=1), "teacher_processing_class": OTHER}
        t = DistillTrainer(
            args=options, model=tiny.model(2), processing_class=TOKENIZER, **live, train_dataset=examples()
        )
        t.train()
        rows.append(logged(t, "loss", "loss_att", "entropy_student"))
        units = 2 * t.model.student.config.num_attention_heads
        assert t.model.mixture.num_student_layers == units
        if mixture in ("mixture", "matched"):
            assert rows[-1][0][2] == pytest.approx(torch.tensor(float(units)).log().item())
            assert rows[-1][-1][2] < rows[-1][0][2]
    tolerance = 2e-3 if all_layers else 1e-5
    for a, b in zip(*rows, strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=1e-6)
    for wrong in ({"map_heads": "mean"}, {"mixture": "matched", "teacher_layers": [0, 5]}):
        if all_layers and "map_heads" not in wrong or mixture != "matched" and "map_heads" not in wrong:
            continue
        options = config(tmp_path / "wrong", store=store, **heads | wrong)
        with pytest.raises(ValueError, match="this store was written with another (map heads|list of teacher layers)"):
            DistillTrainer(args=options, model=tiny.model(2), processing_class=TOKENIZER, train_dataset=examples())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(attention_share=0.0), "attention_share: expected a positive number, got 0.0"),
        (dict(beta_until=1.5), "beta_until: expected a fraction of the training, from 0 to 1, got 1.5"),
        (
            dict(share_steps=5, objective="dss"),
            "share_steps, attention_share: expected an objective with attention_loss",
        ),
        (dict(share_steps=5, torch_compile=True), "share_steps, attention_share: expected no torch_compile"),
        (dict(teacher_temperature=-1.0), "teacher_temperature: expected a positive number, got -1.0"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)
