from __future__ import annotations

import json
import pickle
import tracemalloc

import pytest
import torch
from torch.utils.data import DataLoader

from molsaki.batches import data as data_module
from molsaki.batches.data import Collator, DistillDataset, Example, Side, predict_prompt, prepare, read_examples
from molsaki.config import PREDICT_TEMPLATE, TextOptions
from tests.helpers import tiny

TOKENIZER, OTHER = tiny.tokenizer(), tiny.tokenizer(60)
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"


def examples(count: int = 4) -> list[Example]:
    return [Example(r["id"], r["question"], r["rationale"], r["answer"]) for r in tiny.problems(count)]


def student(max_length: int | None = None, template: str = "plain") -> Side:
    return Side(TOKENIZER, template, max_length)


def labelled(task: dict, row: int = 0) -> str:
    labels = task["labels"][row]
    return TOKENIZER.decode(labels[labels != -100])


def batch_of(data: DistillDataset, **options) -> dict:
    return Collator(TOKENIZER.pad_token_id, OTHER.pad_token_id, **options)([data[i] for i in range(len(data))])


def test_read(tmp_path):
    rows = tiny.problems(2) + [{"question": "q", "rationale": "", "answer": 12, "gold": 12.0, "choices": ["a", "b"]}]
    rows.append({"question": "q", "rationale": "r", "answer": "3", "gold": "4", "keywords": ["x"]})
    path = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    path.write_text("\n" + path.read_text())
    read = read_examples(path)
    assert [e.id for e in read] == ["p0", "p1", "4", "5"]
    assert read[2] == Example("4", "q", "", "12.0", None, ("a", "b"), is_right=True)
    assert (read[3].answer, read[3].keywords, read[3].is_right) == ("4", ("x",), False)


GOOD = {"id": "a", "question": "q", "rationale": "r", "answer": "1"}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", ValueError, "d.jsonl: holds no examples"),
        (json.dumps(GOOD) + "\n{broken\n", ValueError, "d.jsonl:2: not valid JSON"),
        ("[1]\n", ValueError, "d.jsonl:1: expected a JSON object, got list"),
        (json.dumps({**GOOD, "question": None}), ValueError, "d.jsonl:1: question: missing"),
        (json.dumps({**GOOD, "question": " "}), ValueError, "d.jsonl:1: question: expected a text, got a blank one"),
        (json.dumps({**GOOD, "question": ["q"]}), TypeError, "d.jsonl:1: question: expected a text, got list"),
        (json.dumps({"question": "q", "answer": "1"}), ValueError, "d.jsonl:1: rationale: missing"),
        (json.dumps({"question": "q", "rationale": "r"}), ValueError, "d.jsonl:1: answer: missing"),
        (json.dumps({**GOOD, "keywords": "one"}), TypeError, "d.jsonl:1: keywords: expected a list"),
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD), ValueError, "d.jsonl:2: id 'a' is line 1's already"),
    ],
)
def test_read_errors(tmp_path, text, error, message):
    path = tmp_path / "d.jsonl"
    path.write_text(text)
    with pytest.raises(error) as caught:
        read_examples(path)
    assert message in str(caught.value)


def test_read_without_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_examples(tmp_path / "none.jsonl")


@pytest.mark.parametrize("packing", [False, True])
def test_labels_lie_on_the_rationale_and_the_answer(packing):
    batch = batch_of(prepare(examples(3), TextOptions(), student()), packing=packing)
    assert len(batch["tasks"]) == (1 if packing else 2)
    texts = [labelled(task, n) for task in batch["tasks"] for n in range(len(task["counts"]))]
    expected = [" " + example.rationale + "<|end|>" for example in examples(3)]
    assert texts == expected + [" " + example.answer + "<|end|>" for example in examples(3)]
    assert "teacher" not in batch
    assert "teacher_map" not in batch


@pytest.mark.parametrize("packing", [False, True])
def test_index_is_where_each_label_is_predicted(packing):
    data = prepare(examples(4), TextOptions(), student(), Side(OTHER, "plain", None))
    batch = batch_of(data, packing=packing, teacher_packing=packing)
    for task in (*batch["tasks"], batch["teacher"]):
        assert torch.equal(task["input_ids"].flatten()[task["index"] + 1], task["targets"])
        assert torch.equal(task["labels"][task["labels"] != -100], task["targets"])
        assert task["counts"] == (task["labels"] != -100).sum(1).tolist()


def test_padded_tasks_are_right_padded():
    data = prepare(examples(4), TextOptions(), student(), Side(OTHER, "plain", None))
    batch = batch_of(data)
    for task in (*batch["tasks"], batch["teacher"]):
        ids, mask = task["input_ids"], task["attention_mask"]
        assert (mask.diff(dim=1) <= 0).all()
        assert (ids[mask == 0] == 0).all()
    lengths = batch["tasks"][0]["attention_mask"].sum(1)
    assert batch["plan"].extents == tuple((lengths - 1).tolist())  # all but the end token
    assert batch["tasks"][0]["plan"] is batch["plan"]


def test_packed_texts_follow_one_another_without_padding():
    data = prepare(examples(3), TextOptions(), student())
    (task,) = batch_of(data, packing=True)["tasks"]
    texts = [row.explain for row in data.rows] + [row.predict for row in data.rows]
    lengths = [len(text.input_ids) for text in texts]
    assert task["input_ids"].shape == task["position_ids"].shape == (1, sum(lengths))
    bounds = task["cu_seq_lens_q"].tolist()
    assert task["cu_seq_lens_q"].dtype == torch.int32 and bounds == [0, *torch.tensor(lengths).cumsum(0).tolist()]
    for text, start, stop in zip(texts, bounds[:-1], bounds[1:], strict=True):
        assert task["input_ids"][0, start:stop].tolist() == text.input_ids.tolist()
        assert task["position_ids"][0, start:stop].tolist() == list(range(stop - start))
    assert len(task["plan"]) == 6
    assert task["plan"].step_mask.sum(1).tolist() == [5, 5, 5, 0, 0, 0]
    (alone,) = batch_of(data, packing=True, explain=False)["tasks"]
    assert alone["input_ids"].tolist()[0] == task["input_ids"].tolist()[0][bounds[3] :]


