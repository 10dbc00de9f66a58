"""A kernel that replaces flash-attn 4's preprocess and adds the map: one pass over q, O and dO before its backward.

flash-attn 4's backward on sm90 accumulates dq in a float32 buffer, which a kernel before it ("preprocess") clears and a
kernel after it ("postprocess") scales and rounds. Its preprocess also computes ``D - dlse`` and lse in base 2. The
kernel here writes the same three arrays, with the map's dlse and with the map's dq as the start of the accumulator:

    dpsum[i]    = rowsum(dO[i] * O[i]) - dlse[i] + sum_c P[i, c] g[i, c]       0 in rows past the end
    lse_log2[i] = lse[i] log2(e)                                               inf in rows past the end
    accumulator = sum_c dS[i, c] k[token(c)]                                   without the scale, in tile order

with g and dS as in ``map_backward.py``. So dq needs no pass of its own and is rounded once.

Tile order: a tile of ``rows x width`` floats is stored as the registers of the two (or one) warp groups that hold it,
    four at a time. A warp group is 128 threads. Of every eight columns, thread u holds four numbers: two adjacent
    columns in rows r and r + 8. :func:`tile_order` computes the position. It follows the layouts of the writing and the
    reading kernel in 4.0.0b36; a test compares it with them if the package is installed. No other version is accepted.
"""

from __future__ import annotations

import dataclasses

import torch
import triton.language as tl
from torch import Tensor

from molsaki_kernels._triton import configs
from molsaki_kernels._triton.decorators import jit, kernel
from molsaki_kernels._triton.integers import cdiv, next_power_of_2
from molsaki_kernels._triton.tiles import (
    LOG2E,
    dot,
    is_visible,
    load_rows,
    locate,
    score_factors,
    step_of,
    steps_in,
    weights,
)
from molsaki_kernels._triton.tiles import columns_in as key_tokens_in
from molsaki_kernels._triton.variants import Variant, variant
from molsaki_kernels.spec import AttentionOptions, MapInputs, PlanTensors

VERSION = "4.0.0b36"
COLUMNS = 32  # key tokens per step of the loop
WARPS = 8


@dataclasses.dataclass(frozen=True)
class Accumulator:
    """flash-attn 4's tiles of dq on sm90.

    Attributes:
        rows: of a tile. width: head_dim rounded to 32. warp_groups: that hold a tile.
        row_groups: the warp groups that own different rows; the others own different columns.
    """

    rows: int
    width: int
    warp_groups: int
    row_groups: int


