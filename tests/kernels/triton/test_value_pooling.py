"""The kernels of pooled values against the float64 oracle, interpreted where there is no GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton

from molsaki_kernels import reference
from molsaki_kernels._triton import configs
from molsaki_kernels._triton.value_pooling import (
    ADD_TILES,
    pool_values_backward,
    pool_values_forward,
    pooling_config,
)
from molsaki_kernels.spec import PoolingOptions
from tests.helpers.budget import assert_within_budget

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
LENGTHS = (0, 17, 63, 130, 1)
EPS = 1e-6


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def case(form: str, dtype: torch.dtype, Hkv: int = 3, D: int = 24):
    """v, lengths and cu_seqlens of a padded batch, a full one, a packed one, and a packed one with padding inside."""
    lengths = torch.tensor(LENGTHS, device=DEVICE)
    if form == "full":
        return random(2, Hkv, 63, D, dtype=dtype), None, None
    if form == "padded":
        return random(len(LENGTHS), Hkv, max(LENGTHS), D, dtype=dtype), lengths, None
    bounds = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32, device=DEVICE)
    return random(1, Hkv, sum(LENGTHS), D, dtype=dtype), lengths // 2 if form == "packed-padded" else None, bounds


def eager(v, dpooled, lengths, mean, mean_heads, cu_seqlens, dtype):
    """pooled and dv of the oracle, computed in ``dtype``."""
    v = v.detach().to(dtype).requires_grad_()
    pooled = reference.pool_values(
        v, lengths, eps=EPS, pooling="mean" if mean else "sum", heads="mean" if mean_heads else "concat",
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    pooled.backward(dpooled.to(pooled.dtype))
    return pooled.detach(), v.grad


def check(v, lengths, mean, mean_heads, cu_seqlens):
    width = v.shape[3] * (1 if mean_heads else v.shape[1])
    N = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dpooled = random(N, width, seed=1)
    options = (lengths, cu_seqlens, PoolingOptions(EPS, mean, mean_heads))
    pooled = pool_values_forward(v, *options)
    dv = pool_values_backward(dpooled, v, *options)
    assert pooled.dtype == torch.float32 and dv.dtype == v.dtype
    oracle = eager(v, dpooled, lengths, mean, mean_heads, cu_seqlens, torch.float64)
    same = eager(v, dpooled, lengths, mean, mean_heads, cu_seqlens, v.dtype)
    assert_within_budget("pooled", pooled, oracle[0], same[0])
    assert_within_budget("dv", dv, oracle[1], same[1])


@pytest.mark.parametrize("mean_heads", [False, True], ids=["concat", "heads"])
@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("form", ["padded", "full", "packed", "packed-padded"])
def test_pool(form, mean, mean_heads):
    v, lengths, cu_seqlens = case(form, torch.float32)
    check(v, lengths, mean, mean_heads, cu_seqlens)


@pytest.mark.parametrize("mean_heads", [False, True], ids=["concat", "heads"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, mean_heads):
    v, lengths, cu_seqlens = case("packed-padded", dtype)
    check(v, lengths, False, mean_heads, cu_seqlens)


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_twice_the_same(form):
    v, lengths, cu_seqlens = case(form, torch.float32)
    options = (lengths, cu_seqlens, PoolingOptions(EPS, True, False))
    pooled = pool_values_forward(v, *options)
    assert torch.equal(pooled, pool_values_forward(v, *options))
    dv = pool_values_backward(pooled, v, *options)
    assert torch.equal(dv, pool_values_backward(pooled, v, *options))


@pytest.mark.parametrize("Hkv, D, M", [(1, 1, 1), (5, 80, 3), (8, 128, 17), (64, 128, 3), (7, 16, 300)])
def test_widths(Hkv, D, M):
    check(random(2, Hkv, M, D, dtype=torch.bfloat16), None, False, False, None)


def test_many_tiles():
    """The second stage needs several rounds, and so does the search of ``locate`` for a sequence."""
    rows = pooling_config(configs.arch_of(random(1)), 2000, 16).rows
    check(random(1, 1, rows * ADD_TILES + 40, 16), None, False, False, None)
    bounds = torch.arange(0, 131, dtype=torch.int32, device=DEVICE)
    check(random(1, 1, 130, 8), None, True, False, bounds)


@pytest.mark.parametrize("mean_heads", [False, True], ids=["concat", "heads"])
def test_strides(mean_heads):
    """Values as a projection returns them, a slice of fused projections, and one head expanded to three."""
    lengths = torch.tensor([130, 63], device=DEVICE)
    projected = random(2, 130, 3, 24).transpose(1, 2)
    fused = random(2, 130, 3, 72)[..., 48:].transpose(1, 2)
    expanded = random(2, 1, 130, 24).expand(2, 3, 130, 24)
    for v in (projected, fused, expanded):
        check(v, lengths, False, mean_heads, None)
    bounds = torch.tensor([0, 17, 130], dtype=torch.int32, device=DEVICE)
    check(fused[:1], None, False, mean_heads, bounds)
    dpooled = random(1, 1).expand(2, 24 if mean_heads else 72)
    options = (lengths, None, PoolingOptions(EPS, False, mean_heads))
    dv = pool_values_backward(dpooled, projected, *options)
    assert torch.equal(dv, pool_values_backward(dpooled.contiguous(), projected.contiguous(), *options))
    assert torch.equal(dv, pool_values_backward(dpooled, projected, lengths.repeat_interleave(2)[::2], *options[1:]))


@pytest.mark.parametrize("mean_heads", [False, True], ids=["concat", "heads"])
def test_padding_has_no_effect(mean_heads):
    """NaN in the padding changes nothing and gets a gradient of exactly zero; so do rows behind the last sequence."""
    v, lengths, _ = case("padded", torch.float32)
    padding = torch.arange(v.shape[2], device=DEVICE) >= lengths[:, None]
    dirty = v.masked_fill(padding[:, None, :, None], float("nan"))
    options = (lengths, None, PoolingOptions(EPS, False, mean_heads))
    assert torch.equal(pool_values_forward(dirty, *options), pool_values_forward(v, *options))
    dpooled = random(len(LENGTHS), 24 if mean_heads else 72).index_fill(
        0, torch.tensor([0], device=DEVICE), float("inf")
    )
    dv = pool_values_backward(dpooled, dirty, *options)
    assert dv.isfinite().all() and not dv.transpose(1, 2)[padding].any()

    v, _, bounds = case("packed", torch.float32)
    longer = torch.nn.functional.pad(v, (0, 0, 0, 40), value=float("nan"))
    options = (None, bounds, PoolingOptions(EPS, True, mean_heads))
    assert torch.equal(pool_values_forward(longer, *options), pool_values_forward(v, *options))
    dpooled = random(len(LENGTHS), 24 if mean_heads else 72)
    dv = pool_values_backward(dpooled, longer, *options)
    assert torch.equal(dv[:, :, : v.shape[2]], pool_values_backward(dpooled, v, *options))
    assert not dv[:, :, v.shape[2] :].any()


def test_extremes():
    """Lengths past the end are cut there, eps dominates where rows vanish, and large rows keep their direction."""
    v, _, _ = case("full", torch.float32)
    beyond = torch.full((v.shape[0],), 1000, device=DEVICE)
    options = PoolingOptions(EPS, True, False)
    none = pool_values_forward(v, None, None, options)
    assert torch.equal(pool_values_forward(v, beyond, None, options), none)
    check(v * 1e-25, None, False, False, None)
    check(torch.zeros_like(v), None, False, False, None)
    check(v.clamp(-1, 1) * 1e15, None, False, False, None)


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (3, 2, 0, 8), (3, 0, 5, 8)])
def test_empty(shape):
    v = random(*shape)
    options = PoolingOptions(EPS, True, False)
    pooled = pool_values_forward(v, None, None, options)
    assert torch.equal(pooled, torch.zeros(shape[0], shape[1] * shape[3], device=DEVICE))
    assert pool_values_backward(pooled, v, None, None, options).shape == v.shape
    bounds = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    nothing = random(1, 2, 0, 8)
    assert torch.equal(pool_values_forward(nothing, None, bounds, options), torch.zeros(2, 16, device=DEVICE))
    no_sequence = random(1, 2, 4, 8)
    assert pool_values_forward(no_sequence, None, bounds[:1], options).shape == (0, 16)
    assert not pool_values_backward(random(0, 16), no_sequence, None, bounds[:1], options).any()


def test_addresses_are_64_bit(monkeypatch):
    """Two heads 2**31 elements apart; only a few of the elements are accessed."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # of 4 GB
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE).as_strided((1, 2, 3, 16), (0, 2**31, 16, 1))
    far.copy_(random(1, 2, 3, 16))
    near = far.contiguous()
    for mean_heads in (False, True):
        options = (None, None, PoolingOptions(EPS, False, mean_heads))
        pooled = pool_values_forward(far, *options)
        assert torch.equal(pooled, pool_values_forward(near, *options))
        dpooled = random(*pooled.shape, seed=1)
        dv = pool_values_backward(dpooled, far, *options)
        assert torch.equal(dv, pool_values_backward(dpooled, near, *options))
