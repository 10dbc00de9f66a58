"""Padding may hold any value, NaN too, and scales any finite one."""

from __future__ import annotations

import math

import pytest
import torch

import molsaki_kernels as mk
from molsaki_kernels import StepPlan, reference
from molsaki_kernels._native import build
from tests.helpers.tiny import one_thread  # noqa: F401
from tests.kernels.test_attention import ENGINES, compare, inputs

# Of three sequences of 20 tokens the first tokens, among them the one that padding of the plan refers to, and the last
# belong to no step.
STEPS, WORDS = [[(5, 9), (9, 16)], [(6, 12)], [(4, 15)]], [[[3], [6, 7]], [[5]], [[4], [8]]]


def case(packed):
    g = torch.Generator().manual_seed(0)
    B, M = (1, 60) if packed else (3, 20)
    tensors = [torch.randn(B, heads, M, 16, generator=g) for heads in (4, 2, 2)]
    cu = torch.tensor([0, 20, 40, 60], dtype=torch.int32) if packed else None
    lse = torch.rand(B, 4, M, generator=g) + 2
    return tensors, lse, StepPlan.from_spans(STEPS, WORDS), cu


def poisoned(tensor, packed, needed):
    """``tensor (B, H, M, ...)`` with NaN at all tokens but those that ``needed`` names for each sequence."""
    tensor = tensor.clone()
    for n, tokens in enumerate(needed):
        for t in set(range(20)) - set(tokens):
            row = tensor[0, :, 20 * n + t] if packed else tensor[n, :, t]
            row.fill_(math.nan)
    return tensor


IN_STEPS = [range(steps[0][0], steps[-1][1]) for steps in STEPS]
KEY_TOKENS = [[t for word in words for t in word] for words in WORDS]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "options", [{}, dict(window=5), dict(causal=False), dict(head_reduction="none"), dict(softcap=3.0)], ids=str
)
@pytest.mark.parametrize("engine", ["torch", "native"])
def test_map(engine, options, packed):
    """Queries in no step and tokens in no word have no effect on the map and its gradients."""
    if engine == "native" and (build.why_not() or "softcap" in options):
        pytest.skip(build.why_not() or "it has no softcap")
    (q, k, _), lse, plan, cu = case(packed)
    found = []
    for dirty in (False, True):
        leaves = [q, k, lse]
        if dirty:
            needed = (IN_STEPS, KEY_TOKENS, IN_STEPS)
            leaves = [poisoned(x, packed, tokens) for x, tokens in zip(leaves, needed, strict=True)]
        leaves = [x.clone().requires_grad_() for x in leaves]
        maps = mk.stepwise_map(*leaves, plan, cu_seqlens=cu, engine=engine, **options)
        grads = torch.autograd.grad((maps * torch.linspace(-1, 1, maps.numel()).view(maps.shape)).sum(), leaves)
        found.append((maps, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_split_of_widened_values(packed, per_head):
    _, _, plan, cu = case(packed)
    wide = torch.randn(1, 4, 60, 24) if packed else torch.randn(3, 4, 20, 24)
    call = (16, plan.num_words, cu, plan.steps, per_head)
    clean = torch.ops.molsaki.split_widened(wide, *call)[1]
    dirty = torch.ops.molsaki.split_widened(poisoned(wide, packed, IN_STEPS), *call)[1]
    torch.testing.assert_close(clean, dirty, rtol=0, atol=0)


@pytest.mark.parametrize("engine", ["torch", "triton"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pooling, heads", [("sum", "concat"), ("mean", "mean")])
def test_pooled_values(engine, packed, pooling, heads):
    lengths = torch.tensor([20, 6, 0])
    (_, _, v), _, _, cu = case(packed)
    found = []
    for x in (v, poisoned(v, packed, map(range, lengths.tolist()))):
        x = x.clone().requires_grad_()
        options = dict(pooling=pooling, heads=heads, cu_seqlens=cu)
        pooled = mk.pool_values(x, lengths, engine=engine, **options)
        (dx,) = torch.autograd.grad(pooled.square().sum(), x)
        torch.testing.assert_close(reference.pool_values(x, lengths, **options), pooled)
        found.append((pooled, dx))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not found[1][1][0, :, 26:40].any() if packed else not found[1][1][1, :, 6:].any()


def test_values_that_are_all_padding():
    v = torch.full((2, 2, 5, 4), math.nan, requires_grad=True)
    pooled = mk.pool_values(v, torch.tensor([0, 0]))
    (dv,) = torch.autograd.grad(pooled.sum(), v)
    assert not pooled.any() and not dv.any()
    zeros = mk.pool_values(torch.zeros(1, 2, 5, 4), torch.tensor([0]), eps=0.0)
    assert not zeros.any()
    for eps in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="eps: expected a finite number of at least 0"):
            mk.pool_values(v, eps=eps)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 1e-30])
@pytest.mark.parametrize(
    "options",
    [{}, dict(causal=False), dict(softcap=2.0), dict(window=5, causal=False), dict(packed=True, window=5)],
    ids=str,
)
@pytest.mark.parametrize("engine", ENGINES)
def test_scales(engine, options, scale):
    if engine == "native" and build.why_not():
        pytest.skip(build.why_not())
    causal = options.get("causal", True)
    if engine == "sdpa" and ("softcap" in options or scale == 0 or (scale < 0 and causal)):
        with pytest.raises(ValueError, match="softcap|scale of"):
            compare(engine, "some empty", options | dict(scale=scale), torch.float32)
        return
    compare(engine, "some empty", options | dict(scale=scale), torch.float32)


@pytest.mark.parametrize("option", ["scale", "softcap"])
def test_numbers_that_are_not_finite(option):
    (q, k, v), plan, _ = inputs("some empty", torch.float32)
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=f"{option}: expected a (positive, )?finite number"):
            mk.stepwise_attention(q, k, v, plan, **{option: value})
        with pytest.raises(ValueError, match=f"{option}: expected a (positive, )?finite number"):
            mk.stepwise_map(q, k, torch.zeros(q.shape[:3]), plan, **{option: value})
