"""Compares the torch engine of pool_values (Eq. 5) with the float64 oracle."""

from __future__ import annotations

import itertools

import pytest
import torch

from molsaki_kernels import pool_values, reference
from molsaki_kernels.value_pooling import torch as torch_pooling
from tests.helpers.budget import assert_within_budget

CASES = list(itertools.product(["sum", "mean"], ["concat", "mean"], ["none", "lengths", "packed", "packed lengths"]))


def arguments(kind: str, dtype):
    g = torch.Generator().manual_seed(0)
    v = torch.randn(1 if "packed" in kind else 4, 3, 63, 20, generator=g, dtype=torch.float64).to(dtype)
    given = {}
    if "packed" in kind:
        given["cu_seqlens"] = torch.tensor([0, 17, 17, 18, 63], dtype=torch.int32)
    if "lengths" in kind:
        given["lengths"] = torch.tensor([9, 0, 1, 45] if "packed" in kind else [63, 0, 1, 17])
    return v, given


@pytest.mark.parametrize("pooling, heads, kind", CASES)
def test_against_the_oracle(pooling, heads, kind, monkeypatch):
    monkeypatch.setattr(torch_pooling, "ROWS", 13)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        v, given = arguments(kind, dtype)
        results = []
        for function, working in (
            (reference.pool_values, torch.float64),
            (reference.pool_values, dtype),
            (pool_values, dtype),
        ):
            x = v.to(working).requires_grad_()
            pooled = function(x, pooling=pooling, heads=heads, **given)
            weight = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            results.append((pooled, torch.autograd.grad((pooled.double() * weight).sum(), x)[0]))
        (h, dv), (h_eager, dv_eager), (h_got, dv_got) = results
        assert h_got.dtype == torch.promote_types(dtype, torch.float32) and dv_got.dtype == dtype
        assert_within_budget("h", h_got, h, h_eager)
        assert_within_budget("dv", dv_got, dv, dv_eager)
        if "lengths" in given and "packed" not in kind:
            assert not dv_got[1].any() and not dv_got[3, :, 17:].any()


def test_example_computed_by_hand():
    v = torch.tensor([[[[3.0, 4.0], [0.0, 0.0], [5.0, 0.0]]]])  # one head, three tokens
    norm = [3 / 12.5**0.5 + 5 / 12.5**0.5, 4 / 12.5**0.5]  # [3, 4] / sqrt(25 / 2) + 0 + [5, 0] / sqrt(25 / 2)
    torch.testing.assert_close(pool_values(v), torch.tensor([norm]))
    torch.testing.assert_close(pool_values(v, pooling="mean"), torch.tensor([norm]) / 3)
    torch.testing.assert_close(pool_values(v, torch.tensor([2])), torch.tensor([[3.0, 4.0]]) / 12.5**0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_stays_in_its_sequence(bad):
    v = torch.ones(1, 1, 6, 4)
    v[0, 0, 4] = bad
    v.requires_grad_()
    pooled = pool_values(v, cu_seqlens=torch.tensor([0, 2, 4, 6], dtype=torch.int32))
    torch.testing.assert_close(pooled[:2], torch.full((2, 4), 2.0))
    assert not pooled[2].isfinite().any()
    pooled.sum().backward()
    assert v.grad[0, 0, :4].isfinite().all()


@pytest.mark.parametrize("bounds", [None, [0, 20, 27, 50]])
def test_autocast_has_no_effect(bounds):
    results = []
    for cast in (False, True):
        v = torch.randn(1, 3, 50, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            pooled = pool_values(v, cu_seqlens=None if bounds is None else torch.tensor(bounds, dtype=torch.int32))
            pooled.square().sum().backward()
        results.append((pooled, v.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_opcheck_and_strides():
    v, given = arguments("lengths", torch.float32)
    strided = v.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(pool_values(strided, **given), pool_values(v, **given))
    for tensor in (v, strided):
        torch.library.opcheck(
            torch.ops.molsaki.pool_values,
            (tensor.requires_grad_(), given["lengths"], None, 1e-6, False, False, "torch"),
        )


@pytest.mark.parametrize(
    "given, kind, message",
    [
        (dict(v=torch.zeros(2, 3)), ValueError, r"v: expected a floating \(B, Hkv, M, D\)"),
        (dict(v=torch.zeros(2, 1, 3, 4).long()), ValueError, "v: expected a floating"),
        (dict(pooling="max"), ValueError, 'pooling: expected "sum" or "mean"'),
        (dict(heads="none"), ValueError, 'heads: expected "concat" or "mean"'),
        (dict(lengths=torch.zeros(3).long()), ValueError, r"lengths: expected \(2,\) integers"),
        (dict(lengths=[3, 3]), TypeError, r"lengths: expected a tensor \(2,\) of integers, got list"),
        (dict(lengths=torch.zeros(2)), ValueError, "lengths: expected .* integers"),
        (dict(lengths=torch.zeros(2, device="meta").long()), ValueError, "lengths: expected on v's device"),
        (dict(cu_seqlens=torch.tensor([0, 3], dtype=torch.int32)), ValueError, "v: expected"),
        (dict(engine="cuda"), ValueError, "engine: expected"),
    ],
)
def test_bad_input(given, kind, message):
    with pytest.raises(kind, match=message):
        pool_values(**dict(v=torch.zeros(2, 1, 3, 4)) | given)
