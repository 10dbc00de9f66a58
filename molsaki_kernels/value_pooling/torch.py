"""Value pooling in PyTorch operations: every floating dtype, any device."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from molsaki_kernels.spec import PoolingOptions

NAME = "torch"
ROWS = 1024  # tokens per block: a block of values and its square stay in cache


def why_not(v: Tensor) -> str | None:
    """Return None: all values can be pooled."""
    return None


def forward(v: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, options: PoolingOptions) -> Tensor:
    """Compute h, ``(N, width)`` float32 (float64 for float64)."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    width = v.shape[3] * (1 if options.mean_heads else v.shape[1])
    N = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    pooled = torch.zeros(N, width, dtype=dtype, device=v.device)
    for block in _blocks(v, lengths, cu_seqlens, options):
        weight = torch.rsqrt(block.x.square().mean(-1) + options.eps)  # (n, m)
        if block.padding is not None:
            weight = weight.masked_fill_(block.padding, 0)
        if options.mean:
            weight = weight / block.total
        if block.owner is None:
            pooled += (weight[:, None] @ block.x)[:, 0]
        elif block.only is not None:
            pooled[block.only] += weight[0] @ block.x[0]
        else:  # not a product with a matrix of zeros, which would spread a NaN to other sequences
            pooled.index_add_(0, block.owner, weight[0, :, None] * block.x[0])
    return pooled


def backward(
    dpooled: Tensor, v: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, options: PoolingOptions
) -> Tensor:
    """Compute dv in v's dtype."""
    dv = torch.zeros_like(v)
    for block in _blocks(v, lengths, cu_seqlens, options):
        x = block.x
        norm = torch.rsqrt(x.square().mean(-1, keepdim=True) + options.eps)  # (n, m, 1)
        if block.owner is None:
            upstream = dpooled[:, None]  # (n, 1, width)
        elif block.only is not None:
            upstream = dpooled[None, None, block.only]
        else:
            upstream = dpooled[None, block.owner]  # (1, m, width)
        dx = (upstream - x * (norm.square() * (upstream * x).mean(-1, keepdim=True))) * norm
        if block.padding is not None:
            dx = dx.masked_fill_(block.padding[..., None], 0)
        if options.mean:
            dx = dx / block.total[..., None]
        if options.mean_heads:
            dx = (dx / v.shape[1])[:, None]
        else:
            dx = dx.unflatten(-1, (v.shape[1], v.shape[3])).transpose(1, 2)
        dv[:, :, block.tokens] = dx.to(v.dtype)
    return dv


class _Block(NamedTuple):
    """Some tokens of every padded sequence, or of the packed ones."""

    tokens: slice
    x: Tensor  # (n, m, width), 0 for padding, which may hold any value; n is 1 for packed sequences
    padding: Tensor | None  # (n, m): True for tokens from the sequence's length on; None: there are none
    total: Tensor  # (n, 1), (1, m) or (1, 1): tokens of the sequence, at least 1
    owner: Tensor | None  # (m,): the sequence of each packed token; None for padded sequences
    only: int | None  # the packed sequence, if all tokens are of one


def _blocks(v: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, options: PoolingOptions) -> Iterator[_Block]:
    dtype, device = torch.promote_types(v.dtype, torch.float32), v.device
    bounds = [0, v.shape[2]] if cu_seqlens is None else cu_seqlens.tolist()
    begin, end = bounds[0], bounds[-1]
    packed = None
    if cu_seqlens is not None:
        starts, counts = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        packed = (
            torch.arange(len(counts), device=device).repeat_interleave(counts, output_size=end - begin),
            starts,
            counts,
        )
    for start in range(begin, end, ROWS):
        tokens = slice(start, min(start + ROWS, end))
        x = v[:, :, tokens].to(dtype)
        x = x.mean(1) if options.mean_heads else x.transpose(1, 2).flatten(2)
        position = torch.arange(tokens.start, tokens.stop, device=device)
        owner = only = padding = None
        if packed is None:
            limit = None if lengths is None else lengths[:, None]
            total = torch.full((1, 1), end, device=device) if limit is None else limit.clamp(1, end)
        else:
            owners, starts, counts = packed
            owner = owners[tokens.start - begin : tokens.stop - begin]
            first = bisect.bisect_right(bounds, tokens.start) - 1
            only = first if bounds[first + 1] >= tokens.stop else None
            position = position - starts[owner]
            limit = None if lengths is None else lengths[owner]
            total = counts[owner] if limit is None else torch.minimum(limit.clamp_min(1), counts[owner])
            total = total[None]
        if limit is not None:
            padding = (position >= limit).expand(x.shape[:2])
            x = x.masked_fill(padding[..., None], 0)
        yield _Block(tokens, x, padding, total.to(dtype), owner, only)
