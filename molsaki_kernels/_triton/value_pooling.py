"""Pooled values (h of Eq. 5) and their gradient, with one read of v each.

The RMS norm over the value width comes first, then the sum over a sequence's tokens.

With v (B, Hkv, M, D), a sequence's token i and the width w (Hkv D, or D where the heads are averaged first):

    x[i]  = (v[0, i], .., v[Hkv - 1, i])   or   mean_h v[h, i]                   (w,)
    y[i]  = r[i] x[i],   r[i] = (mean_w x[i]^2 + eps)^-1/2
    h     = c sum_{i < length} y[i]                c = 1, or 1 / max(length, 1) for the mean over tokens
    dx[i] = r[i] (g - y[i] mean_w(g y[i]))         g = c dh;   0 from i = length on
    dv[h, i] = dx[i, h D : (h + 1) D]   or   dx[i] / Hkv

A program owns a tile: up to ROWS tokens of one sequence over the whole width. The forward kernel writes the sum of each
tile to ``partial (tiles, w)``, and a second kernel adds the tiles of each sequence in ascending order, without atomics.
The backward kernel writes every row of dv, with zeros where the row does not count.

Lengths of packed sequences are known on the device only. The grid is therefore the bound ``total // ROWS + N`` of
``tiles.locate``, which finds the sequence of a program; a grid of N times the tiles of the longest possible sequence
would launch up to N times as many programs. The last sequence's tiles extend to the end of v, so that rows behind it
get zeros as well.
"""

from __future__ import annotations

import dataclasses

import torch
import triton.language as tl
from torch import Tensor

from molsaki_kernels._triton import configs
from molsaki_kernels._triton.decorators import jit, kernel
from molsaki_kernels._triton.integers import cdiv, next_power_of_2
from molsaki_kernels._triton.tiles import first_tile, locate
from molsaki_kernels._triton.variants import TYPES, Variant, variant
from molsaki_kernels.spec import PoolingOptions

TILE_ELEMENTS = 4096  # per block of rows: 32 floats per thread in 4 warps, twice (the block and its running sum)
ADD_TILES = 64  # tiles that the second stage adds at a time


@dataclasses.dataclass(frozen=True)
class PoolingConfig:
    rows: int  # per program
    block: int  # rows at a time
    columns: int  # of a block: the width, rounded up to a power of two
    add_columns: int  # per program of the second stage
    warps: int


