"""Strides that kernels require of their inputs, and that operators promise for their outputs."""

from __future__ import annotations

import torch
from torch import Tensor


def with_contiguous_head_dim(x: Tensor) -> Tensor:
    """Return ``x``, or a contiguous copy if the stride of its last dimension is not 1, as all kernels require."""
    return x if x.stride(-1) == 1 else x.contiguous()


def aligned(x: Tensor) -> Tensor:
    """Return ``x``, or a copy if a row does not begin at a multiple of 16 bytes with a contiguous last dimension.

    CUDA's flash attention reads 16 bytes at a time; a slice of a fused projection may begin anywhere.
    """
    of = 16 // x.element_size()
    rows = (stride for stride, n in zip(x.stride()[:-1], x.shape, strict=False) if n > 1)
    if x.stride(-1) == 1 and not any(offset % of for offset in (x.storage_offset(), *rows)):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def dense_strides(x: Tensor) -> tuple[int, ...]:
    """Return the strides of ``x (B, H, M, D)``, or those of a tensor without gaps if ``x`` has gaps."""
    _, H, M, D = x.shape
    dense = x.is_contiguous() or x.stride() == (M * H * D, D, H * D, 1) or x.transpose(1, 2).is_contiguous()
    return (x if dense else torch.empty_like(x, device="meta")).stride()


def out_strides(q: Tensor, value_dim: int) -> tuple[int, ...]:
    """Return the strides of out ``(B, Hq, M, value_dim)`` in q's layout without gaps; value_dim is not q's width."""
    B, H, M, _ = q.shape
    if not q.is_contiguous() and q.transpose(1, 2).is_contiguous():
        return M * H * value_dim, value_dim, H * value_dim, 1
    return H * M * value_dim, M * value_dim, value_dim, 1


def empty_out(q: Tensor, v: Tensor) -> Tensor:
    """Return memory for out ``(B, Hq, M, Dv)`` in q's layout, where v is ``(B, Hkv, M, Dv)``."""
    if q.shape[-1] == v.shape[-1]:
        return torch.empty_like(q)
    return q.new_empty_strided((*q.shape[:3], v.shape[-1]), out_strides(q, v.shape[-1]))


def match_strides(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return ``x`` with the given strides; it is copied if they differ in a dimension of more than one entry."""
    if x.stride() == strides:
        return x
    if all(n == 1 or given == wanted for n, given, wanted in zip(x.shape, x.stride(), strides, strict=True)):
        return x.as_strided(x.shape, strides)
    return x.new_empty_strided(x.shape, strides).copy_(x)
