"""Batches of tokenized examples: labels, padding, packing, and how they are moved."""

from __future__ import annotations

import pytest
import torch

from molsaki.batches.batch import Batch, TextBatch
from molsaki.batches.collator import Collator
from molsaki.batches.dataset import DistillDataset, prepare
from molsaki.batches.tokenized import TokenizerSpec
from molsaki.config import TextOptions
from tests.helpers.tiny import one_thread  # noqa: F401
from tests.helpers.training import OTHER, TOKENIZER, examples

STUDENT, TEACHER = TokenizerSpec(TOKENIZER, "plain", None), TokenizerSpec(OTHER, "plain", None)


def labelled(task: TextBatch, row: int = 0) -> str:
    labels = task.labels[row]
    return TOKENIZER.decode(labels[labels != -100])


def batch_of(data: DistillDataset, **options) -> Batch:
    return Collator(TOKENIZER.pad_token_id, OTHER.pad_token_id, **options)([data[i] for i in range(len(data))])


@pytest.mark.parametrize("packing", [False, True])
def test_labels_lie_on_the_rationale_and_the_answer(packing):
    batch = batch_of(prepare(examples(3), TextOptions(), STUDENT), packing=packing)
    assert len(batch.student) == (1 if packing else 2)
    texts = [labelled(task, n) for task in batch.student for n in range(len(task.counts))]
    expected = [" " + example.rationale + "<|end|>" for example in examples(3)]
    assert texts == expected + [" " + example.answer + "<|end|>" for example in examples(3)]
    assert batch.teacher is None
    assert batch.teacher_map is None


@pytest.mark.parametrize("packing", [False, True])
def test_index_is_where_each_label_is_predicted(packing):
    data = prepare(examples(4), TextOptions(), STUDENT, TEACHER)
    batch = batch_of(data, packing=packing, teacher_packing=packing)
    for task in (*batch.student, batch.teacher):
        assert torch.equal(task.input_ids.flatten()[task.index + 1], task.targets)
        assert torch.equal(task.labels[task.labels != -100], task.targets)
        assert task.counts == (task.labels != -100).sum(1).tolist()


def test_padded_tasks_are_right_padded():
    data = prepare(examples(4), TextOptions(), STUDENT, TEACHER)
    batch = batch_of(data)
    for task in (*batch.student, batch.teacher):
        ids, mask = task.input_ids, task.attention_mask
        assert (mask.diff(dim=1) <= 0).all()
        assert (ids[mask == 0] == 0).all()
    lengths = batch.student[0].attention_mask.sum(1)
    assert batch.plan.extents == tuple((lengths - 1).tolist())  # all but the end token
    assert batch.student[0].plan is batch.plan


def test_packed_texts_follow_one_another_without_padding():
    data = prepare(examples(3), TextOptions(), STUDENT)
    (task,) = batch_of(data, packing=True).student
    texts = [row.explain for row, _ in data] + [row.predict for row, _ in data]
    lengths = [len(text.input_ids) for text in texts]
    assert task.input_ids.shape == task.position_ids.shape == (1, sum(lengths))
    bounds = task.cu_seq_lens_q.tolist()
    assert task.cu_seq_lens_q.dtype == torch.int32 and bounds == [0, *torch.tensor(lengths).cumsum(0).tolist()]
    for text, start, stop in zip(texts, bounds[:-1], bounds[1:], strict=True):
        assert task.input_ids[0, start:stop].tolist() == text.input_ids.tolist()
        assert task.position_ids[0, start:stop].tolist() == list(range(stop - start))
    assert len(task.plan) == 6
    assert task.plan.step_mask.sum(1).tolist() == [5, 5, 5, 0, 0, 0]
    (alone,) = batch_of(data, packing=True, explain=False).student
    assert alone.input_ids.tolist()[0] == task.input_ids.tolist()[0][bounds[3] :]


def test_two_tokenizers_give_plans_of_one_shape():
    data = prepare(examples(4), TextOptions(), STUDENT, TEACHER)
    batch = Collator(0, 0)([data[i] for i in range(4)])
    mine, other = batch.plan, batch.teacher.plan
    assert (mine.step_mask.equal(other.step_mask), mine.word_mask.equal(other.word_mask)) == (True, True)
    assert (mine.num_steps, mine.num_words) == (5, 9)
    assert batch.student[0].input_ids.shape[1] > batch.teacher.input_ids.shape[1]


def test_a_batch_moves_as_a_whole():
    """accelerate and ``Trainer`` move a batch by ``to``; nothing stays behind, and nothing is copied without need."""
    data = prepare(examples(2), TextOptions(), STUDENT, TEACHER)
    batch = batch_of(data, packing=True, share_question=True)
    moved = batch.to("meta")
    assert (len(moved), moved.ids, moved.student[0].counts) == (2, batch.ids, batch.student[0].counts)
    for texts in (*moved.student, moved.teacher):
        given = [value for value in vars(texts).values() if isinstance(value, torch.Tensor)]
        assert len(given) >= 5 and all(value.is_meta for value in given)
        assert texts.plan.device.type == "meta"
    assert moved.student[0].shared_prefix.keys.is_meta
    assert batch.student[0].to("cpu").input_ids is batch.student[0].input_ids
    assert "input_ids" in batch and "labels" not in batch  # Trainer asks
    assert torch.equal(batch["input_ids"], batch.student[0].input_ids[0])


def test_a_batch_is_pinned_as_a_whole(monkeypatch):
    """Without a GPU no memory can be pinned: a stand-in marks the tensors."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    batch = batch_of(prepare(examples(2), TextOptions(), STUDENT), packing=True, share_question=True)
    again = batch.pin_memory()
    assert len(pinned) == 5 + 1 + (
        7 + 3 + 5
    )  # the plan's; rationale_steps; the texts', of their shared prefix and plan
    assert torch.equal(again.student[0].input_ids, batch.student[0].input_ids)


def test_the_model_gets_what_the_batch_has():
    data = prepare(examples(2), TextOptions(), STUDENT)
    (packed,), (padded, _) = batch_of(data, packing=True).student, batch_of(data).student
    assert padded.model_inputs().keys() == {"input_ids", "attention_mask", "use_cache"}
    assert packed.model_inputs().keys() == {"input_ids", "attention_mask", "position_ids", "cu_seq_lens_q", "use_cache"}
