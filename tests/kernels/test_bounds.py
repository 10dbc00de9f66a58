"""Tests how often a packed call reads cu_seqlens on the host; inputs that derive from others share what was read."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import molsaki_kernels as mk
from molsaki_kernels.attention_map import MAP_ENGINES
from molsaki_kernels.spec import AttentionInputs, AttentionOptions

CU = (0, 20, 33)
PLAN = mk.StepPlan.from_spans([[(0, 9), (9, 20)], [(2, 13)]], [[[1], [4, 5]], [[3], [6]]])


@pytest.fixture
def reads(monkeypatch):
    """One entry for each time that a tensor with the numbers of ``CU`` is read."""
    found, tolist = [], torch.Tensor.tolist

    def counted(self):
        numbers = tolist(self)
        if numbers == list(CU):
            found.append(self)
        return numbers

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    return found


def packed(head_dim: int):
    generator = torch.Generator().manual_seed(head_dim)
    q, k, v = (torch.randn(1, heads, CU[-1], head_dim, generator=generator).requires_grad_() for heads in (4, 2, 2))
    return q, k, v, torch.tensor(CU, dtype=torch.int32)


@pytest.mark.parametrize("source", ["out and map", "map alone", "out alone"])
@pytest.mark.parametrize("head_dim", [16, 24])  # 24 is padded for engine native
@pytest.mark.parametrize("map_engine", ["auto", "torch", "native"])
@pytest.mark.parametrize("engine", ["native", "sdpa", "eager"])
def test_once_in_the_forward_and_once_in_the_backward(reads, engine, map_engine, head_dim, source):
    if engine == "native" and map_engine != "auto":
        pytest.skip("it computes the map itself")
    if "native" in (engine, map_engine) and not mk.engines()["native"].ready:
        pytest.skip("the library is not available")
    if map_engine == "native" and head_dim % 16:
        pytest.skip("the map in C takes multiples of 16")
    q, k, v, cu = packed(head_dim)
    out, maps = mk.stepwise_attention(q, k, v, PLAN, cu_seqlens=cu, engine=engine, map_engine=map_engine)
    assert len(reads) == 1
    reads.clear()
    loss = out.sum() * (source != "map alone") + maps.square().sum() * (source != "out alone")
    loss.backward()
    assert len(reads) == 1
    assert q.grad.isfinite().all() and k.grad.any()


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_the_map_alone(reads, engine):
    q, k, _, cu = packed(16)
    if engine == "native" and MAP_ENGINES[engine].why_not(q, AttentionOptions(True, 0.25)) is not None:
        pytest.skip("the library is not available")
    maps = mk.stepwise_map(q, k, torch.zeros(1, 4, CU[-1]), PLAN, cu_seqlens=cu, engine=engine)
    assert len(reads) == 1
    maps.square().sum().backward()
    assert len(reads) == 2


def test_nothing_is_read_before_it_is_needed(reads):
    """On a GPU it would wait for the device: the map's Triton kernels and flash attention need no number of it."""
    q, k, v, cu = packed(16)
    inputs = AttentionInputs(q, k, v, None, cu)
    inputs.map_inputs(torch.zeros(1, 4, CU[-1]))
    dataclasses.replace(inputs, q=q + 1)
    inputs.request(AttentionOptions(True, 0.25))
    assert not reads


def test_derived_inputs_share_what_was_read(reads):
    q, k, v, cu = packed(16)
    inputs = AttentionInputs(q, k, v, None, cu)
    derived = dataclasses.replace(inputs, q=q + 1)
    assert inputs.map_inputs(torch.zeros(1, 4, CU[-1])).bounds == derived.bounds == inputs.bounds == CU
    assert len(reads) == 1
    assert dataclasses.replace(inputs, cu_seqlens=cu[:2]).bounds == CU[:2]  # not those of the other tensor
    assert AttentionInputs(q, k, v).bounds == (0, CU[-1])


def test_without_a_plan(reads):
    q, k, v, cu = packed(16)
    empty = mk.StepPlan.from_spans([[], []], [[], []])
    for engine in ("sdpa", "eager"):
        reads.clear()
        out, _ = mk.stepwise_attention(q, k, v, empty, cu_seqlens=cu, engine=engine)
        out.sum().backward()
        assert len(reads) == 2
