from __future__ import annotations

import pickle
import tracemalloc

import pytest
import torch
from torch.utils.data import DataLoader

from molsaki.batches import dataset as dataset_module
from molsaki.batches.collator import Collator
from molsaki.batches.dataset import DistillDataset, prepare
from molsaki.batches.tokenized import TokenizerSpec, predict_prompt
from molsaki.config import PREDICT_TEMPLATE, TextOptions
from molsaki.text.examples import Example, read_examples
from tests.helpers import tiny

TOKENIZER, OTHER = tiny.tokenizer(), tiny.tokenizer(60)
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"


def examples(count: int = 4) -> list[Example]:
    return [Example(r["id"], r["question"], r["rationale"], r["answer"]) for r in tiny.problems(count)]


def student(max_length: int | None = None, template: str = "plain") -> TokenizerSpec:
    return TokenizerSpec(TOKENIZER, template, max_length)


def test_prompt_is_what_training_saw():
    for template in ("plain", "chat"):
        TOKENIZER.chat_template = CHAT
        row = prepare(examples(1), TextOptions(), student(template=template))[0][0]
        prompt = predict_prompt(examples(1)[0], TOKENIZER, template, PREDICT_TEMPLATE)
        assert row.predict.input_ids[: row.predict.target_start].tolist() == prompt
        assert TOKENIZER.decode(row.predict.input_ids).endswith(
            "Answer: 5<|end|>" if template == "plain" else "5<|end|>"
        )
        assert row.explain.input_ids[-1] == TOKENIZER.eos_token_id
        assert (row.explain.input_ids[row.explain.target_start :] == TOKENIZER.eos_token_id).sum() == 1


def test_examples_left_out_are_counted():
    many = examples(4)
    many[0] = Example("no", many[0].question, " ", "1")
    many[1] = Example("wrong", many[1].question, many[1].rationale, "1", is_right=False)
    many[2] = Example("long", many[2].question, many[2].rationale * 5, "1")
    data = prepare(many, TextOptions(drop_wrong=True), student(200))
    assert [row.id for row, _ in data] == ["p3"]
    assert data.skipped == {"no rationale": 1, "wrong answer": 1, "text longer than max_length": 1}
    assert data.left_out == {"no rationale": ["no"], "wrong answer": ["wrong"], "text longer than max_length": ["long"]}
    assert "1 examples, 0 without key words; 1 left out: no rationale (no); 1 left out: wrong ans" in data.summary()


def test_a_text_that_a_template_refuses_is_left_out(caplog):
    """In the rationale, or in the answer alone; a template that fails for every text is an error."""
    tokenizer, many = tiny.tokenizer(), examples(6)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim('X') }}{% endfor %}"
    many[1] = Example("e", many[1].question, many[1].rationale + "X", "1")
    many[2] = Example("p", many[2].question, many[2].rationale, "X")
    data = prepare(many, TextOptions(), TokenizerSpec(tokenizer, "chat", None))
    assert data.left_out == {"the template or the tokenizer refuses its text": ["e", "p"]}
    assert "example e: template: the chat template of" in caplog.text
    with pytest.raises(ValueError, match="template: .* has no chat template"):
        prepare(many, TextOptions(), TokenizerSpec(tiny.tokenizer(), "chat", None))


def test_all_left_out_is_an_error():
    with pytest.raises(ValueError, match="all 4 examples were left out: 4 text longer than max_length"):
        prepare(examples(4), TextOptions(), student(80))


def test_cutting_keeps_both_sides_alike():
    options = TextOptions(too_long="cut")
    data = prepare(examples(4), options, student(100), TokenizerSpec(OTHER, "plain", None))
    whole = prepare(examples(4), options, student(None), TokenizerSpec(OTHER, "plain", None))
    for (row, _), (full, _) in zip(data, whole, strict=True):
        assert len(row.explain.input_ids) <= 99
        assert TOKENIZER.eos_token_id not in row.explain.input_ids
        assert 0 < len(row.explain.words) < len(full.explain.words)
        assert len(row.explain.words) == len(row.teacher.words)
        assert len(row.explain.steps) == len(row.teacher.steps)


def test_examples_without_key_words_are_kept_and_counted():
    data = prepare(examples(3), TextOptions(key="keywords"), student())
    assert (len(data), data.without_words) == (3, 3)
    keyed = [Example("k", "Where do apples grow?", "Apples grow on a tree.", "tree", keywords=("apples", "tree"))]
    data = prepare(examples(1) + keyed, TextOptions(key="keywords"), student())
    assert [len(row.explain.words) for row, _ in data] == [0, 3]
    assert Collator(0)([data[0], data[1]]).plan.word_mask.sum(1).tolist() == [0, 3]


def test_dataset_pickles_and_loads_in_workers():
    data = prepare(examples(8), TextOptions(), student())
    assert isinstance(pickle.loads(pickle.dumps(data)), DistillDataset)
    alone, workers = (list(DataLoader(data, 4, collate_fn=Collator(0), num_workers=n)) for n in (0, 1))
    for a, b in zip(alone, workers, strict=True):
        assert torch.equal(a.student[0].input_ids, b.student[0].input_ids)
        assert torch.equal(a.plan.tokens, b.plan.tokens)


def test_examples_are_the_same_kept_or_not(monkeypatch):
    options = TextOptions(too_long="cut")
    sides = (student(100), TokenizerSpec(OTHER, "plain", None))
    kept = prepare(examples(6), options, *sides)
    monkeypatch.setattr(dataset_module, "KEPT", 2)
    made = prepare(examples(6), options, *sides)
    for n in (5, 0, 3, 2, 1, 4):
        (a, _), (b, _) = kept[n], made[n]
        assert (a.id, a.spans, a.explain.steps, a.explain.words) == (b.id, b.spans, b.explain.steps, b.explain.words)
        for name in ("explain", "predict", "teacher"):
            assert getattr(a, name).input_ids.tolist() == getattr(b, name).input_ids.tolist()
    assert [made[n][0].id for n in (1, 2, 3)] == ["p1", "p2", "p3"]
    with pytest.raises(IndexError):
        made[6]


def test_memory_does_not_grow_with_the_data(tmp_path, monkeypatch):
    """18 bytes per example, where a tokenized one would be 1 KB; the examples that are kept differ by some KB."""
    monkeypatch.setattr(dataset_module, "KEPT", 20)
    used = []
    for count in (60, 660):
        path = tiny.write_jsonl(tmp_path / f"{count}.jsonl", tiny.problems(count))
        prepare(read_examples(path)[:30], TextOptions(), student())  # warms up caches
        tracemalloc.start()
        data = prepare(read_examples(path), TextOptions(), student())
        assert sum(len(row.predict.input_ids) > 0 for row, _ in (data[n] for n in range(0, count, 7))) == count // 7 + 1
        used.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert used[1] - used[0] < 50 * 600


@pytest.mark.parametrize("template", ["{question}", "{answer} {question}", "{question} {answer"])
def test_bad_predict_template(template):
    with pytest.raises(ValueError, match="predict_template: expected a text with"):
        prepare(examples(1), TextOptions(), student(), predict_template=template)
