"""Tests StepPlan: construction, indexing, concatenation, collation, pickling and refusals."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.utils.data import default_collate

from molsaki_kernels import StepPlan

STEPS = [[(0, 4), (4, 4), (6, 9)], [], [(2, 3)]]
WORDS = [[[8], [1, 0]], [[5]], []]


def test_from_spans():
    plan = StepPlan.from_spans(STEPS, WORDS)
    assert len(plan) == 3 and (plan.num_steps, plan.num_words, plan.num_tokens) == (3, 2, 3)
    assert plan.steps.tolist() == [[[0, 4], [4, 4], [6, 9]], [[0, 0]] * 3, [[2, 3], [0, 0], [0, 0]]]
    assert plan.tokens.tolist() == [[0, 1, 8], [5, 0, 0], [0, 0, 0]]
    assert plan.word_of_token.tolist() == [[1, 1, 0], [0, -1, -1], [-1, -1, -1]]
    assert plan.step_mask.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    assert plan.word_mask.tolist() == [[True, True], [True, False], [False, False]]
    assert plan.extents == (9, 6, 3)
    assert "sequences=3" in repr(plan)


def test_empty_plans():
    assert len(StepPlan.from_spans([], [])) == 0
    plan = StepPlan.from_spans([[]], [[]])
    assert plan.steps.shape == (1, 0, 2) and plan.tokens.shape == (1, 0) and plan.extents == (0,)
    plan = StepPlan.from_spans([[(0, 3)]], [[[], [1]]])  # a word without tokens keeps its column
    assert plan.word_mask.tolist() == [[True, True]] and plan.word_of_token.tolist() == [[1]]


def same(a: StepPlan, b: StepPlan) -> bool:
    tensors = ("steps", "tokens", "word_of_token", "step_mask", "word_mask")
    return a.extents == b.extents and all(torch.equal(getattr(a, t), getattr(b, t)) for t in tensors)


def test_cat_index_and_iteration():
    plan = StepPlan.from_spans(STEPS, WORDS)
    parts = [StepPlan.from_spans([s], [w]) for s, w in zip(STEPS, WORDS, strict=True)]
    assert same(StepPlan.cat(parts), plan)
    assert same(StepPlan.cat(list(plan)), plan)
    assert same(plan[1:], StepPlan.cat([plan[1], plan[2]]))
    assert plan[-1].extents == (3,)
    with pytest.raises(IndexError, match="3 sequences"):
        plan[3]
    with pytest.raises(TypeError, match="int or a slice"):
        plan[[0, 1]]
    with pytest.raises(ValueError, match="at least one"):
        StepPlan.cat([])
    with pytest.raises(TypeError, match="StepPlan objects"):
        StepPlan.cat([plan, 3])


def test_collate_pickle_and_device():
    plan = StepPlan.from_spans(STEPS, WORDS)
    assert same(default_collate([plan[0], plan[1], plan[2]]), plan)
    batch = default_collate([{"plan": plan[n], "x": torch.zeros(2)} for n in range(3)])
    assert same(batch["plan"], plan) and batch["x"].shape == (3, 2)
    assert same(pickle.loads(pickle.dumps(plan)), plan)
    assert plan.to("cpu") is plan
    meta = plan.to("meta", non_blocking=True)
    assert meta.device.type == "meta" and meta.extents == plan.extents
    assert StepPlan.from_spans(STEPS, WORDS, device="meta").device.type == "meta"


def test_numpy_and_tensor_indices():
    plan = StepPlan.from_spans([[tuple(torch.tensor([0, 4]))]], [[[torch.tensor(3)]]])
    assert plan.extents == (4,)


@pytest.mark.parametrize(
    "steps, words, kind, message",
    [
        ([[]], [], ValueError, "steps and words: expected one entry per sequence in both, got 1 and 0"),
        ([[(0, 2, 3)]], [[]], ValueError, r"steps\[0\]\[0\]: expected a \(start, stop\) pair"),
        ([[5]], [[]], ValueError, r"steps\[0\]\[0\]: expected a \(start, stop\) pair"),
        ([[(3, 2)]], [[]], ValueError, r"steps\[0\]\[0\]: expected 0 <= start <= stop"),
        ([[(-1, 2)]], [[]], ValueError, "0 <= start"),
        ([[(0, 3), (2, 5)]], [[]], ValueError, r"steps\[0\]\[1\]: expected disjoint, ascending"),
        ([[(0.0, 3)]], [[]], TypeError, r"steps\[0\]\[0\]: expected an int, got 0.0"),
        ([[]], [[3]], TypeError, r"words\[0\]\[0\]: expected a list of token indices"),
        ([[]], [["ab"]], TypeError, r"words\[0\]\[0\]"),
        ([[]], [[[1.5]]], TypeError, r"words\[0\]\[0\]: expected an int"),
        ([[]], [[[-1]]], ValueError, r"words\[0\]\[0\]: expected token indices >= 0"),
        ([[], []], [[], [[1], [2, 1]]], ValueError, r"words\[1\]\[1\]: token 1 is in word 0 already"),
        ([[]], [[[1, 1]]], ValueError, "token 1 is in word 0 already"),
    ],
)
def test_bad_input(steps, words, kind, message):
    with pytest.raises(kind, match=message):
        StepPlan.from_spans(steps, words)
