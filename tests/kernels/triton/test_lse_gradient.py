"""The kernel that folds dlse into O: rowsum(dO' * O') = rowsum(dO * O) - dlse, up to the rounding of the dtype."""

from __future__ import annotations

import pytest
import torch
import triton

from molsaki_kernels._triton.lse_gradient import fold_dlse_into_out
from molsaki_kernels.attention import lse_gradient as pytorch
from tests.helpers.budget import assert_within_budget

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def case(dtype, M=130, D=80, B=1, H=3, zeros="half", magnitude=1.0):
    generator = torch.Generator().manual_seed(0)
    out = torch.randn(B, H, M, D, generator=generator).to(dtype)
    dout = (torch.randn(B, H, M, D, generator=generator) * magnitude).to(dtype)
    dlse = torch.randn(B, H, M, generator=generator) * magnitude
    dout[:, :, {"none": slice(0), "half": slice(None, None, 2), "all": slice(None)}[zeros]] = 0
    return out.to(DEVICE), dout.to(DEVICE), dlse.to(DEVICE)


def delta(out, dout):
    return (out.double() * dout.double()).sum(-1)


def check(out, dout, dlse):
    folded, upstream = fold_dlse_into_out(out, dout, dlse)
    assert folded.dtype == out.dtype and upstream.dtype == dout.dtype
    wanted = delta(out, dout) - dlse.double()
    eager, eager_upstream = (t.to(DEVICE) for t in pytorch.fold_dlse_into_out(out.cpu(), dout.cpu(), dlse.cpu()))
    assert_within_budget("D - dlse", delta(folded, upstream).to(out.dtype), wanted, delta(eager, eager_upstream))
    vanished = dout.abs().amax(-1) < 1e-15
    assert torch.equal(upstream[~vanished], dout[~vanished])
    assert (upstream[vanished].double() / 1e-20 - 1).abs().le(torch.finfo(dout.dtype).eps).all()
    again = fold_dlse_into_out(out, dout, dlse)
    assert torch.equal(folded, again[0]) and torch.equal(upstream, again[1])
    return folded, upstream


@pytest.mark.parametrize("zeros", ["none", "half", "all"])
@pytest.mark.parametrize("M, D", [(1, 64), (17, 16), (63, 80), (130, 128), (5, 256), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dlse_is_folded_into_out(dtype, M, D, zeros):
    check(*case(dtype, M, D, zeros=zeros))


@pytest.mark.parametrize("magnitude", [1e-14, 1e-9, 1e9, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_magnitudes(dtype, magnitude):
    """No square of dO is computed that float32 cannot represent."""
    out, dout, dlse = case(dtype, magnitude=magnitude, zeros="none")
    folded, upstream = fold_dlse_into_out(out, dout, dlse)
    wanted = delta(out, dout) - dlse.double()
    rounding = torch.finfo(dtype).eps * ((folded.double() * upstream.double()).abs().sum(-1) + wanted.abs())
    assert folded.isfinite().all() and ((delta(folded, upstream) - wanted).abs() <= rounding).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(dtype):
    out, dout, dlse = case(dtype)
    wanted = check(out, dout, dlse)
    strided = check(
        out.transpose(1, 2).contiguous().transpose(1, 2),
        torch.nn.functional.pad(dout, (8, 8))[..., 8:-8],
        dlse.transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert all(torch.equal(a, b) for a, b in zip(wanted, strided, strict=True))
    one_row = dout[:, :, 1:2]
    folded = check(out, one_row.expand_as(out), dlse)
    assert torch.equal(folded[0], fold_dlse_into_out(out, one_row.expand_as(out).contiguous(), dlse)[0])
    check(out, torch.ones(1, dtype=dtype, device=DEVICE).expand_as(out), dlse)


def test_gradient_of_the_scores():
    """A flash backward computes the gradient with dlse from the pair, also in rows whose dO was replaced."""
    out, dout, dlse = case(torch.float32, M=40, D=16, zeros="half")
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(1, 3, 40, 40, generator=generator).double().to(DEVICE).requires_grad_()
    v = torch.randn(1, 3, 40, 16, generator=generator).double().to(DEVICE).requires_grad_()
    weights = scores.softmax(-1)
    out = weights @ v
    torch.autograd.backward([out, scores.logsumexp(-1)], [dout.double(), dlse.double()])
    folded, upstream = (t.double() for t in fold_dlse_into_out(out.detach().float(), dout, dlse))
    dweights = upstream @ v.detach().transpose(-1, -2)
    dscores = weights.detach() * (dweights - (upstream * folded).sum(-1, keepdim=True))
    rounded = scores.grad.float()
    assert_within_budget("dscores", dscores.float(), scores.grad, rounded)
    assert_within_budget("dv", weights.detach().transpose(-1, -2) @ upstream, v.grad, v.grad)


def test_float16_is_refused():
    out, dout, dlse = case(torch.float16)
    with pytest.raises(TypeError, match="float16"):
        fold_dlse_into_out(out, dout, dlse)


def test_empty():
    out, dout, dlse = case(torch.float32, M=0)
    folded, upstream = fold_dlse_into_out(out, dout, dlse)
    assert folded.shape == upstream.shape == out.shape
