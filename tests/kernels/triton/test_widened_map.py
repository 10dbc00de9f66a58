"""Compares the kernels of the map by widened values with the PyTorch operations, which are tested with the oracle."""

from __future__ import annotations

import pytest
import torch
import triton

from molsaki_kernels import StepPlan, widened_values
from molsaki_kernels._triton import widened_map
from tests.helpers.budget import assert_within_budget

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
LENGTHS = [70, 41, 1]
# Rows in no step, empty steps, more steps than a block of four, padding, steps longer than a tile of rows.
STEPS = [[(2, 5), (5, 5), (7, 8), (8, 9), (10, 11), (30, 70)], [(0, 41)], []]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(widened_map, "STEPS", 4)


def case(dtype, packed, v_columns=16, W=5, columns=24, H=3, transposed=False):
    g = torch.Generator().manual_seed(0)
    B, M = (1, sum(LENGTHS)) if packed else (3, max(LENGTHS))
    shape = (B, M, H, columns) if transposed else (B, H, M, columns)
    wide = torch.randn(shape, generator=g).to(DEVICE, dtype)
    wide = wide.transpose(1, 2) if transposed else wide
    plan = StepPlan.from_spans(STEPS, [[[0]]] * 3, device=DEVICE)
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).to(DEVICE, torch.int32) if packed else None
    return wide, cu, plan.steps, g


def in_pytorch(function, *arguments, dtype=torch.float64):
    """On the CPU, where the kernels are not used."""
    moved = [t.cpu() if isinstance(t, torch.Tensor) else t for t in arguments]
    return function(*[t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in moved])


def check_sums(wide, v_columns, W, cu, steps, per_head):
    arguments = (wide, v_columns, W, cu, steps, per_head)
    exact, eager = (in_pytorch(widened_values.split, *arguments, dtype=d)[1] for d in (torch.float64, torch.float32))
    found = widened_map.word_sums(*arguments)
    assert found.dtype == torch.float32
    assert_within_budget("maps", found.cpu(), exact, eager)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_word_sums(monkeypatch, dtype, packed, per_head):
    for heads, transposed, W in ((3, True, 5), (2, False, 8)):
        monkeypatch.setattr(widened_map, "heads_per_program", lambda arch, H, programs, heads=heads: heads)
        wide, cu, steps, _ = case(dtype, packed, W=W, transposed=transposed)
        check_sums(wide, 16, W, cu, steps, per_head)


@pytest.mark.parametrize("with_dout", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_widened_dout(dtype, packed, per_head, with_dout):
    for v_columns, W, columns, transposed in ((16, 5, 24, True), (0, 24, 24, False)):
        wide, cu, steps, g = case(dtype, packed, columns=columns, transposed=transposed)
        B, H, M, _ = wide.shape
        shape = (len(steps), *((H,) if per_head else ()), steps.shape[1], W)
        dmaps = torch.randn(shape, generator=g).to(DEVICE)
        dout = torch.randn((B, M, H, v_columns), generator=g).to(DEVICE, dtype).transpose(1, 2) if with_dout else None
        arguments = (dout, dmaps, wide, v_columns, cu, steps, per_head)
        found = widened_map.widened_dout(*arguments)
        assert found.stride() == wide.stride() and found.dtype == dtype
        exact = in_pytorch(widened_values.split_gradient, *arguments)
        torch.testing.assert_close(found.cpu(), exact.to(dtype))
        if with_dout:
            assert torch.equal(found[..., :v_columns], dout)


def test_wide_blocks():
    """More words than a program holds at once, and more columns of v."""
    wide, cu, steps, g = case(torch.float32, False, columns=300)
    check_sums(wide, 136, 150, cu, steps, False)
    dmaps = torch.randn(3, steps.shape[1], 150, generator=g).to(DEVICE)
    dout = torch.randn(*wide.shape[:3], 136, generator=g).to(DEVICE)
    arguments = (dout, dmaps, wide, 136, cu, steps, False)
    exact = in_pytorch(widened_values.split_gradient, *arguments)
    torch.testing.assert_close(widened_map.widened_dout(*arguments).cpu(), exact.float())


@pytest.mark.parametrize("per_head", [False, True])
def test_columns_that_are_not_contiguous(per_head):
    """O' has the layout of q where it is as wide, and q may have any."""
    wide, cu, steps, g = case(torch.float32, False)
    strided = wide.mT.contiguous().mT
    sums = (widened_map.word_sums(x, 16, 5, cu, steps, per_head) for x in (wide, strided))
    assert torch.equal(*sums)
    dmaps = torch.randn(len(steps), *((3,) if per_head else ()), steps.shape[1], 5, generator=g).to(DEVICE)
    dout = torch.randn(*wide.shape[:3], 16, generator=g).to(DEVICE)
    found, wanted = (widened_map.widened_dout(dout, dmaps, x, 16, cu, steps, per_head) for x in (strided, wide))
    assert torch.equal(found, wanted) and found.stride() == strided.stride()
