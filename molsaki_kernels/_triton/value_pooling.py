"""Eq. 5's h and its gradient: RMS norm over the value width, then the sum over a sequence's tokens; one read of v each.

With v (B, Hkv, M, D), a sequence's token i and the width w (Hkv D, or D where the heads are averaged first):

    x[i]  = (v[0, i], .., v[Hkv - 1, i])   or   mean_h v[h, i]                   (w,)
    y[i]  = r[i] x[i],   r[i] = (mean_w x[i]^2 + eps)^-1/2
    h     = c sum_{i < length} y[i]                c = 1, or 1 / max(length, 1) for the mean over tokens
    dx[i] = r[i] (g - y[i] mean_w(g y[i]))         g = c dh;   0 from i = length on
    dv[h, i] = dx[i, h D : (h + 1) D]   or   dx[i] / Hkv

A program owns a tile: up to ROWS tokens of one sequence over the whole width. Forward leaves a tile's sum in
`partial` (tiles, w) and a second kernel adds a sequence's tiles up in ascending order, so no atomics. Backward writes
every row of dv, zeros where the row does not count.

Packed sequences have lengths that only the device knows. The grid is the bound `total // ROWS + N` of `tiles.locate`,
in which a program looks its sequence up: a grid of N x (tiles of the longest possible sequence) would launch N times as
many. The last sequence's tiles run on to the end of v, so rows behind it, if any, get their zeros too.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from molsaki_kernels._triton import configs
from molsaki_kernels._triton.tiles import RAGGED, first_tile, locate

TILE_ELEMENTS = 4096  # of a block of rows: 32 floats a thread in 4 warps, twice (the block and its running sum)
ADD_TILES = 64  # of the second stage, at a time


@dataclasses.dataclass(frozen=True)
class ValuesConfig:
    rows: int  # of a program's tile
    block: int  # rows at a time
    columns: int  # of a block: the width, up to a power of two
    add_columns: int  # of a program of the second stage
    warps: int


def values_config(arch: str, tokens: int, width: int) -> ValuesConfig:
    """About a thousand programs, a few for each multiprocessor of any GPU. But no fewer than 16 rows each: the partial
    sums are 4-byte floats, written once and read once, which is a quarter of the reads of 16 rows of 2-byte values.
    Narrow columns in the second stage, so that one long sequence still makes programs."""
    columns = triton.next_power_of_2(width)
    if arch == "cpu":
        return ValuesConfig(rows=32, block=16, columns=columns, add_columns=1024, warps=4)
    rows = min(max(triton.next_power_of_2(tokens) // 1024, 16), 256)
    block = min(max(TILE_ELEMENTS // columns, 1), rows)
    # A row wider than a tile: 16 warps, since at 8 some compilers spill (compiled, 8192 wide, sm80).
    warps = max(block * columns // 1024, 1) if columns <= TILE_ELEMENTS else 16
    return ValuesConfig(rows, block, columns, add_columns=32, warps=warps)


@triton.jit
def counted(lengths, i_n, length):
    """How many rows of sequence i_n, which has `length` of them, are no padding."""
    if lengths is None:
        return length
    else:
        return tl.minimum(length, tl.load(lengths + i_n).to(tl.int32))


@triton.jit
def normalised_rows(
    p_v, mask, stride_h, eps, WIDTH: tl.constexpr, HEADS: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr
):
    """y ``[BM, BW]`` and r ``[BM]`` of a block of rows; HEADS rows, stride_h apart, are averaged first."""
    x = tl.zeros([BM, BW], tl.float32)
    for i_h in range(HEADS):
        x += tl.load(p_v + i_h * tl.cast(stride_h, tl.int64), mask=mask, other=0.0).to(tl.float32)
    x *= 1.0 / HEADS
    r = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)
    return x * r[:, None], r


@triton.jit(do_not_specialize=RAGGED)
def pool_tiles_kernel(
    v,  # (B, Hkv, M, D)
    partial,  # (tiles, width)
    cu_seqlens,  # (N + 1,) or None
    lengths,  # (N,) or None
    stride_b, stride_h, stride_m, N, M, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    i_g = tl.program_id(0)
    i_n, i_b, i_t, bos, length = locate(i_g, cu_seqlens, M, N, ROWS, PACKED)
    first = i_t * ROWS
    last = tl.minimum(first + ROWS, counted(lengths, i_n, length))
    if first >= last:
        return
    w = tl.arange(0, BW)
    p_v = v + i_b.to(tl.int64) * stride_b + bos.to(tl.int64) * stride_m + (w // D).to(tl.int64) * stride_h + w % D
    total = tl.zeros([BM, BW], tl.float32)
    for m0 in range(first, last, BM):
        rows = m0 + tl.arange(0, BM)
        mask = (rows < last)[:, None] & (w < WIDTH)[None, :]
        p_rows = p_v[None, :] + rows.to(tl.int64)[:, None] * stride_m
        y, _ = normalised_rows(p_rows, mask, stride_h, eps, WIDTH, HEADS, BM, BW)
        total += tl.where(mask, y, 0.0)
    tl.store(partial + i_g.to(tl.int64) * WIDTH + w, tl.sum(total, 0), mask=w < WIDTH)


@triton.jit(do_not_specialize=RAGGED)
def add_tiles_kernel(
    partial,  # (tiles, width)
    pooled,  # (N, width)
    cu_seqlens,
    lengths,
    M,
    WIDTH: tl.constexpr, MEAN: tl.constexpr, ROWS: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    i_n, i_w = tl.program_id(0), tl.program_id(1)
    if PACKED:
        bos = tl.load(cu_seqlens + i_n).to(tl.int32)
        length = tl.load(cu_seqlens + i_n + 1).to(tl.int32) - bos
    else:
        bos = i_n * 0
        length = bos + M
    count = counted(lengths, i_n, length)
    tiles = tl.cdiv(count, ROWS)
    w = i_w * BW + tl.arange(0, BW)
    partial += first_tile(i_n, bos, M, ROWS, PACKED).to(tl.int64) * WIDTH
    total = tl.zeros([BT, BW], tl.float32)
    for t0 in range(0, tiles, BT):
        t = t0 + tl.arange(0, BT)
        mask = (t < tiles)[:, None] & (w < WIDTH)[None, :]
        total += tl.load(partial + t.to(tl.int64)[:, None] * WIDTH + w[None, :], mask=mask, other=0.0)
    pooled_w = tl.sum(total, 0)
    if MEAN:
        pooled_w /= tl.maximum(count, 1).to(tl.float32)
    tl.store(pooled + i_n.to(tl.int64) * WIDTH + w, pooled_w, mask=w < WIDTH)


@triton.jit(do_not_specialize=RAGGED)
def pool_backward_kernel(
    dpooled,  # (N, width)
    v,  # (B, Hkv, M, D)
    dv,  # (B, Hkv, M, D)
    cu_seqlens,
    lengths,
    stride_b, stride_h, stride_m, stride_db, stride_dh, stride_dm, N, M, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, MEAN: tl.constexpr, ROWS: tl.constexpr,
    BM: tl.constexpr, BW: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    i_n, i_b, i_t, bos, length = locate(tl.program_id(0), cu_seqlens, M, N, ROWS, PACKED)
    count = counted(lengths, i_n, length)
    first = i_t * ROWS
    last = tl.minimum(first + ROWS, tl.where(i_n == N - 1, M - bos, length) if PACKED else length)
    w = tl.arange(0, BW)
    g = tl.load(dpooled + i_n.to(tl.int64) * WIDTH + w, mask=w < WIDTH, other=0.0).to(tl.float32)[None, :]
    if MEAN:
        g /= tl.maximum(count, 1).to(tl.float32)
    p_v = v + i_b.to(tl.int64) * stride_b + bos.to(tl.int64) * stride_m + (w // D).to(tl.int64) * stride_h + w % D
    p_dv = dv + i_b.to(tl.int64) * stride_db + bos.to(tl.int64) * stride_dm + (w // D).to(tl.int64) * stride_dh + w % D
    for m0 in range(first, last, BM):
        rows = m0 + tl.arange(0, BM)
        counts = (rows < count)[:, None]
        p_rows = p_v[None, :] + rows.to(tl.int64)[:, None] * stride_m
        y, r = normalised_rows(p_rows, counts & (w < WIDTH)[None, :], stride_h, eps, WIDTH, HEADS, BM, BW)
        dx = (r / HEADS)[:, None] * (g - y * (tl.sum(g * y, 1) / WIDTH)[:, None])  # [BM, BW]
        dx = tl.where(counts, dx, 0.0).to(dv.dtype.element_ty)
        p_drows = p_dv[None, :] + rows.to(tl.int64)[:, None] * stride_dm
        for i_h in range(HEADS):
            mask = (rows < last)[:, None] & (w < WIDTH)[None, :]
            tl.store(p_drows + i_h * tl.cast(stride_dh, tl.int64), dx, mask=mask)


def pool_values_forward(
    v: Tensor, lengths: Tensor | None, eps: float, mean: bool, mean_heads: bool, cu_seqlens: Tensor | None
) -> Tensor:
    """Pooled values ``(N, width)`` float32.

    Args:
        v: ``(B, Hkv, M, D)``, any strides with a contiguous last dimension.
        lengths: ``(N,)`` integers or None.
        mean: over a sequence's tokens, instead of the sum. mean_heads: average the heads first; the width is then D.
        cu_seqlens: ``(N + 1,)`` int32 if v is packed ``(1, Hkv, total, D)``.
    """
    B, Hkv, M, D = v.shape
    packed = cu_seqlens is not None
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    width = D if mean_heads else Hkv * D
    if 0 in (N, M, width, Hkv):
        return torch.zeros(N, width, dtype=torch.float32, device=v.device)
    lengths = None if lengths is None else lengths.contiguous()
    config = values_config(configs.arch_of(v), B * M, width)
    tiles = configs.num_tiles(M, N, packed, config.rows)
    partial = torch.empty(tiles, width, dtype=torch.float32, device=v.device)
    pooled = torch.empty(N, width, dtype=torch.float32, device=v.device)
    with torch.cuda.device_of(v):
        pool_tiles_kernel[(tiles,)](
            v, partial, cu_seqlens, lengths, *v.stride()[:3], N, M, eps,
            D=D, WIDTH=width, HEADS=Hkv if mean_heads else 1, ROWS=config.rows, BM=config.block, BW=config.columns,
            PACKED=packed, num_warps=config.warps, num_stages=1,
        )  # fmt: skip
        add_tiles_kernel[(N, triton.cdiv(width, config.add_columns))](
            partial, pooled, cu_seqlens, lengths, M,
            WIDTH=width, MEAN=mean, ROWS=config.rows, BT=ADD_TILES, BW=config.add_columns, PACKED=packed, num_warps=4,
            num_stages=1,
        )  # fmt: skip
    return pooled


def pool_values_backward(
    dpooled: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    eps: float,
    mean: bool,
    mean_heads: bool,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """dv in v's dtype and layout from dpooled ``(N, width)``; exact zeros in rows that do not count."""
    B, Hkv, M, D = v.shape
    packed = cu_seqlens is not None
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    width = D if mean_heads else Hkv * D
    if 0 in (N, M, width, Hkv):
        return torch.zeros_like(v)
    lengths = None if lengths is None else lengths.contiguous()
    config = values_config(configs.arch_of(v), B * M, width)
    dv = torch.empty_like(v)
    with torch.cuda.device_of(v):
        pool_backward_kernel[(configs.num_tiles(M, N, packed, config.rows),)](
            dpooled.contiguous(), v, dv, cu_seqlens, lengths, *v.stride()[:3], *dv.stride()[:3], N, M, eps,
            D=D, WIDTH=width, HEADS=Hkv if mean_heads else 1, MEAN=mean, ROWS=config.rows, BM=config.block,
            BW=config.columns, PACKED=packed, num_warps=config.warps, num_stages=1,
        )  # fmt: skip
    return dv


