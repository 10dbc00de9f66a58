"""Each objective trains, and packing changes neither its losses nor its gradients."""

from __future__ import annotations

import typing

import pytest
import torch

from molsaki.training.config import DistillConfig
from molsaki.training.objectives import OBJECTIVES, Objective
from molsaki.training.trainer import DistillTrainer
from tests.helpers import tiny
from tests.helpers.budget import assert_within_budget
from tests.helpers.tiny import one_thread  # noqa: F401
from tests.helpers.training import TOKENIZER, config, examples, logged


def test_the_command_line_offers_every_objective():
    literal, _ = typing.get_args(typing.get_type_hints(DistillConfig)["objective"])  # or None
    assert typing.get_args(literal) == tuple(OBJECTIVES)


def test_a_new_objective_is_one_entry(tmp_path, monkeypatch):
    """Besides its name in the config, whose choices are fixed."""
    rationale = Objective(lambda student, batch, options: {"loss": student.explain.cross_entropy})
    monkeypatch.setitem(OBJECTIVES, "rationale", rationale)
    options = config(tmp_path, objective="dss", max_steps=2, save_strategy="no")
    options.objective = "rationale"
    t = DistillTrainer(args=options, model=tiny.model(2), processing_class=TOKENIZER, train_dataset=examples())
    t.train()
    (first, words), (second, _) = logged(t, "loss", "words_mean")
    assert 0 < second < first and words == 9


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
