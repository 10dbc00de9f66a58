"""Value pooling in PyTorch operations: every floating dtype, any device."""

from __future__ import annotations

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
        pooled[block.sequences] += (weight[:, None] @ block.x)[:, 0]
    return pooled


def backward(
    dpooled: Tensor, v: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, options: PoolingOptions
) -> Tensor:
    """Compute dv in v's dtype."""
    dv = torch.zeros_like(v)
    for block in _blocks(v, lengths, cu_seqlens, options):
        x = block.x
        norm = torch.rsqrt(x.square().mean(-1, keepdim=True) + options.eps)  # (n, m, 1)
        upstream = dpooled[block.sequences][:, None]  # (n, 1, width)
        dx = (upstream - x * (norm.square() * (upstream * x).mean(-1, keepdim=True))) * norm
        if block.padding is not None:
            dx = dx.masked_fill_(block.padding[..., None], 0)
        if options.mean:
            dx = dx / block.total[..., None]
        if options.mean_heads:
            dx = (dx / v.shape[1])[:, None]
        else:
            dx = dx.unflatten(-1, (v.shape[1], v.shape[3])).transpose(1, 2)
        batch = slice(None) if cu_seqlens is not None else block.sequences
        dv[batch, :, block.tokens] = dx.to(v.dtype)
    return dv


class _Block(NamedTuple):
    """Some tokens of one or all sequences."""

    sequences: slice
    tokens: slice
    x: Tensor  # (n, m, width), 0 for padding, which may hold any value
    padding: Tensor | None  # (n, m): True for tokens from the sequence's length on; None: there are none
    total: Tensor  # (1 or n, 1): tokens of the sequence, at least 1


def _blocks(v: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, options: PoolingOptions) -> Iterator[_Block]:
    dtype = torch.promote_types(v.dtype, torch.float32)
    bounds = [0, v.shape[2]] if cu_seqlens is None else cu_seqlens.tolist()
    for i, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        sequences = slice(None) if cu_seqlens is None else slice(i, i + 1)
        for start in range(begin, end, ROWS):
            tokens = slice(start, min(start + ROWS, end))
            x = v[:, :, tokens].to(dtype)
            x = x.mean(1) if options.mean_heads else x.transpose(1, 2).flatten(2)
            padding = None
            if lengths is None:
                total = torch.full((1, 1), end - begin, dtype=dtype, device=v.device)
            else:
                position = torch.arange(tokens.start - begin, tokens.stop - begin, device=v.device)
                padding = position >= lengths[sequences, None]
                x = x.masked_fill(padding[..., None], 0)
                total = lengths[sequences, None].clamp(1, end - begin).to(dtype)
            yield _Block(sequences, tokens, x, padding, total)