def pooling_config(arch: str, tokens: int, width: int) -> PoolingConfig:
    """About a thousand programs, a few per multiprocessor of any GPU, but at least 16 rows per program.

    The partial sums are 4-byte floats that are written once and read once; with 16 rows of 2-byte values per program,
    this is a quarter of the bytes read. The second stage has few columns per program, so that one long sequence still
    gives several programs.
    """
    columns = next_power_of_2(width)
    if arch == "cpu":
        return PoolingConfig(rows=32, block=16, columns=columns, add_columns=1024, warps=4)
    rows = min(max(next_power_of_2(tokens) // 1024, 16), 256)
    block = min(max(TILE_ELEMENTS // columns, 1), rows)
    # 16 warps for a row wider than a tile: with 8, some compilers spill (compiled: 8192 wide, sm80).
    warps = max(block * columns // 1024, 1) if columns <= TILE_ELEMENTS else 16
    return PoolingConfig(rows, block, columns, add_columns=32, warps=warps)


@jit
def counted(lengths, i_n, length):
    """The number of rows of sequence i_n that are not padding; the sequence has ``length`` rows."""
    if lengths is None:
        return length
    else:
        return tl.minimum(length, tl.load(lengths + i_n).to(tl.int32))


@jit
def normalised_rows(
    p_v, mask, stride_h, eps, WIDTH: tl.constexpr, HEADS: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr
):
    """y ``[BM, BW]`` and r ``[BM]`` of a block of rows; HEADS rows at a distance of stride_h are averaged first."""
    x = tl.zeros([BM, BW], tl.float32)
    for i_h in range(HEADS):
        x += tl.load(p_v + i_h * tl.cast(stride_h, tl.int64), mask=mask, other=0.0).to(tl.float32)
    x *= 1.0 / HEADS
    r = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)
    return x * r[:, None], r


@kernel
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


@kernel
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


@kernel
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
    v: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, options: PoolingOptions
) -> Tensor:
    """Pooled values ``(N, width)`` float32.

    Args:
        v: ``(B, Hkv, M, D)``, any strides with a contiguous last dimension; packed ``(1, Hkv, total, D)``.
        lengths: ``(N,)`` integers, the tokens of each sequence that are not padding; None: no padding.
        cu_seqlens: ``(N + 1,)`` int32 boundaries of packed sequences, or None.
    """
    N, width = _shape(v, cu_seqlens, options)
    if 0 in (N, *v.shape):
        return torch.zeros(N, width, dtype=torch.float32, device=v.device)
    B, Hkv, M, D = v.shape
    config = pooling_config(configs.arch_of(v), B * M, width)
    packed = cu_seqlens is not None
    lengths = None if lengths is None else lengths.contiguous()
    tiles = configs.num_tiles(M, N, packed, config.rows)
    partial = torch.empty(tiles, width, dtype=torch.float32, device=v.device)
    pooled = torch.empty(N, width, dtype=torch.float32, device=v.device)
    with torch.cuda.device(v.get_device()):
        pool_tiles_kernel[(tiles,)](
            v, partial, cu_seqlens, lengths, *v.stride()[:3], N, M, options.eps,
            D=D, WIDTH=width, HEADS=Hkv if options.mean_heads else 1, ROWS=config.rows, BM=config.block,
            BW=config.columns, PACKED=packed, num_warps=config.warps, num_stages=1,
        )  # fmt: skip
        add_tiles_kernel[(N, cdiv(width, config.add_columns))](
            partial, pooled, cu_seqlens, lengths, M,
            WIDTH=width, MEAN=options.mean, ROWS=config.rows, BT=ADD_TILES, BW=config.add_columns, PACKED=packed,
            num_warps=4, num_stages=1,
        )  # fmt: skip
    return pooled


def pool_values_backward(
    dpooled: Tensor, v: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, options: PoolingOptions
) -> Tensor:
    """dv in v's dtype and layout from dpooled ``(N, width)``; exact zeros in rows that do not count."""
    N, width = _shape(v, cu_seqlens, options)
    if 0 in (N, *v.shape):
        return torch.zeros_like(v)
    B, Hkv, M, D = v.shape
    config = pooling_config(configs.arch_of(v), B * M, width)
    packed = cu_seqlens is not None
    lengths = None if lengths is None else lengths.contiguous()
    dv = torch.empty_like(v)
    with torch.cuda.device(v.get_device()):
        pool_backward_kernel[(configs.num_tiles(M, N, packed, config.rows),)](
            dpooled.contiguous(), v, dv, cu_seqlens, lengths, *v.stride()[:3], *dv.stride()[:3], N, M, options.eps,
            D=D, WIDTH=width, HEADS=Hkv if options.mean_heads else 1, MEAN=options.mean, ROWS=config.rows,
            BM=config.block, BW=config.columns, PACKED=packed, num_warps=config.warps, num_stages=1,
        )  # fmt: skip
    return dv


def _shape(v: Tensor, cu_seqlens: Tensor | None, options: PoolingOptions) -> tuple[int, int]:
    """The shape of the pooled values, ``(N, width)``."""
    B, Hkv, _, D = v.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return N, D if options.mean_heads else Hkv * D


def variants(arch: str) -> list[Variant]:
    """The variants that :mod:`molsaki_kernels.aot` compiles: widths of small and large models, each option once."""
    found = []
    for dtype, Hkv, D, mean_heads, packed, ragged in (
        (torch.bfloat16, 3, 64, False, False, True),
        (torch.bfloat16, 8, 128, False, False, True),
        (torch.bfloat16, 8, 128, False, False, False),
        (torch.bfloat16, 8, 128, True, False, True),
        (torch.bfloat16, 8, 128, False, True, False),
        (torch.bfloat16, 5, 80, False, False, True),
        (torch.bfloat16, 64, 128, False, False, True),
        (torch.float16, 8, 128, False, False, True),
        (torch.float32, 8, 128, False, False, True),
    ):
        width = D if mean_heads else Hkv * D
        config = pooling_config(arch, 16 * 512, width)
        name = f"{TYPES[dtype]}-h{Hkv}-d{D}" + "-heads" * mean_heads + "-packed" * packed + "-ragged" * ragged
        absent = (() if packed else ("cu_seqlens",)) + (() if ragged else ("lengths",))
        tiles = dict(ROWS=config.rows, PACKED=packed, WIDTH=width)
        block = tiles | dict(D=D, HEADS=Hkv if mean_heads else 1, BM=config.block, BW=config.columns)
        add = tiles | dict(MEAN=True, BT=ADD_TILES, BW=config.add_columns)
        for kind, function, flags, warps in (
            ("pool_tiles", pool_tiles_kernel, block, config.warps),
            ("add_tiles", add_tiles_kernel, add, 4),
            ("pool_backward", pool_backward_kernel, block | dict(MEAN=True), config.warps),
        ):
            found.append(variant(f"{kind}-{name}", function, dtype, flags, absent=absent, warps=warps))
    return found
