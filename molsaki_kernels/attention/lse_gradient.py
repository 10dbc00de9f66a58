"""Fold the gradient of the log-sum-exp into O, for attention backwards that ignore it.

A flash backward uses O only to form D = rowsum(dO * O), and its dS is P * (dP - D). The full one is
P * (dP - (D - dlse)), so it is enough to pass an O' with rowsum(dO * O') = D - dlse:

    O'[i] = O[i] - dlse[i] / |dO[i]|^2 * dO[i]

Exact up to rounding. A row whose dO vanishes (a masked label in the last layer) has no direction to fold along: its dO
is first replaced by a constant too small to change dP or dv.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molsaki_kernels._native.lse_gradient import fold_in_one_pass
from molsaki_kernels._triton.support import why_no_triton
from molsaki_kernels._workspace import workspace

VANISHED = 1e-15  # |dO| below this: its square is still a normal float32
TINY = 1e-20  # takes its place; float16 cannot represent it and is refused


def fold_dlse_into_out(out: Tensor, dout: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor]:
    """Return O' and the dO that belongs to it, so that ``rowsum(dO' * O') = rowsum(dO * O) - dlse``.

    Args:
        out, dout: ``(B, H, M, D)`` in bfloat16, float32 or float64. dlse: ``(B, H, M)``.

    Returns:
        ``(O', dO')`` in the dtypes of ``out`` and ``dout``; ``dO'`` is ``dout`` itself where no row vanished (known on
        the host only for CPU tensors). On a CPU O' may be in the workspace, valid until the next call.
    """
    if torch.float16 in (out.dtype, dout.dtype):
        raise TypeError(
            "out, dout: expected bfloat16 or float32, got float16, whose exponent range is too small to fold dlse"
        )
    if out.is_cuda and why_no_triton(out.device, out.dtype) is None:
        from molsaki_kernels._triton import lse_gradient

        return lse_gradient.fold_dlse_into_out(out, dout, dlse)
    dtype = torch.promote_types(out.dtype, torch.float32)
    if out.device.type == "cpu":
        transposed = out.transpose(1, 2).is_contiguous()  # O' gets the layout of O
        shape = out.transpose(1, 2).shape if transposed else out.shape
        folded = workspace("folded out", tuple(shape), dtype, out.device)
        folded = folded.transpose(1, 2) if transposed else folded
        if fold_in_one_pass(out, dout, dlse, folded, VANISHED):
            return folded, dout
    norm = torch.linalg.vector_norm(dout, dim=-1, keepdim=True, dtype=dtype)
    dlse = dlse.to(dtype)[..., None]
    vanished = norm < VANISHED
    if dout.device.type == "cpu" and not vanished.any():
        torch.addcmul(out.to(dtype), dout.to(dtype), dlse / norm.square(), value=-1, out=folded)
        return folded.to(out.dtype), dout
    tiny = torch.tensor(TINY, dtype=dout.dtype).item()  # rounded to dO's dtype
    dout = torch.where(vanished, tiny, dout)
    step = torch.where(vanished, dlse / (tiny * dout.shape[-1]), dout * (dlse / norm.square()))
    return (out - step).to(out.dtype), dout


def append_dlse_column(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, dlse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Append eight columns to the head dimension for float16: ``V = 0, O = -dlse, dO = 1`` in the first of them.

    Returns:
        q, k, v, O' and dO', each ``(B, H, M, D + 8)``; the first D columns of their gradients are the gradients.
    """
    q, k, v = (torch.nn.functional.pad(t, (0, 8)) for t in (q, k, v))
    out = torch.cat([out, (-dlse).to(out.dtype)[..., None], out.new_zeros(*out.shape[:-1], 7)], -1)
    dout = torch.cat([dout, torch.ones_like(dout[..., :1]), dout.new_zeros(*dout.shape[:-1], 7)], -1)
    return q, k, v, out, dout
