from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest
import torch

from molsaki.annotation.annotate import annotate
from molsaki.batches.tokenized import predict_prompt
from molsaki.config import PREDICT_TEMPLATE, AnnotateConfig, EvaluateConfig, ExtractConfig
from molsaki.evaluation.evaluate import evaluate, generate, with_templates
from molsaki.evaluation.generate import decode
from molsaki.teacher.extract import extract
from molsaki.text.alignment import prompt
from molsaki.text.examples import Example
from molsaki.training.trainer import DistillTrainer
from tests.helpers import tiny, training
from tests.helpers.tiny import one_thread  # noqa: F401


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model"), 2)


def test_batched_replies_are_those_of_one_at_a_time():
    model, tokenizer = tiny.model(2), tiny.tokenizer()
    examples = [
        Example(r["id"], r["question"] + " Hm." * (i % 3), "", r["answer"]) for i, r in enumerate(tiny.problems(5))
    ]
    for mode in ("answer", "rationale"):
        config = EvaluateConfig(mode=mode, max_new_tokens=6, batch_size=3)
        replies, _ = generate(model, tokenizer, examples, config)
        for example, reply in zip(examples, replies, strict=True):
            ids = prompt(example.question, tokenizer)
            if mode == "answer":
                ids = predict_prompt(example, tokenizer, "plain", PREDICT_TEMPLATE)
            start = len(ids)
            while len(ids) < start + 6 and ids[-1] != tokenizer.eos_token_id:
                ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
            assert reply == tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_files_and_paired_comparison(folder, tmp_path):
    records = tiny.problems(6)
    data = tiny.write_jsonl(tmp_path / "d.jsonl", [{k: r[k] for k in ("id", "question", "answer")} for r in records])
    config = EvaluateConfig(model=str(folder), data_file=str(data), output_dir=str(tmp_path / "a"), max_new_tokens=4)
    summary = evaluate(config)
    written = [json.loads(line) for line in (tmp_path / "a/predictions.jsonl").read_text().splitlines()]
    assert [record["id"] for record in written] == [record["id"] for record in records]
    assert summary["right"] == sum(record["right"] for record in written)
    assert json.loads((tmp_path / "a/summary.json").read_text()) == summary
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["predictions.jsonl", "summary.json"]
    config.compare, config.output_dir = [str(tmp_path / "a/predictions.jsonl")], str(tmp_path / "b")
    paired = evaluate(config)["paired"]
    assert (paired["only_this"], paired["only_other"], paired["p_value"]) == (0, 0, 1.0)
    other = [json.loads(line) for line in (tmp_path / "a/predictions.jsonl").read_text().splitlines()]
    for field, value in (("question", "How many?"), ("gold", "-1")):
        changed = [record | ({field: value} if record["id"] == "p2" else {}) for record in other]
        config.compare = [str(tiny.write_jsonl(tmp_path / "c.jsonl", changed))]
        with pytest.raises(ValueError, match=f"has other questions: expected 'p2' to be .*, got .*{re.escape(value)}"):
            evaluate(config)
    config.compare = [str(tmp_path / "a")]
    config.limit = 3
    with pytest.raises(ValueError, match="has other questions: it holds 6 examples instead of 3"):
        evaluate(config)


