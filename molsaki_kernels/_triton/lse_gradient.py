"""The gradient of the log-sum-exp for attention backwards that ignore it: dlse is folded into O along dO.

For each row i of out, dout (B, H, M, D) and dlse (B, H, M), with D[i] = rowsum(dO[i] * O[i]), in float32 and then cast:

    a = max_d |dO[i]|,   n = dO[i] / a,   O'[i] = O[i] - dlse[i] / (a |n|^2) n
    rowsum(dO[i] * O'[i]) = D[i] - dlse[i]

In a row with a < 1e-15, dO has no usable direction. It is replaced first by the constant 1e-20, which is too small to
change dP and dv. After the division by a, |n|^2 lies between 1 and the head dimension, and no square leaves the range
of float32. The kernel is elementwise and needs one pass; a program owns a tile of rows of one head. Where dlse is the
map's, :mod:`map_backward` folds it in the pass that computes it.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from molsaki_kernels._triton.decorators import jit, kernel
from molsaki_kernels._triton.integers import cdiv, next_power_of_2
from molsaki_kernels._triton.tiles import divide
from molsaki_kernels._triton.variants import TYPES, Variant, variant
from molsaki_kernels.strides import with_contiguous_head_dim

VANISHED = tl.constexpr(1e-15)
TINY = tl.constexpr(1e-20)
TILE_ELEMENTS = 4096  # per tile: 32 floats per thread in 4 warps, for each of O and dO


@jit
def fold_rows(o, do, dlse, D: tl.constexpr, BD: tl.constexpr):
    """``O' [rows, BD]`` in float32 and ``dO'`` in dO's dtype, of O, dO ``[rows, BD]`` and dlse ``[rows, 1]``."""
    # The constant is rounded to dO's dtype, because the backward multiplies by the rounded number.
    tiny = tl.where(tl.arange(0, BD)[None, :] < D, TINY, 0.0).to(do.dtype)
    vanished = tl.max(tl.abs(do.to(tl.float32)), 1, keep_dims=True) < VANISHED
    do = tl.where(vanished, tiny, do)  # [rows, BD]
    n = do.to(tl.float32)
    a = tl.max(tl.abs(n), 1, keep_dims=True)
    n = divide(n, a)
    return o.to(tl.float32) - divide(dlse.to(tl.float32), a * tl.sum(n * n, 1, keep_dims=True)) * n, do


@kernel
def fold_kernel(
    out,  # (B, H, M, D)
    dout,  # (B, H, M, D)
    dlse,  # (B, H, M)
    folded_out,  # (B, H, M, D)
    folded_dout,  # (B, H, M, D)
    stride_ob, stride_oh, stride_om, stride_db, stride_dh, stride_dm, stride_lb, stride_lh, stride_lm,
    stride_fob, stride_foh, stride_fom, stride_fdb, stride_fdh, stride_fdm, heads, M,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(M, BM)
    i_bh = tl.program_id(0) // tiles
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    rows = (tl.program_id(0) % tiles * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    d = tl.arange(0, BD)[None, :]
    mask = (rows < M) & (d < D)
    o = tl.load(out + i_b * stride_ob + i_h * stride_oh + rows * stride_om + d, mask=mask, other=0.0)
    do = tl.load(dout + i_b * stride_db + i_h * stride_dh + rows * stride_dm + d, mask=mask, other=0.0)
    dl = tl.load(dlse + i_b * stride_lb + i_h * stride_lh + rows * stride_lm, mask=rows < M, other=0.0)  # [BM, 1]

    o, do = fold_rows(o, do, dl, D, BD)
    tl.store(folded_out + i_b * stride_fob + i_h * stride_foh + rows * stride_fom + d, o.to(out.dtype.element_ty), mask)
    tl.store(folded_dout + i_b * stride_fdb + i_h * stride_fdh + rows * stride_fdm + d, do, mask)


def fold_dlse_into_out(out: Tensor, dout: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor]:
    """O' and the matching dO', in the dtypes of ``out`` and ``dout`` and both in the layout of ``out``, contiguous if
    its last dimension is not.

    Args:
        out: ``(B, H, M, D)`` in bfloat16 or float32, any strides.
        dout: the same, any strides. dlse: ``(B, H, M)``, any strides.

    Raises:
        TypeError: ``out`` or ``dout`` is float16, which cannot represent the constant for rows without a direction.
    """
    if torch.float16 in (out.dtype, dout.dtype):
        raise TypeError(
            "out, dout: expected bfloat16 or float32, got float16, whose exponent range is too small to fold dlse"
        )
    B, H, M, D = out.shape
    # out has the layout of q; the gradient of a sum is one number, expanded.
    out, dout = with_contiguous_head_dim(out), with_contiguous_head_dim(dout)
    # cuDNN's plans do not depend on the strides of dO: it has to have those that it had when the plan was built.
    folded_out, folded_dout = torch.empty_like(out), torch.empty_like(out, dtype=dout.dtype)
    if out.numel() == 0:
        return folded_out, folded_dout
    rows, columns = tile(D)
    with torch.cuda.device(out.get_device()):
        fold_kernel[(B * H * cdiv(M, rows),)](
            out, dout, dlse, folded_out, folded_dout, *out.stride()[:3], *dout.stride()[:3], *dlse.stride(),
            *folded_out.stride()[:3], *folded_dout.stride()[:3], H, M, D=D, BD=columns, BM=rows, num_warps=4,
            num_stages=1,
        )  # fmt: skip
    return folded_out, folded_dout


def tile(D: int) -> tuple[int, int]:
    """Rows and columns of a program's tile."""
    columns = next_power_of_2(D)
    return max(TILE_ELEMENTS // columns, 1), columns


def variants(arch: str) -> list[Variant]:
    """The variants that :mod:`molsaki_kernels.aot` compiles."""
    found = []
    for dtype, D in (
        *((torch.bfloat16, D) for D in (64, 80, 128, 256)),
        *((torch.float32, D) for D in (64, 128)),
    ):
        rows, columns = tile(D)
        name = f"fold-{TYPES[dtype]}-d{D}"
        found.append(variant(name, fold_kernel, dtype, dict(D=D, BD=columns, BM=rows, stride_lm=1)))
    return found
