"""Tests folding dlse into out: the backward then computes D - dlse instead of D = sum(O * dO)."""

from __future__ import annotations

import pytest
import torch

from molsaki_kernels.attention.lse_gradient import VANISHED, fold_dlse_into_out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", ["none vanished", "some vanished", "all vanished", "tiny"])
def test_row_sums(dtype, rows):
    out, dout = torch.randn(2, 3, 40, 16), torch.randn(2, 3, 40, 16)
    if rows == "some vanished":
        dout[:, :, ::2] = 0
    if rows == "all vanished":
        dout.zero_()
    if rows == "tiny":
        dout *= torch.logspace(-18, 0, 40)[:, None]
    out, dout = out.to(dtype), dout.to(dtype)
    dlse = torch.randn(2, 3, 40, dtype=torch.promote_types(dtype, torch.float32))
    folded, along = fold_dlse_into_out(out, dout, dlse)
    assert folded.dtype == dtype and folded.isfinite().all() and along.isfinite().all()
    expected = (out.double() * dout.double()).sum(-1) - dlse.double()
    got = (folded.double() * along.double()).sum(-1)
    # each folded element is computed in a few operations in float32 or wider, and rounded once to the working dtype
    rounding = torch.finfo(dtype).eps / 2 + 4 * torch.finfo(dlse.dtype).eps
    allowed = rounding * (folded.double() * along.double()).abs().sum(-1) + VANISHED * out.double().norm(dim=-1)
    assert ((got - expected).abs() <= allowed).all()
    kept = dout.double().norm(dim=-1) > 1e-15
    assert torch.equal(along[kept], dout[kept])
    assert along.double().abs()[~kept].sum() < 1e-15


def test_float16_is_refused():
    x = torch.zeros(1, 1, 2, 4, dtype=torch.float16)
    with pytest.raises(TypeError, match="got float16, whose exponent range is too small to fold dlse"):
        fold_dlse_into_out(x, x, torch.zeros(1, 1, 2))
