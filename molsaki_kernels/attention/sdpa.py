"""PyTorch's own flash attention: the CPU flash operator, and on CUDA aten's flash and cuDNN's attention.

Their backward drops the gradient of lse, so it is folded into O (``fold.py``; float16 widens the head dimension or, on
a CPU, runs in float32). Sinks need no support of theirs: with lse' = logaddexp(lse, sink), out' = out exp(lse - lse')
is the attention with sinks, and a flash backward that is handed out' and lse' recomputes exactly its weights.

The CPU operator knows no window and no packing: a window is walked in row blocks that see only their keys, packed
sequences one by one. It has no fast float16 either (measured: 6 times slower than float32 on AVX-512), so float16 runs
in float32 there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from molsaki_kernels.attention.lse_gradient import fold, widen
from molsaki_kernels.attention.sinks import with_sinks
from molsaki_kernels.spec import AttentionOptions, AttentionRequest

NAME = "sdpa"
aten = torch.ops.aten
WINDOW_BLOCK = 512  # rows at a time under a window: their mask is (rows, rows + window) floats


def available() -> str | None:
    """None: both operators come with PyTorch."""
    return None


def why_not(call: AttentionRequest) -> str | None:
    """Why this engine cannot do ``call``, or None."""
    if call.options.softcap is not None:
        return "PyTorch's flash attention has no softcap"
    if call.device.type == "cpu":
        return "the CPU flash operator gives NaN at a scale of 0" if call.options.scale == 0 else None
    if call.device.type != "cuda":
        return f"no flash attention for {call.device.type} tensors"
    if call.dtype not in (torch.bfloat16, torch.float16):
        return f"CUDA flash attention takes bfloat16 and float16, not {call.dtype}"
    limit = 248 if call.dtype == torch.float16 and call.backward else 256  # float16's fold needs 8 more columns
    if call.head_dim % 8 or call.head_dim > limit:
        return f"CUDA flash attention takes head_dim in multiples of 8 up to {limit}, not {call.head_dim}"
    if call.options.window is not None and not call.options.causal:
        return "CUDA flash attention has no window without causality"
    if call.options.scale <= 0:
        return f"CUDA flash attention takes a positive scale, not {call.options.scale}"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, cu_seqlens: Tensor | None, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """out ``(B, Hq, M, D)`` in q's dtype and lse ``(B, Hq, M)`` float32 (float64 for float64)."""
    if q.device.type == "cpu":
        out, lse = _cpu_forward(*_computed(q, k, v), cu_seqlens, options)
    else:
        out, lse = _cuda_forward(q, k, v, cu_seqlens, options)
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    return out.to(q.dtype), lse


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
    del sinks  # out and lse count them already
    if q.device.type == "cpu":
        q_, k_, v_, out, dout = _computed(q, k, v, out, dout)
        if dlse is not None:
            out, dout = fold(out, dout, dlse)
        dq, dk, dv = _cpu_backward(dout, q_, k_, v_, out, lse, cu_seqlens, options)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
    if dlse is not None and q.dtype == torch.float16:
        D = q.shape[-1]
        q, k, v, out, dout = widen(q, k, v, out, dout, dlse)
        dq, dk, dv = _cuda_backward(dout, q, k, v, out, lse, cu_seqlens, options)
        return dq[..., :D], dk[..., :D], dv[..., :D]
    if dlse is not None:
        out, dout = fold(out, dout, dlse)
    return _cuda_backward(dout, q, k, v, out, lse, cu_seqlens, options)