def test_bad_input(folder, tmp_path):
    data = tiny.write_jsonl(tmp_path / "d.jsonl", tiny.problems(2))
    base = dict(model=str(folder), data_file=str(data), output_dir=str(tmp_path / "o"))
    with pytest.raises(ValueError, match=r"--model: no such folder: /no/model"):
        evaluate(EvaluateConfig(**{**base, "model": "/no/model"}))
    with pytest.raises(ValueError, match="--output_dir: required"):
        evaluate(EvaluateConfig(**{**base, "output_dir": None}))
    message = (
        "all 2 examples were left out: 2 question and a reply of 500 tokens longer than the model's context of 512"
    )
    with pytest.raises(ValueError, match=message):
        evaluate(EvaluateConfig(**base, max_new_tokens=500))
    with pytest.raises(ValueError, match="not a predictions.jsonl"):
        evaluate(EvaluateConfig(**base, compare=[str(data)]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="--model: cannot load"):
        evaluate(EvaluateConfig(**{**base, "model": str(tmp_path / "empty")}))


def test_a_model_without_its_tokenizer_is_refused(tmp_path):
    """Also a teacher of extract and annotate: none is replaced silently by the one that the config names."""
    data = str(tiny.write_jsonl(tmp_path / "data.jsonl", [r | {"gold": r["answer"]} for r in tiny.problems(2)]))
    calls = (
        (evaluate, EvaluateConfig(data_file=data, output_dir=str(tmp_path / "out"), model="unused")),
        (extract, ExtractConfig(data_files=[data], store=str(tmp_path / "store"), teacher="unused")),
        (annotate, AnnotateConfig(data_file=data, output_file=str(tmp_path / "out.jsonl"), teacher="unused")),
    )
    for function, config in calls:
        for given in ((tiny.model(), None), (None, tiny.tokenizer())):
            with pytest.raises(ValueError, match="tokenizer: expected both or neither"):
                function(config, *given)


def test_a_question_that_cannot_be_asked_is_left_out(folder, tmp_path, caplog):
    """One is too long, one is changed by the chat template; the others are scored, and paired with the same ones."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content | replace('X', '') }}{% endfor %}"
    rows = tiny.problems(4)
    rows[1]["question"] += " Hm." * 400
    rows[2]["question"] += "X"
    data = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    base = dict(data_file=str(data), template="chat", max_new_tokens=4)
    summary = evaluate(EvaluateConfig(**base, output_dir=str(tmp_path / "a")), tiny.model(2), tokenizer)
    assert summary["examples"] == 2
    assert sorted(summary["left_out"].values()) == [["p1"], ["p2"]]
    assert all(name in caplog.text for name in ("(p1)", "(p2)"))
    records = [json.loads(line) for line in (tmp_path / "a/predictions.jsonl").read_text().splitlines()]
    assert [("left_out" in one) for one in records] == [False, True, True, False]
    base |= dict(template="plain", compare=[str(tmp_path / "a/predictions.jsonl")])
    paired = evaluate(EvaluateConfig(**base, output_dir=str(tmp_path / "b")), tiny.model(2), tokenizer)["paired"]
    assert paired["questions"] == 2


def test_a_run_is_asked_in_its_own_templates(tmp_path):
    """Those of the training, also of a checkpoint; flags come before them."""
    teacher, run = tiny.tokenizer(60), tmp_path / "run"
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"
    trainer = DistillTrainer(
        args=training.config(
            run, student_template="chat", predict_template="{question} = {answer}", max_steps=1, save_steps=1
        ),
        model=tiny.model(2),
        processing_class=tokenizer,
        teacher_model=tiny.model(3, len(teacher), seed=1),
        teacher_processing_class=teacher,
        train_dataset=training.examples(),
    )
    trainer.train()
    trainer.save_model()
    data = str(tiny.write_jsonl(tmp_path / "d.jsonl", tiny.problems(2)))
    shutil.copytree(run, tmp_path / "bare")
    (tmp_path / "bare/distill.json").unlink()
    for model, options, expected in (
        (run, {}, ("chat", "{question} = {answer}")),
        (run / "checkpoint-1", {}, ("chat", "{question} = {answer}")),
        (run, {"template": "plain"}, ("plain", "{question} = {answer}")),
        (tmp_path / "bare", {}, ("plain", PREDICT_TEMPLATE)),
    ):
        config = EvaluateConfig(model=str(model), data_file=data, output_dir=str(tmp_path / "o"), max_new_tokens=4)
        summary = evaluate(dataclasses.replace(config, **options))
        assert (summary["template"], summary["predict_template"]) == expected
        ids = predict_prompt(training.examples(1)[0], tokenizer, *expected)
        reply = json.loads((tmp_path / "o/predictions.jsonl").read_text().splitlines()[0])["reply"]
        assert reply == decode(trainer.model.student.eval(), tokenizer, [ids], 4)[0][0].text


def test_a_run_trained_on_thinking_traces_is_asked_to_think(tmp_path):
    rationale = "<think>\n5 plus 5 is 10.\n</think>\n\nThe answer is 10."
    trainer = training.trainer(
        tmp_path / "run", [Example(str(i), "What is 5 plus 5?", rationale, "10") for i in range(4)], max_steps=1
    )
    trainer.train()
    trainer.save_model()
    saved = json.loads((tmp_path / "run" / "distill.json").read_text())
    assert saved["thinking"] is True and saved["max_steps"] == 1
    asked = EvaluateConfig(model=str(tmp_path / "run"), data_file="x", output_dir="y")
    assert with_templates(asked).thinking is True
    assert with_templates(dataclasses.replace(asked, thinking=False)).thinking is False
