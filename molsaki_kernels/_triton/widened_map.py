"""The map of an attention with v widened by one column per word, and the gradient of its output (see widened_values).

For O' = [O, O_E] (B, Hq, M, columns), with O of ``v_columns`` columns and then W columns of masses:

    A[n, s, w] = sum over the rows i of step s, sum over the heads h, of O_E[h, i, w] / Hq      (or one map per head)
    dO'[h, i]  = [dO[h, i], dA[n, step(i), :] / Hq, 0 for padding columns];  0 for dA where row i is in no step

One program of ``word_sums`` owns a step, a block of words and some heads; the sums of the groups of heads are added by
PyTorch, so no float atomics. One program of ``widened_dout`` owns a tile of rows of one head: one pass, one launch.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from molsaki_kernels._triton import configs
from molsaki_kernels._triton.decorators import kernel
from molsaki_kernels._triton.integers import cdiv, next_power_of_2
from molsaki_kernels._triton.tiles import locate
from molsaki_kernels._triton.variants import TYPES, Variant, variant
from molsaki_kernels.strides import with_contiguous_head_dim

SUM_ROWS = 32  # rows loaded at once: with 32 words 32 numbers per thread of a warp, and steps average 10 to 100 rows
DOUT_ROWS = 32
STEPS = 32  # compared with a tile of rows at once


@kernel
def word_sums_kernel(
    wide,  # (B, H, M, columns)
    steps,  # (N, S, 2)
    partial,  # (groups, N, S, W), or (N, H, S, W) with one head per group
    cu_seqlens,  # (N + 1,) or None
    stride_b, stride_h, stride_m, stride_pg, stride_pn, S, W, v_columns, heads, heads_per_program, weight,
    BM: tl.constexpr, BW: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    i_n, i_s, i_g = tl.program_id(0) // S, tl.program_id(0) % S, tl.program_id(2)
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    p_step = steps + (i_n.to(tl.int64) * S + i_s) * 2
    start, stop = tl.load(p_step).to(tl.int32), tl.load(p_step + 1).to(tl.int32)
    if PACKED:
        p_rows = wide + tl.load(cu_seqlens + i_n).to(tl.int64) * stride_m
    else:
        p_rows = wide + i_n.to(tl.int64) * stride_b
    first = i_g * heads_per_program
    total = tl.zeros([BM, BW], tl.float32)
    for i_h in range(first, tl.minimum(first + heads_per_program, heads)):
        p_head = p_rows + i_h * tl.cast(stride_h, tl.int64) + v_columns
        for m0 in range(start, stop, BM):
            rows = (m0 + tl.arange(0, BM))[:, None]
            mask = (rows < stop) & (w < W)[None, :]
            total += tl.load(p_head + rows.to(tl.int64) * stride_m + w[None, :], mask=mask, other=0.0).to(tl.float32)
    p = partial + i_g.to(tl.int64) * stride_pg + i_n.to(tl.int64) * stride_pn + i_s.to(tl.int64) * W + w
    tl.store(p, tl.sum(total, 0) * weight, mask=w < W)


@kernel
def widened_dout_kernel(
    dout,  # (B, H, M, v_columns) or None
    dmaps,  # (N, S, W), or (N, H, S, W) with stride_mh
    dwide,  # (B, H, M, columns)
    steps,  # (N, S, 2)
    cu_seqlens,  # (N + 1,) or None
    stride_db, stride_dh, stride_dm, stride_mn, stride_mh, stride_wb, stride_wh, stride_wm, N, M, S, W, v_columns,
    columns, weight,
    BM: tl.constexpr, BV: tl.constexpr, BE: tl.constexpr, BS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    i_n, i_b, i_t, bos, length = locate(tl.program_id(0), cu_seqlens, M, N, BM, PACKED)
    i_h = tl.program_id(1).to(tl.int64)
    rows = i_t * BM + tl.arange(0, BM)
    last = tl.where(i_n == N - 1, M - bos, length) if PACKED else length  # rows after the last sequence get zeros
    if i_t * BM >= last:
        return
    inside = (rows < last)[:, None]
    at = (bos + rows).to(tl.int64)[:, None]
    p_wide = dwide + i_b.to(tl.int64) * stride_wb + i_h * stride_wh + at * stride_wm
    v = tl.arange(0, BV)[None, :]
    for v0 in range(0, v_columns, BV):
        mask = inside & (v0 + v < v_columns)
        if dout is None:
            x = tl.zeros([BM, BV], dwide.dtype.element_ty)
        else:
            p_dout = dout + i_b.to(tl.int64) * stride_db + i_h * stride_dh + at * stride_dm
            x = tl.load(p_dout + v0 + v, mask=mask, other=0.0).to(dwide.dtype.element_ty)
        tl.store(p_wide + v0 + v, x, mask=mask)

    step = tl.zeros([BM], tl.int32) - 1
    for s0 in range(0, S, BS):
        s = s0 + tl.arange(0, BS)
        p_steps = steps + (i_n.to(tl.int64) * S + s) * 2
        start = tl.load(p_steps, mask=s < S, other=0).to(tl.int32)
        stop = tl.load(p_steps + 1, mask=s < S, other=0).to(tl.int32)
        found = (rows[:, None] >= start[None, :]) & (rows[:, None] < stop[None, :])  # at most one step per row
        step += tl.sum(tl.where(found, s[None, :] + 1, 0), 1)
    p_maps = dmaps + i_n.to(tl.int64) * stride_mn + i_h * stride_mh + step.to(tl.int64)[:, None] * W
    e = tl.arange(0, BE)[None, :]
    for e0 in range(0, columns - v_columns, BE):
        g = tl.load(p_maps + e0 + e, mask=(step >= 0)[:, None] & (e0 + e < W), other=0.0) * weight
        mask = inside & (e0 + e < columns - v_columns)
        tl.store(p_wide + v_columns + e0 + e, g.to(dwide.dtype.element_ty), mask=mask)


def word_sums(
    wide: Tensor, v_columns: int, num_words: int, cu_seqlens: Tensor | None, steps: Tensor, per_head: bool
) -> Tensor:
    """The map ``(N, S, num_words)`` or ``(N, Hq, S, num_words)`` float32.

    Args:
        wide: O' ``(B, Hq, M, columns)``, any strides.
        steps: ``(N, S, 2)`` int64, contiguous. cu_seqlens: ``(N + 1,)`` int32, or None.
    """
    wide = with_contiguous_head_dim(wide)
    H, (N, S) = wide.shape[1], steps.shape[:2]
    block = words_block(num_words)
    programs = N * S * cdiv(num_words, block)
    per_program = 1 if per_head else heads_per_program(configs.arch_of(wide), H, programs)
    groups = cdiv(H, per_program)
    shape = (N, H, S, num_words) if per_head else (groups, N, S, num_words)
    partial = torch.empty(shape, dtype=torch.float32, device=wide.device)
    strides = (partial.stride(1), partial.stride(0)) if per_head else (partial.stride(0), partial.stride(1))
    with torch.cuda.device(wide.get_device()):
        word_sums_kernel[(N * S, cdiv(num_words, block), groups)](
            wide, steps, partial, cu_seqlens, *wide.stride()[:3], *strides, S, num_words, v_columns, H, per_program,
            1.0 if per_head else 1.0 / H,
            BM=SUM_ROWS, BW=block, PACKED=cu_seqlens is not None, num_warps=1, num_stages=1,
        )  # fmt: skip
    if per_head:
        return partial
    return partial[0] if groups == 1 else partial.sum(0)


def widened_dout(
    dout: Tensor | None,
    dmaps: Tensor,
    wide: Tensor,
    v_columns: int,
    cu_seqlens: Tensor | None,
    steps: Tensor,
    per_head: bool,
) -> Tensor:
    """dO' in the shape, dtype and layout of ``wide``.

    Args:
        dout: ``(B, Hq, M, v_columns)``, any strides with a contiguous last dimension, or None: zeros.
        dmaps: ``(N, [Hq,] S, W)`` float32. The others as in :func:`word_sums`.
    """
    (_, H, M, columns), (N, S) = wide.shape, steps.shape[:2]
    # wide has the layout of q, which need not be that of a kernel.
    dwide, dmaps = torch.empty_like(with_contiguous_head_dim(wide)), dmaps.contiguous()
    packed, W = cu_seqlens is not None, dmaps.shape[-1]
    with torch.cuda.device(wide.get_device()):
        widened_dout_kernel[(configs.num_tiles(M, N, packed, DOUT_ROWS), H)](
            dout, dmaps, dwide, steps, cu_seqlens, *((0, 0, 0) if dout is None else dout.stride()[:3]),
            dmaps.stride(0), dmaps.stride(1) if per_head else 0, *dwide.stride()[:3], N, M, S, W, v_columns, columns,
            1.0 if per_head else 1.0 / H,
            BM=DOUT_ROWS, BV=v_block(v_columns), BE=words_block(columns - v_columns), BS=STEPS, PACKED=packed,
            num_warps=4, num_stages=1,
        )  # fmt: skip
    return dwide if wide.stride(-1) == 1 else torch.empty_like(wide).copy_(dwide)


def heads_per_program(arch: str, heads: int, programs: int) -> int:
    """Heads that a program sums: all, which saves a launch, where that leaves two programs per multiprocessor."""
    groups = min(heads, cdiv(2 * configs.MULTIPROCESSORS[arch], programs))
    per_program: int = cdiv(heads, groups)
    return per_program


def words_block(words: int) -> int:
    """Columns of words that a program holds at once."""
    block: int = min(64, max(16, next_power_of_2(words)))
    return block


def v_block(v_columns: int) -> int:
    """Columns of dO that a program copies at once."""
    block: int = min(128, max(16, next_power_of_2(v_columns)))
    return block


def variants(arch: str) -> list[Variant]:
    """The variants that :mod:`molsaki_kernels.aot` compiles."""
    found = []
    for dtype, D, W, packed in (
        (torch.bfloat16, 64, 24, False),
        (torch.bfloat16, 64, 24, True),
        (torch.bfloat16, 64, 64, False),
        (torch.bfloat16, 128, 64, False),
        (torch.float16, 64, 24, False),
        (torch.float32, 64, 24, False),
    ):
        name = f"{TYPES[dtype]}-d{D}-w{W}" + "-packed" * packed
        absent = () if packed else ("cu_seqlens",)
        flags = dict(BW=words_block(W), BM=SUM_ROWS, PACKED=packed)
        found.append(variant(f"word_sums-{name}", word_sums_kernel, dtype, flags, absent=absent, warps=1))
        flags = dict(BM=DOUT_ROWS, BV=v_block(D), BE=words_block(W), BS=STEPS, PACKED=packed)
        found.append(variant(f"widened_dout-{name}", widened_dout_kernel, dtype, flags, absent=absent))
    return found
