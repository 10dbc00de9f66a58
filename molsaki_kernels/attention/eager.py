"""Attention in plain PyTorch operations, row block by row block: every option, every dtype, any device.

Not the eager attention that materialises ``M x M``: a block's scores are dropped and made again in the backward.

    S = scale q k^T,  T = softcap tanh(S / softcap),  P = exp(T - lse),  O = P v
    dP = dO v^T,  dT = P (dP - (D - dlse)),  D = rowsum(dO O),  dS = dT (1 - (T / softcap)^2)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from molsaki_kernels.reference import visible
from molsaki_kernels.spec import AttentionOptions, AttentionRequest

NAME = "eager"
BLOCK_ELEMENTS = 1 << 22  # of a block's scores over all heads (16 MiB in float32)


def available() -> str | None:
    """None: plain PyTorch runs everywhere."""
    return None


def why_not(call: AttentionRequest) -> str | None:
    """None: it can do every call."""
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, cu_seqlens: Tensor | None, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """out ``(B, Hq, M, D)`` in q's dtype and lse ``(B, Hq, M)`` float32 (float64 for float64)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=dtype, device=q.device)
    for rows, keys in _blocks(q, cu_seqlens, options):
        scores, _ = _scores(q, k, rows, keys, options)
        block_lse = scores.logsumexp(-1)
        if sinks is not None:
            block_lse = torch.logaddexp(block_lse, sinks.to(dtype)[:, None])
        weights = scores.sub_(block_lse[..., None]).exp_()
        out[:, :, rows] = weights @ _repeated(v, keys, q)
        lse[:, :, rows] = block_lse
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k, v."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    G = q.shape[1] // k.shape[1]
    delta = (dout.to(dtype) * out).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (k, v))
    for rows, keys in _blocks(q, cu_seqlens, options):
        scores, slope = _scores(q, k, rows, keys, options)
        weights = scores.sub_(lse[:, :, rows, None]).exp_()
        block_dout = dout[:, :, rows].to(dtype)
        dv[:, :, keys] += (weights.transpose(-1, -2) @ block_dout).unflatten(1, (-1, G)).sum(2)
        dscores = block_dout @ _repeated(v, keys, q).transpose(-1, -2)
        dscores.sub_(delta[:, :, rows, None]).mul_(weights)
        if slope is not None:
            dscores.mul_(slope)
        dscores.mul_(options.scale)
        dq[:, :, rows] = dscores @ _repeated(k, keys, q)
        dk[:, :, keys] += (dscores.transpose(-1, -2) @ q[:, :, rows].to(dtype)).unflatten(1, (-1, G)).sum(2)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _repeated(x: Tensor, keys: slice, q: Tensor) -> Tensor:
    """Keys or values of a block in the accumulator's dtype, once a query head: ``(B, Hq, n, D)``."""
    x = x[:, :, keys].to(torch.promote_types(q.dtype, torch.float32))
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _scores(q: Tensor, k: Tensor, rows: slice, keys: slice, options: AttentionOptions) -> tuple[Tensor, Tensor | None]:
    """Masked scores ``(B, Hq, m, n)`` of a block and, with a softcap, the slope of its tanh."""
    keys_block = _repeated(k, keys, q)
    scores = (q[:, :, rows].to(keys_block.dtype) @ keys_block.transpose(-1, -2)).mul_(options.scale)
    slope = None
    if options.softcap is not None:
        scores.div_(options.softcap).tanh_()
        slope = 1 - scores.square()
        scores.mul_(options.softcap)
    row, column = (torch.arange(s.start, s.stop, device=q.device) for s in (rows, keys))
    hidden = ~visible(row, column, options.causal, options.window)
    return scores.masked_fill_(hidden, float("-inf")), slope


def _blocks(q: Tensor, cu_seqlens: Tensor | None, options: AttentionOptions) -> Iterator[tuple[slice, slice]]:
    """Row blocks of each sequence and the keys that one of their rows can see."""
    B, H, M, _ = q.shape
    bounds = [0, M] if cu_seqlens is None else cu_seqlens.tolist()
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        size = max(16, BLOCK_ELEMENTS // max(B * H * (end - begin), 1))
        for start in range(begin, end, size):
            stop = min(start + size, end)
            low = begin if options.window is None else max(begin, start - options.window + 1)
            yield slice(start, stop), slice(low, stop if options.causal else end)