def accumulator(head_dim: int, causal: bool, windowed: bool) -> Accumulator | None:
    """Return the tiles of a head dimension, or None if the kernel does not support their layout."""
    width = -(-head_dim // 32) * 32
    if head_dim % 8 or head_dim > 128 or 0 < head_dim % 32 <= 16:  # above 128 the package rounds to 64
        return None
    if width <= 64:
        return Accumulator(128, width, 2, 2)
    if width <= 96:
        return Accumulator(64, width, 1, 1)
    if causal or windowed:
        return Accumulator(64, width, 2, 1)
    return None  # transposed tiles of 80 rows


@jit
def tile_order(row, column, ROWS: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, ROW_GROUPS: tl.constexpr):
    """The position of ``(row, column)`` in a tile of ``ROWS x WIDTH`` floats; the arguments broadcast."""
    GROUP_WIDTH: tl.constexpr = WIDTH * ROW_GROUPS // GROUPS  # columns that a warp group owns
    group = row // 64 + column // GROUP_WIDTH * ROW_GROUPS
    thread = row % 64 // 16 * 32 + row % 8 * 4 + column % 8 // 2
    register = row % 16 // 8 * 2 + column % 2
    return group * (ROWS * WIDTH // GROUPS) + column % GROUP_WIDTH // 8 * 512 + thread * 4 + register


@kernel
def fa4_preprocess_kernel(
    q,  # (B, Hq, M, D)
    k,  # (B, Hkv, M, D)
    out,  # (B, Hq, M, D)
    dout,  # (B, Hq, M, D)
    lse,  # (B, Hq, M) float32
    dlse,  # (B, Hq, M) float32 or None
    dmaps,  # (N, S, W) or, PER_HEAD, (N, Hq, S, W) float32
    steps,  # (N, S, 2)
    tokens,  # (N, C)
    words,  # (N, C)
    dpsum,  # (B, Hq, rows rounded to BM), packed (Hq, rows of all tiles), float32
    lse_log2,  # the same
    accum,  # the same, times WIDTH: float32, in tile order
    step_of_row,  # (B, M) int32, for map_dk_kernel
    cu_seqlens,  # (N + 1,) or None
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_km, stride_ob, stride_oh, stride_om,
    stride_db, stride_dh, stride_dm,
    factor, weight, window, M, N, S, C, W, heads, group_size, padded,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, WIDTH: tl.constexpr,
    GROUPS: tl.constexpr, ROW_GROUPS: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    PACKED: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    i_g = tl.program_id(0)
    i_h = tl.program_id(1)
    i_n, i_b, i_t, bos, length = locate(i_g, cu_seqlens, M, N, BM, PACKED)
    m0 = i_t * BM
    if m0 >= length:
        return
    rows = m0 + tl.arange(0, BM)
    d = tl.arange(0, BD)
    b, h = i_b.to(tl.int64), i_h.to(tl.int64)
    offset = (bos + rows).to(tl.int64)[:, None]
    p_lse = (b * heads + h) * M + bos + rows
    b_lse = tl.load(lse + p_lse, mask=rows < length, other=float("inf"))
    b_out = load_rows(out + b * stride_ob + h * stride_oh + offset * stride_om + d[None, :], rows, length, D, BD, True)
    b_dout = load_rows(
        dout + b * stride_db + h * stride_dh + offset * stride_dm + d[None, :], rows, length, D, BD, True
    )
    b_dpsum = tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), 1)
    if dlse is not None:
        b_dpsum -= tl.load(dlse + p_lse, mask=rows < length, other=0.0)

    steps += i_n.to(tl.int64) * S * 2
    s_lo, s_hi = steps_in(steps, S, m0, tl.minimum(m0 + BM, length))
    step = step_of(steps, S, rows, s_lo, s_hi, BS)
    if i_h == 0:
        tl.store(step_of_row + b * M + bos + rows, step, mask=rows < length)
    tokens += i_n.to(tl.int64) * C
    words += i_n.to(tl.int64) * C
    first = tl.maximum(m0 - window + 1, 0) if HAS_WINDOW else m0 * 0
    last = tl.minimum(m0 + BM, length) - 1 if CAUSAL else length - 1
    c_lo, c_hi = key_tokens_in(tokens, words, C, first, last)
    if s_hi == 0:
        c_hi = c_lo
    if PER_HEAD:
        dmaps += (i_n.to(tl.int64) * heads + i_h) * S * W
    else:
        dmaps += i_n.to(tl.int64) * S * W

    b_q = load_rows(q + b * stride_qb + h * stride_qh + offset * stride_qm + d[None, :], rows, length, D, BD, True)
    k += b * stride_kb + (i_h // group_size).to(tl.int64) * stride_kh + bos.to(tl.int64) * stride_km
    b_dq = tl.zeros([BM, BD], tl.float32)
    for c0 in tl.range(c_lo, c_hi, BC, num_stages=1):
        c = c0 + tl.arange(0, BC)
        word = tl.load(words + c, mask=c < c_hi, other=-1).to(tl.int32)
        token = tl.load(tokens + c, mask=c < c_hi, other=0).to(tl.int32)
        word = tl.where(token < length, word, -1)
        p_k = k + token.to(tl.int64)[:, None] * stride_km + d[None, :]
        b_k = tl.load(p_k, mask=(word >= 0)[:, None] & (d < D)[None, :], other=0.0)  # [BC, BD]
        t = dot(b_q, tl.trans(b_k), None, "ieee")  # [BM, BC]
        visible = is_visible(rows[:, None], token[None, :], window, CAUSAL, HAS_WINDOW)
        visible = visible & (word >= 0)[None, :] & (step >= 0)[:, None]
        g = tl.load(dmaps + step.to(tl.int64)[:, None] * W + word[None, :], mask=visible, other=0.0) * weight
        ds = weights(t, b_lse[:, None], factor, visible, False) * g
        b_dpsum += tl.sum(ds, 1)
        b_dq = dot(ds.to(b_k.dtype), b_k, b_dq, "ieee")

    # A packed sequence has the same first tile here and in flash-attn 4: cu_seqlens[n] // BM + n.
    p = h * padded + i_g * BM if PACKED else (b * heads + h) * padded + m0
    p += tl.arange(0, BM)
    tl.store(dpsum + p, tl.where(rows < length, b_dpsum, 0.0))
    tl.store(lse_log2 + p, b_lse * LOG2E)
    p_tile = (h * padded + i_g * BM if PACKED else (b * heads + h) * padded + m0) * WIDTH
    p_accum = tile_order(tl.arange(0, BM)[:, None], d[None, :], BM, WIDTH, GROUPS, ROW_GROUPS)
    tl.store(accum + p_tile + p_accum, b_dq, mask=(d < WIDTH)[None, :])


def fa4_preprocess(
    dmaps: Tensor,
    inputs: MapInputs,
    options: AttentionOptions,
    plan: PlanTensors,
    gradients: tuple[Tensor, Tensor, Tensor | None],
    arrays: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """Fill flash-attn 4's arrays.

    Args:
        gradients: O and dO ``(B, Hq, M, D)``, any strides with a contiguous last dimension, and dlse ``(B, Hq, M)``
            float32, contiguous, or None.
        arrays: dpsum, lse_log2 and the accumulator of dq as flash-attn 4 allocates them, contiguous.

    Returns:
        The step of each row, ``(B, M)`` int32, for :func:`map_backward.add_dk`.
    """
    q, k, cu_seqlens = inputs.q, inputs.k, inputs.cu_seqlens
    out, dout, dlse = gradients
    dpsum, lse_log2, accum = arrays
    B, Hq, M, D = q.shape
    shape = accumulator(D, options.causal, options.window is not None)
    assert shape is not None and options.softcap is None
    N, S = plan.steps.shape[:2]
    C, W = plan.tokens.shape[1], plan.num_words
    factor, _ = score_factors(options.scale, None)
    step_of_row = q.new_empty((B, M), dtype=torch.int32)
    packed = cu_seqlens is not None
    tiles = M // shape.rows + N if packed else N * cdiv(M, shape.rows)
    with torch.cuda.device(q.get_device()):
        fa4_preprocess_kernel[(tiles, Hq)](
            q, k, out, dout, inputs.lse.contiguous(), dlse, dmaps.float().contiguous(), plan.steps, plan.tokens,
            plan.word_of_token, dpsum, lse_log2, accum, step_of_row, cu_seqlens,
            *q.stride()[:3], *k.stride()[:3], *out.stride()[:3], *dout.stride()[:3],
            factor, 1.0 if options.per_head else 1.0 / Hq, options.window or 0, M, N, S, C, W, Hq, Hq // k.shape[1],
            dpsum.shape[-1],
            D=D, BD=next_power_of_2(shape.width), BM=shape.rows, BC=COLUMNS, BS=configs.STEP_BLOCK,
            WIDTH=shape.width, GROUPS=shape.warp_groups, ROW_GROUPS=shape.row_groups, CAUSAL=options.causal,
            HAS_WINDOW=options.window is not None, PACKED=packed, PER_HEAD=options.per_head,
            num_warps=WARPS, num_stages=1,
        )  # fmt: skip
    return step_of_row


def variants(arch: str) -> list[Variant]:
    """The variants that :mod:`molsaki_kernels.aot` compiles."""
    found = []
    for D, packed in ((64, False), (96, False), (128, False), (128, True)) if arch == "sm90" else ():
        shape = accumulator(D, causal=True, windowed=False)
        assert shape is not None
        flags = dict(
            D=D, BD=next_power_of_2(D), BM=shape.rows, BC=COLUMNS, BS=configs.STEP_BLOCK, WIDTH=shape.width,
            GROUPS=shape.warp_groups, ROW_GROUPS=shape.row_groups, CAUSAL=True, HAS_WINDOW=False, PACKED=packed,
            PER_HEAD=False,
        )  # fmt: skip
        name = f"fa4_preprocess-bf16-d{D}{'-packed' * packed}"
        absent = ("dlse",) if packed else ("dlse", "cu_seqlens")
        found.append(
            variant(name, fa4_preprocess_kernel, torch.bfloat16, flags, absent=absent, warps=WARPS, wants_wgmma=True)
        )
    return found