def _computed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As the CPU operator takes them: no float16, last dimension contiguous."""
    tensors = tuple(t.float() if t.dtype == torch.float16 else t for t in tensors)
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def _cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    operator = aten._scaled_dot_product_flash_attention_for_cpu
    outs, lses = [], []
    for rows, keys, mask in _cpu_blocks(q, cu_seqlens, options):
        block_out, block_lse = operator(
            q[:, :, rows],
            k[:, :, keys],
            v[:, :, keys],
            0.0,
            options.causal and mask is None,
            attn_mask=mask,
            scale=options.scale,
        )
        outs.append(block_out)
        lses.append(block_lse)
    if not outs:
        return torch.zeros_like(q), q.new_zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, 2), torch.cat(lses, 2))


def _cpu_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    operator = aten._scaled_dot_product_flash_attention_for_cpu_backward
    dq, dk, dv = None, None, None
    for rows, keys, mask in _cpu_blocks(q, cu_seqlens, options):
        block = operator(
            dout[:, :, rows],
            q[:, :, rows],
            k[:, :, keys],
            v[:, :, keys],
            out[:, :, rows],
            lse[:, :, rows],
            0.0,
            options.causal and mask is None,
            attn_mask=mask,
            scale=options.scale,
        )
        if rows == keys == slice(0, q.shape[2]):
            return block
        if dq is None:  # blocks overlap in their keys: add them up in the accumulator's dtype
            dtype = torch.promote_types(q.dtype, torch.float32)
            dq, dk, dv = (torch.zeros(t.transpose(1, 2).shape, dtype=dtype).transpose(1, 2) for t in (q, k, v))
        dq[:, :, rows] = block[0]
        dk[:, :, keys] += block[1]
        dv[:, :, keys] += block[2]
    if dq is None:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    return dq, dk, dv


def _cpu_blocks(
    q: Tensor, cu_seqlens: Tensor | None, options: AttentionOptions
) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """What the CPU operator is called on: rows, the keys they see, and the mask if causality alone does not say it."""
    B, H, M, _ = q.shape
    bounds = [0, M] if cu_seqlens is None else cu_seqlens.tolist()
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        window = end - begin if options.window is None else min(options.window, end - begin)
        if B == 0 or H == 0 or begin == end:
            continue
        if window == end - begin and (options.causal or options.window is None or options.window >= end - begin):
            yield slice(begin, end), slice(begin, end), None
            continue
        first = begin
        if options.causal:  # the first `window` rows see every key before them
            first = begin + window
            yield slice(begin, first), slice(begin, first), None
        for start in range(first, end, WINDOW_BLOCK):
            stop = min(start + WINDOW_BLOCK, end)
            low, high = max(begin, start - window + 1), stop if options.causal else end
            row, column = torch.arange(start, stop)[:, None], torch.arange(low, high)
            hidden = column <= row - window
            if options.causal:
                hidden |= column > row
            mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, float("-inf"))
            yield slice(start, stop), slice(low, high), mask


def _use_cudnn(q: Tensor, cu_seqlens: Tensor | None, options: AttentionOptions) -> bool:
    """cuDNN is the faster one on Hopper and later; it has no variant that is deterministic, windowed or packed here."""
    return (
        cu_seqlens is None
        and options.window is None
        and q.shape[-1] <= 128
        and torch.version.hip is None
        and torch.backends.cuda.cudnn_sdp_enabled()
        and torch.cuda.get_device_capability(q.device)[0] >= 9
        and not torch.are_deterministic_algorithms_enabled()
    )


def _cuda_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    if _use_cudnn(q, cu_seqlens, options):
        result = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, options.causal, False, scale=options.scale
        )
        return result[0], result[1].reshape(q.shape[:3])
    q, k, v, bounds, longest, window = _flash_arguments(q, k, v, cu_seqlens, options)
    result = aten._flash_attention_forward(
        q, k, v, bounds, bounds, longest, longest, 0.0, options.causal, False, scale=options.scale, **window
    )
    out, lse = result[:2]
    if bounds is not None:
        out, lse = out[None], lse[None]
    return out.transpose(1, 2), lse


def _cuda_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    if _use_cudnn(q, cu_seqlens, options):
        state = torch.empty((), dtype=torch.int64, device=q.device)  # of a dropout that is not there: never read
        M = q.shape[2]
        return aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse[..., None], state, state, None, None, None, M, M, 0.0, options.causal,
            scale=options.scale,
        )  # fmt: skip
    q, k, v, bounds, longest, window = _flash_arguments(q, k, v, cu_seqlens, options)
    dout, out = (t.transpose(1, 2) for t in (dout, out))
    if bounds is not None:
        dout, out, lse = dout[0], out[0], lse[0]
    state = torch.empty(2, dtype=torch.uint64, device=q.device)  # as above
    unused = torch.empty((), dtype=torch.uint64, device=q.device)
    grads = aten._flash_attention_backward(
        dout, q, k, v, out, lse, bounds, bounds, longest, longest, 0.0, options.causal, state, unused,
        scale=options.scale, **window,
    )  # fmt: skip
    if bounds is not None:
        grads = tuple(g[None] for g in grads)
    return tuple(g.transpose(1, 2) for g in grads)


def _flash_arguments(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, options: AttentionOptions):
    """aten's layout: ``(B, M, H, D)``, or ``(total, H, D)`` packed. The longest sequence is not known on the host
    without a synchronisation; the total is a bound that costs idle blocks only."""
    M = q.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if cu_seqlens is not None:
        q, k, v = q[0], k[0], v[0]
    window = {}
    if options.window is not None:
        window = dict(window_size_left=options.window - 1, window_size_right=0)
    return q, k, v, cu_seqlens, M, window
