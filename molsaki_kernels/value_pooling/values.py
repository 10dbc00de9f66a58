"""Eq. 5's h: the value vectors, RMS-normalised over their width and added up over a sequence's tokens.

x_i = V_i (all heads side by side, width Hkv * D; or the mean of the heads, width D)
r_i = (mean(x_i^2) + eps)^-1/2,   y_i = r_i x_i,   h = sum_i y_i   (or the mean over the sequence)
dx_i = r_i (dh - y_i mean(dh * y_i))
"""

from __future__ import annotations

import torch
from torch import Tensor

from molsaki_kernels import validation as checks
from molsaki_kernels.direct_call import function, is_plain, is_plain_backward, without_autocast
from molsaki_kernels.strides import contiguous_rows

ROWS = 1024  # tokens at a time: a block of values and its square stay in cache


def pool_values(
    v: Tensor,
    lengths: Tensor | None = None,
    *,
    eps: float = 1e-6,
    pooling: str = "sum",
    heads: str = "concat",
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Pooled value vectors of each sequence, the router's input (MoLSAKI, arXiv 2604.15701, Eq. 5).

    Args:
        v: ``(B, Hkv, M, D)`` value states, any floating dtype.
        lengths: ``(N,)`` integers; tokens from this one on are padding and stay out. None: there is no padding.
        eps: of the RMS norm.
        pooling: "sum" (the paper's) or "mean" over a sequence's tokens.
        heads: "concat" normalises over the width Hkv * D; "mean" averages the heads first and normalises over D.
        cu_seqlens: ``(N + 1,)`` int32 boundaries of packed sequences, ``v`` being ``(1, Hkv, total, D)``.
        backend: "auto", "triton" or "torch".

    Returns:
        ``(N, Hkv * D)``, or ``(N, D)`` with ``heads="mean"``; float32 (float64 for float64). A sequence without tokens
        gives zeros. Differentiable in ``v``.

    Raises:
        TypeError, ValueError: the message names the argument and what was expected.
    """
    if v.dim() != 4 or not v.is_floating_point():
        raise ValueError(f"v: expected a floating (B, Hkv, M, D) tensor, got {v.dtype} {tuple(v.shape)}")
    if pooling not in ("sum", "mean"):
        raise ValueError(f'pooling: expected "sum" or "mean", got {pooling!r}')
    if heads not in ("concat", "mean"):
        raise ValueError(f'heads: expected "concat" or "mean", got {heads!r}')
    sequences = v.shape[0]
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, v, "v")
        sequences = cu_seqlens.shape[0] - 1
    if lengths is not None:
        if lengths.is_floating_point() or lengths.dtype == torch.bool or lengths.shape != (sequences,):
            raise ValueError(f"lengths: expected ({sequences},) integers, got {lengths.dtype} {tuple(lengths.shape)}")
        if lengths.device != v.device:
            raise ValueError(f"lengths: expected on v's device {v.device}, got {lengths.device}")
    backend = checks.choose_backend(backend, v)
    run = _plain_pool_values if is_plain(v) else torch.ops.molsaki.pool_values
    return run(v, lengths, eps, pooling == "mean", heads == "mean", cu_seqlens, backend)


def _forward(
    v: Tensor,
    lengths: Tensor | None,
    eps: float,
    mean: bool,
    mean_heads: bool,
    cu_seqlens: Tensor | None,
    backend: str,
) -> Tensor:
    if backend == "triton":
        from molsaki_kernels._triton.value_pooling import pool_values_forward

        return pool_values_forward(contiguous_rows(v), lengths, eps, mean, mean_heads, cu_seqlens)
    with without_autocast(v):
        return forward(v, lengths, eps, mean, mean_heads, cu_seqlens)


_pool_values = torch.library.custom_op("molsaki::pool_values", mutates_args=())(_forward)


@_pool_values.register_fake
def _(v, lengths, eps, mean, mean_heads, cu_seqlens, backend):
    N = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    width = v.shape[3] * (1 if mean_heads else v.shape[1])
    return v.new_empty((N, width), dtype=torch.promote_types(v.dtype, torch.float32))


def _gradient(
    dpooled: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    eps: float,
    mean: bool,
    mean_heads: bool,
    cu_seqlens: Tensor | None,
    backend: str,
) -> Tensor:
    if backend == "triton":
        from molsaki_kernels._triton.value_pooling import pool_values_backward

        dv = pool_values_backward(dpooled, contiguous_rows(v), lengths, eps, mean, mean_heads, cu_seqlens)
        return dv if dv.stride() == v.stride() else torch.empty_like(v).copy_(dv)
    with without_autocast(v):
        return backward(dpooled, v, lengths, eps, mean, mean_heads, cu_seqlens)


_pool_values_backward = torch.library.custom_op("molsaki::pool_values_backward", mutates_args=())(_gradient)


@_pool_values_backward.register_fake
def _(dpooled, v, *rest):
    return torch.empty_like(v)


def _setup(ctx, inputs, output):
    v, lengths, *options, cu_seqlens, backend = inputs
    ctx.save_for_backward(v, lengths, cu_seqlens)
    ctx.options, ctx.backend = options, backend


def _backward(ctx, dpooled, run=_pool_values_backward):
    v, lengths, cu_seqlens = ctx.saved_tensors
    return run(dpooled, v, lengths, *ctx.options, cu_seqlens, ctx.backend), *(None,) * 6


def _plain_backward(ctx, dpooled):
    return _backward(ctx, dpooled, _gradient if is_plain_backward(dpooled) else _pool_values_backward)


_pool_values.register_autograd(_backward, setup_context=_setup)
_plain_pool_values = function("molsaki_pool_values", _forward, _setup, _plain_backward)


def forward(v: Tensor, lengths: Tensor | None, eps: float, mean: bool, mean_heads: bool, cu_seqlens: Tensor | None):
    """``pool_values`` in plain PyTorch."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    width = v.shape[3] * (1 if mean_heads else v.shape[1])
    N = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    pooled = torch.zeros(N, width, dtype=dtype, device=v.device)
    for n, _, x, keep, count in _blocks(v, lengths, mean_heads, cu_seqlens):
        weight = torch.rsqrt(x.square().mean(-1) + eps)  # (n, m)
        weight = (weight * keep) / count if mean else weight * keep
        pooled[n] += (weight[:, None] @ x)[:, 0]
    return pooled


def backward(
    dpooled: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    eps: float,
    mean: bool,
    mean_heads: bool,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """dv in v's dtype."""
    dv = torch.zeros_like(v)
    for n, rows, x, keep, count in _blocks(v, lengths, mean_heads, cu_seqlens):
        norm = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)  # (n, m, 1)
        upstream = dpooled[n][:, None]  # (n, 1, width)
        dx = (upstream - x * (norm.square() * (upstream * x).mean(-1, keepdim=True))) * (norm * keep[..., None])
        if mean:
            dx = dx / count[..., None]
        if mean_heads:
            dx = (dx / v.shape[1])[:, None]
        else:
            dx = dx.unflatten(-1, (v.shape[1], v.shape[3])).transpose(1, 2)
        dv[slice(None) if cu_seqlens is not None else n, :, rows] = dx.to(v.dtype)
    return dv


def _blocks(v: Tensor, lengths: Tensor | None, mean_heads: bool, cu_seqlens: Tensor | None):
    """Sequences, their rows of v, the width vectors ``(n, m, width)`` there, which count, and out of how many."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    M = v.shape[2]
    bounds = [0, M] if cu_seqlens is None else cu_seqlens.tolist()
    for i, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        n = slice(None) if cu_seqlens is None else slice(i, i + 1)
        for start in range(begin, end, ROWS):
            rows = slice(start, min(start + ROWS, end))
            x = v[:, :, rows].to(dtype)
            x = x.mean(1) if mean_heads else x.transpose(1, 2).flatten(2)
            position = torch.arange(rows.start - begin, rows.stop - begin, device=v.device)
            if lengths is None:
                keep = torch.ones_like(position, dtype=dtype)[None]
                count = torch.full((1, 1), end - begin, dtype=dtype, device=v.device)
            else:
                keep = (position < lengths[n, None]).to(dtype)
                count = lengths[n, None].clamp(1, end - begin).to(dtype)
            yield n, rows, x, keep, count