def variants(arch: str) -> list[configs.Variant]:
    """What :mod:`molsaki_kernels.aot` compiles: the widths of small and large models, and each option once."""
    found = []
    for dtype, Hkv, D, mean_heads, packed, ragged in (
        ("bf16", 3, 64, False, False, True),
        ("bf16", 8, 128, False, False, True),
        ("bf16", 8, 128, False, False, False),
        ("bf16", 8, 128, True, False, True),
        ("bf16", 8, 128, False, True, False),
        ("bf16", 5, 80, False, False, True),
        ("bf16", 64, 128, False, False, True),
        ("fp16", 8, 128, False, False, True),
        ("fp32", 8, 128, False, False, True),
    ):
        width = D if mean_heads else Hkv * D
        config = values_config(arch, 16 * 512, width)
        name = f"{dtype}-h{Hkv}-d{D}" + "-heads" * mean_heads + "-packed" * packed + "-ragged" * ragged
        types = dict.fromkeys(("v", "dv"), f"*{dtype}") | dict.fromkeys(("partial", "pooled", "dpooled"), "*fp32")
        absent = {} if packed else {"cu_seqlens": None}
        absent |= {} if ragged else {"lengths": None}
        rows = dict(ROWS=config.rows, PACKED=packed, WIDTH=width, **absent)
        block = dict(D=D, HEADS=Hkv if mean_heads else 1, BM=config.block, BW=config.columns)
        found += [
            _variant(f"pool_tiles-{name}", pool_tiles_kernel, types, config.warps, **rows, **block),
            _variant(
                f"add_tiles-{name}", add_tiles_kernel, types, 4, **rows, MEAN=True, BT=ADD_TILES, BW=config.add_columns
            ),
            _variant(f"pool_backward-{name}", pool_backward_kernel, types, config.warps, **rows, **block, MEAN=True),
        ]
    return found


def _variant(name: str, kernel, types: dict[str, str], warps: int, **constexprs) -> configs.Variant:
    types = types | {"cu_seqlens": "*i32", "lengths": "*i64", "eps": "fp32"} | dict.fromkeys(constexprs, "constexpr")
    types = {arg: types.get(arg, "i32") for arg in kernel.arg_names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (arg, type_) in enumerate(types.items())
        if type_[0] == "*" or arg.startswith("stride_")
    }
    return configs.Variant(name, kernel, types, constexprs, attrs, warps, 1, False)
