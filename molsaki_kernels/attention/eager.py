"""Engine "eager": attention in PyTorch operations, one block of queries at a time: every option and dtype, any device.

Unlike the usual eager attention it does not keep M x M weights: a block's scores are recomputed in the backward pass.

    S = scale q k^T,  T = softcap tanh(S / softcap),  P = exp(T - lse),  O = P v
    dP = dO v^T,  dT = P (dP - (D - dlse)),  D = rowsum(dO O),  dS = dT (1 - (T / softcap)^2)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from molsaki_kernels.masking import visible
from molsaki_kernels.spec import (
    AttentionInputs,
    AttentionOptions,
    AttentionOutputs,
    AttentionRequest,
    InputGradients,
    OutputGradients,
    PlanTensors,
)
from molsaki_kernels.strides import empty_out

NAME = "eager"
COMPUTES_MAP = False
DIFFERENTIABLE = False
BLOCK_ELEMENTS = 1 << 22  # of a block's scores over all heads (16 MiB in float32)


def available() -> str | None:
    """Return None: PyTorch operations run on every machine."""
    return None


def why_not(request: AttentionRequest) -> str | None:
    """Return None: every call is supported."""
    return None


def takes_value_dim(request: AttentionRequest, value_dim: int) -> bool:
    """Return True: v may have any width."""
    return True


def forward(inputs: AttentionInputs, options: AttentionOptions, plan: PlanTensors) -> AttentionOutputs:
    """Compute out in q's dtype and lse in float32 (float64 for float64)."""
    q, sinks = inputs.q, inputs.sinks
    dtype = torch.promote_types(q.dtype, torch.float32)
    out, lse = empty_out(q, inputs.v), torch.empty(q.shape[:3], dtype=dtype, device=q.device)
    for rows, keys in _blocks(inputs, options):
        scores, _ = _scores(inputs, options, rows, keys)
        block_lse = scores.logsumexp(-1)
        if sinks is not None:
            block_lse = torch.logaddexp(block_lse, sinks.to(dtype)[:, None])
        weights = scores.sub_(block_lse[..., None]).exp_()
        out[:, :, rows] = weights @ _repeated(inputs.v, keys, q)
        lse[:, :, rows] = block_lse
    return AttentionOutputs(out, lse)


def backward(
    gradients: OutputGradients,
    inputs: AttentionInputs,
    outputs: AttentionOutputs,
    options: AttentionOptions,
    plan: PlanTensors,
) -> InputGradients:
    """Compute dq, dk and dv in the dtypes of q, k and v."""
    q, k, v, dout = inputs.q, inputs.k, inputs.v, gradients.dout
    assert dout is not None  # guaranteed by the protocol for engines that do not compute the map
    if q.numel() == 0:  # k may have heads although q has none
        return InputGradients(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
    dtype = torch.promote_types(q.dtype, torch.float32)
    G = q.shape[1] // k.shape[1]
    delta = (dout.to(dtype) * outputs.out).sum(-1)
    if gradients.dlse is not None:
        delta = delta - gradients.dlse
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (k, v))
    for rows, keys in _blocks(inputs, options):
        scores, slope = _scores(inputs, options, rows, keys)
        weights = scores.sub_(outputs.lse[:, :, rows, None]).exp_()
        block_dout = dout[:, :, rows].to(dtype)
        dv[:, :, keys] += (weights.transpose(-1, -2) @ block_dout).unflatten(1, (-1, G)).sum(2)
        dscores = block_dout @ _repeated(v, keys, q).transpose(-1, -2)
        dscores.sub_(delta[:, :, rows, None]).mul_(weights)
        if slope is not None:
            dscores.mul_(slope)
        dscores.mul_(options.scale)
        dq[:, :, rows] = dscores @ _repeated(k, keys, q)
        dk[:, :, keys] += (dscores.transpose(-1, -2) @ q[:, :, rows].to(dtype)).unflatten(1, (-1, G)).sum(2)
    return InputGradients(dq, dk.to(k.dtype), dv.to(v.dtype))


def _repeated(x: Tensor, keys: slice, q: Tensor) -> Tensor:
    """Return the keys or values of a block in the accumulator's dtype, repeated per query head: ``(B, Hq, n, D)``."""
    x = x[:, :, keys].to(torch.promote_types(q.dtype, torch.float32))
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _scores(
    inputs: AttentionInputs, options: AttentionOptions, rows: slice, keys: slice
) -> tuple[Tensor, Tensor | None]:
    """Compute the masked scores ``(B, Hq, m, n)`` of a block and, with a softcap, the slope of its tanh."""
    q = inputs.q
    keys_block = _repeated(inputs.k, keys, q)
    scores = (q[:, :, rows].to(keys_block.dtype) @ keys_block.transpose(-1, -2)).mul_(options.scale)
    slope = None
    if options.softcap is not None:
        scores.div_(options.softcap).tanh_()
        slope = 1 - scores.square()
        scores.mul_(options.softcap)
    row, column = (torch.arange(s.start, s.stop, device=q.device) for s in (rows, keys))
    hidden = ~visible(row, column, options.causal, options.window)
    return scores.masked_fill_(hidden, float("-inf")), slope


def _blocks(inputs: AttentionInputs, options: AttentionOptions) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of queries of each sequence, and the keys that one of these queries can see."""
    B, H = inputs.q.shape[:2]
    for begin, end in zip(inputs.bounds[:-1], inputs.bounds[1:], strict=True):
        size = max(16, BLOCK_ELEMENTS // max(B * H * (end - begin), 1))
        for start in range(begin, end, size):
            stop = min(start + size, end)
            low = begin if options.window is None else max(begin, start - options.window + 1)
            yield slice(start, stop), slice(low, stop if options.causal else end)