def test_two_tokenizers_give_plans_of_one_shape():
    data = prepare(examples(4), TextOptions(), student(), Side(OTHER, "plain", None))
    batch = Collator(0, 0)([data[i] for i in range(4)])
    mine, other = batch["plan"], batch["teacher"]["plan"]
    assert (mine.step_mask.equal(other.step_mask), mine.word_mask.equal(other.word_mask)) == (True, True)
    assert (mine.num_steps, mine.num_words) == (5, 9)
    assert batch["tasks"][0]["input_ids"].shape[1] > batch["teacher"]["input_ids"].shape[1]


def test_prompt_is_what_training_saw():
    for template in ("plain", "chat"):
        TOKENIZER.chat_template = CHAT
        row = prepare(examples(1), TextOptions(), student(template=template)).rows[0]
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
    assert [row.id for row in data.rows] == ["p3"]
    assert data.skipped == {"no rationale": 1, "wrong answer": 1, "text longer than max_length": 1}
    assert "1 left out: no rationale" in data.summary()


def test_all_left_out_is_an_error():
    with pytest.raises(ValueError, match="all 4 examples were left out: 4 text longer than max_length"):
        prepare(examples(4), TextOptions(), student(80))


def test_cutting_keeps_both_sides_alike():
    options = TextOptions(too_long="cut")
    data = prepare(examples(4), options, student(100), Side(OTHER, "plain", None))
    whole = prepare(examples(4), options, student(None), Side(OTHER, "plain", None))
    for row, full in zip(data.rows, whole.rows, strict=True):
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
    assert [len(row.explain.words) for row in data.rows] == [0, 3]
    assert Collator(0)([data[0], data[1]])["plan"].word_mask.sum(1).tolist() == [0, 3]


def test_dataset_pickles_and_loads_in_workers():
    data = prepare(examples(8), TextOptions(), student())
    assert isinstance(pickle.loads(pickle.dumps(data)), DistillDataset)
    alone, workers = (list(DataLoader(data, 4, collate_fn=Collator(0), num_workers=n)) for n in (0, 1))
    for a, b in zip(alone, workers, strict=True):
        assert torch.equal(a["tasks"][0]["input_ids"], b["tasks"][0]["input_ids"])
        assert torch.equal(a["plan"].tokens, b["plan"].tokens)


def test_examples_are_read_when_they_are_asked_for(tmp_path):
    rows = tiny.problems(5)
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(json.dumps(row) for row in rows).encode())
    more = tiny.write_jsonl(tmp_path / "e.jsonl", [{**row, "id": "e" + row["id"], "question": "é?"} for row in rows])
    read = read_examples([path, more])
    assert [e.id for e in read] == [row["id"] for row in rows] + ["e" + row["id"] for row in rows]
    assert (read[3].question, read[-1].question, len(read[4:][:3])) == (rows[3]["question"], "é?", 3)
    assert [e.id for e in read[4:][::2]] == ["p4", "ep1", "ep3"]
    assert pickle.loads(pickle.dumps(read))[7] == read[7]
    with pytest.raises(ValueError, match=r"d.jsonl:1: id 'p0' is line 1 of .*d.jsonl's already"):
        read_examples([path, path])
    path.write_text(path.read_text().replace("Ann", "Bob"))
    assert read[7].id == "ep2"
    with pytest.raises(ValueError, match=r"d.jsonl: has changed since it was opened"):
        read[3]


def test_rows_are_the_same_kept_or_not(monkeypatch):
    options = TextOptions(too_long="cut")
    sides = (student(100), Side(OTHER, "plain", None))
    kept = prepare(examples(6), options, *sides)
    monkeypatch.setattr(data_module, "KEPT", 2)
    made = prepare(examples(6), options, *sides)
    for n in (5, 0, 3, 2, 1, 4):
        (a, _), (b, _) = kept[n], made[n]
        assert (a.id, a.spans, a.explain.steps, a.explain.words) == (b.id, b.spans, b.explain.steps, b.explain.words)
        for name in ("explain", "predict", "teacher"):
            assert getattr(a, name).input_ids.tolist() == getattr(b, name).input_ids.tolist()
    assert [row.id for row in made.rows[1:4]] == ["p1", "p2", "p3"]
    with pytest.raises(IndexError):
        made[6]


def test_memory_does_not_grow_with_the_data(tmp_path, monkeypatch):
    """18 bytes an example where a tokenized one would be 1 KB."""
    monkeypatch.setattr(data_module, "KEPT", 20)
    used = []
    for count in (60, 260):
        path = tiny.write_jsonl(tmp_path / f"{count}.jsonl", tiny.problems(count))
        prepare(read_examples(path)[:30], TextOptions(), student())  # what is made once
        tracemalloc.start()
        data = prepare(read_examples(path), TextOptions(), student())
        assert sum(len(row.predict.input_ids) > 0 for row, _ in (data[n] for n in range(0, count, 7))) == count // 7 + 1
        used.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert used[1] - used[0] < 60 * 200


@pytest.mark.parametrize("template", ["{question}", "{answer} {question}", "{question} {answer"])
def test_bad_predict_template(template):
    with pytest.raises(ValueError, match="predict_template: expected a text with"):
        prepare(examples(1), TextOptions(), student(), predict_template=template)
