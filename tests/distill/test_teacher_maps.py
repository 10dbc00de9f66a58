"""The teacher's maps from a forward without logits, and the depth and width that a probe finds."""

from __future__ import annotations

import torch

from molsaki.teacher.teacher_maps import probe, teacher_maps
from molsaki_kernels import StepPlan
from tests.helpers import tiny
from tests.helpers.tiny import one_thread  # noqa: F401

TEACHER = tiny.model(3, seed=1)


def test_no_logits_are_computed(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the teacher's head ran")

    monkeypatch.setattr(TEACHER.lm_head, "forward", fail)
    plan = StepPlan.from_spans([[(0, 3)]], [[[0], [1]]])
    assert teacher_maps(TEACHER, torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3), plan).shape == (1, 3, 1, 2)


def test_probe():
    assert probe(TEACHER) == (3, 3, 16)
    assert probe(TEACHER, "mean") == (3, 3, 8)
    assert probe(TEACHER, map_heads="each") == (3 * TEACHER.config.num_attention_heads, 3, 16)
    assert TEACHER.training is False
