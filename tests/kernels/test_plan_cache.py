"""Tests the cache of tensors derived from a plan: computed once per plan, again after a change, freed with the plan."""

import dataclasses
import gc

import pytest
import torch

from molsaki_kernels import StepPlan, reference, stepwise_attention, stepwise_map
from molsaki_kernels import _plan_cache as plan_cache
from molsaki_kernels.attention_map import torch_blocks
from molsaki_kernels.spec import PlanTensors


def plan_of(words=((1,), (4, 5))):
    return StepPlan.from_spans([[(0, 3), (3, 7)]] * 2, [[list(word) for word in words]] * 2)


def inputs(M=9, heads=2):
    g = torch.Generator().manual_seed(M)
    return [torch.randn(2, heads, M, 16, generator=g) for _ in range(3)]


def check(plan, M=9, **options):
    maps = stepwise_attention(*inputs(M), plan, **options)[1]
    torch.testing.assert_close(maps, reference.stepwise_attention(*inputs(M), plan, **options)[1])


def test_blocks_are_computed_once_for_all_layers(monkeypatch, without_native):
    created = []

    class Counted(torch_blocks.BlockedSequences):
        def __init__(self, *arguments):
            created.append(self)
            super().__init__(*arguments)

    monkeypatch.setattr(torch_blocks, "BlockedSequences", Counted)
    plan = plan_of()
    q, k, v = (t.requires_grad_() for t in inputs())
    for _ in range(3):
        out, maps = stepwise_attention(q, k, v, plan)
        (out.sum() + maps.square().sum()).backward()
    assert len(created) == 1


@pytest.mark.usefixtures("cpu_map")
@pytest.mark.parametrize("change", [{"M": 12}, {"causal": False}, {"window": 3}, {"head_reduction": "none"}])
def test_another_shape_or_option_has_its_own_entry(change):
    plan = plan_of()
    check(plan)
    check(plan, **change)
    check(plan)


@pytest.mark.usefixtures("cpu_map")
def test_a_plan_changed_in_place():
    plan = plan_of()
    check(plan)
    plan.tokens[:, 0] = 2
    check(plan)
    plan.steps[:, 0, 1] = 2
    check(plan)
    plan.word_of_token[:, 0] = 1
    check(plan)


@pytest.mark.usefixtures("cpu_map")
def test_plans_share_no_entry():
    first, second = plan_of(), plan_of(((2,), (6,)))
    for _ in range(2):
        check(first)
        check(second)


@pytest.mark.usefixtures("cpu_map")
def test_entries_are_freed_with_their_plan():
    gc.collect()
    before = len(plan_cache._cache)
    plan = plan_of()
    q, k, _ = inputs()
    stepwise_map(q, k, torch.full((2, 2, 9), 3.0), plan)
    check(plan)
    assert len(plan_cache._cache) == before + 1
    del plan
    gc.collect()
    assert len(plan_cache._cache) == before


def test_a_plan_whose_tensors_are_one_object_is_freed():
    numbers = torch.zeros(1, 1, dtype=torch.int64)
    before = len(plan_cache._cache)
    plan = PlanTensors(torch.zeros(1, 1, 2, dtype=torch.int64), numbers, numbers, 1)
    assert plan_cache.cached(plan, ("kept",), lambda: 5) == plan_cache.cached(plan, ("kept",), lambda: 6) == 5
    assert len(plan_cache._cache) == before + 1
    del plan, numbers
    gc.collect()
    assert len(plan_cache._cache) == before


@pytest.mark.usefixtures("cpu_map")
def test_a_plan_of_which_one_tensor_is_an_inference_tensor():
    plan = plan_of()
    with torch.inference_mode():
        steps = plan.steps.clone()
    plan = dataclasses.replace(plan, steps=steps)
    check(plan)
    plan.tokens[:, 0] = 2
    check(plan)


def test_inference_mode_plan():
    with torch.inference_mode():
        check(plan_of())


@pytest.mark.usefixtures("cpu_map")
@pytest.mark.parametrize("options", [{}, {"engine": "sdpa", "map_engine": "widened"}], ids=["auto", "widened"])
def test_an_inference_mode_plan_changed_in_place(options):
    """Inference tensors have no version that would tell."""
    with torch.inference_mode():
        plan = plan_of()
        q, k, v = inputs()
        for change in (plan.tokens, plan.steps[:, 0], plan.word_of_token):
            stepwise_attention(q, k, v, plan, **options)
            change[:, 0] = 1
            maps = stepwise_attention(q, k, v, plan, **options)[1]
            torch.testing.assert_close(maps, reference.stepwise_attention(q, k, v, plan)[1])


def test_an_unknown_state_is_not_kept():
    """Whether an inference tensor on a GPU was changed is not known without waiting for it."""
    with torch.inference_mode():
        numbers = [torch.zeros(1, 1, dtype=torch.int64, device="meta") for _ in range(3)]
    plan = PlanTensors(*numbers, 1)
    assert plan_cache.cached(plan, (), object) is not plan_cache.cached(plan, (), object)


def test_blocks_that_are_not_kept(monkeypatch):
    monkeypatch.setattr(torch_blocks, "LARGEST_KEPT", 0)
    for options in ({}, {"window": 4}, {"causal": False}):
        plan = plan_of()
        check(plan, **options)
        check(plan, **options)
