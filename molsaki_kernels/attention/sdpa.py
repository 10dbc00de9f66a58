"""Engine "sdpa": PyTorch's flash attention: its CPU operator, and on CUDA aten's flash attention or cuDNN's.

Their backward passes drop the gradient of lse, so it is folded into O (``lse_gradient.py``; float16 widens the head
dimension or, on a CPU, is computed in float32). They do not support sinks, which are added afterwards (``sinks.py``).

The CPU operator supports neither a window nor packing: a window is computed in blocks of queries with the keys that
they see, packed sequences one by one. Its float16 is slow (6 times slower than float32 on AVX-512, measured), so
float16 is computed in float32 there.

On CUDA, cuDNN is faster on Hopper, but builds a plan for every new combination of shapes and strides, which takes 50 ms
a pass. A batch that is padded to a new length would wait for it, so aten's flash attention serves a combination
until cuDNN would have saved as much time as its plan costs (``CUDNN_PAYS``). Forward and backward are counted and
decided separately. Either backward is correct after either forward: without dropout both read nothing of the forward
but O and the natural log-sum-exp in float32, ``(B, H, M)``, and this engine already gives them an O and an lse of its
own (folded, with sinks). The two differ by rounding only; deterministic mode always takes aten's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from molsaki_kernels._capability import why_too_old
from molsaki_kernels.attention.lse_gradient import append_dlse_column, fold_dlse_into_out
from molsaki_kernels.attention.sinks import apply_sinks
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
from molsaki_kernels.strides import aligned, dense_strides, match_strides

NAME = "sdpa"
COMPUTES_MAP = False
DIFFERENTIABLE = False
WINDOW_BLOCK = 512  # queries per block under a window: a block's mask has (rows, rows + window) elements
aten: Any = torch.ops.aten

# cuDNN serves a combination of shapes and strides once aten's flash attention has computed this many floating-point
# operations for it (those of the forward, also where the backward is counted). Measured on an H200 at 1 x 4,096 tokens
# with 32 heads of 128: cuDNN saves 1.8 s per 1e15 in the forward (0.28 against 0.52 ms) and 3.9 in the backward, and a
# plan takes 0.05 s in each (layer-h200.csv, experiments-h200.csv). That is the work of 200 layers there.
CUDNN_PAYS = 3e13
CUDNN_ROWS = 64  # with fewer, cuDNN is not faster, and some of its engines have no plan
KEPT = 1024  # combinations whose work is remembered
# PyTorch then rounds lengths up for cuDNN and expects lse in a layout that differs from that of its forward here.
ROUNDED_LENGTHS = os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE") == "1"

_work: dict[Hashable, float] = {}  # floating-point operations of each combination; the least recent first
_work_lock = threading.Lock()
_plans = threading.local()  # .keys: the combinations that cuDNN has a plan for; PyTorch keeps plans per thread


def available() -> str | None:
    """Return None: all three operators are part of PyTorch."""
    return None


def why_not(request: AttentionRequest) -> str | None:
    """Return the reason why the engine cannot serve a call, or None."""
    if request.options.softcap is not None:
        return "PyTorch's flash attention has no softcap"
    if request.device.type == "cpu":
        # The causal mask is applied before the scale, so a negative scale would turn -inf into +inf.
        if request.options.scale == 0 or (request.options.scale < 0 and request.options.causal):
            return f"the CPU flash operator gives NaN at a scale of {request.options.scale:g}"
        return None
    if request.device.type != "cuda":
        return f"no flash attention for {request.device.type} tensors"
    if (reason := why_too_old(request.device)) is not None:
        return reason
    if request.dtype not in (torch.bfloat16, torch.float16):
        return f"CUDA flash attention takes bfloat16 and float16, not {request.dtype}"
    limit = 248 if request.dtype == torch.float16 and request.backward else 256  # float16's fold needs 8 more columns
    if request.head_dim % 8 or request.head_dim > limit:
        return f"CUDA flash attention takes head_dim in multiples of 8 up to {limit}, not {request.head_dim}"
    if request.options.window is not None and not request.options.causal:
        return "CUDA flash attention has no window without causality"
    if request.options.scale <= 0:
        return f"CUDA flash attention takes a positive scale, not {request.options.scale}"
    return None


def takes_value_dim(request: AttentionRequest, value_dim: int) -> bool:
    """Return whether v is as wide as q and k."""
    return value_dim == request.head_dim


def folds_dlse(inputs: AttentionInputs) -> bool:
    """Return whether backward takes O' and dO': on CUDA, where they are as wide as O."""
    return inputs.q.device.type != "cpu" and inputs.q.dtype != torch.float16


def gradient_strides(x: Tensor) -> tuple[int, ...]:
    """Return the strides of x's gradient: the CPU operator returns ``(B, M, H, D)`` in memory."""
    if x.device.type == "cpu":
        B, H, M, D = x.shape
        return M * H * D, D, H * D, 1
    return x.stride() if x.is_contiguous() else dense_strides(x)


def forward(inputs: AttentionInputs, options: AttentionOptions, plan: PlanTensors) -> AttentionOutputs:
    """Compute out in q's dtype and lse in float32 (float64 for float64)."""
    q = inputs.q
    if q.device.type == "cpu":
        out, lse = _cpu_forward(inputs, options)
    else:
        out, lse = _cuda_forward(inputs, options)
    if inputs.sinks is not None:
        out, lse = apply_sinks(out, lse, inputs.sinks)
    return AttentionOutputs(out.to(q.dtype), lse)


def backward(
    gradients: OutputGradients,
    inputs: AttentionInputs,
    outputs: AttentionOutputs,
    options: AttentionOptions,
    plan: PlanTensors,
) -> InputGradients:
    """Compute dq, dk and dv in the dtypes of q, k and v."""
    q, k, v, out, lse = inputs.q, inputs.k, inputs.v, outputs.out, outputs.lse
    dout, dlse = gradients.dout, gradients.dlse
    assert dout is not None  # guaranteed by the protocol for engines that do not compute the map
    if q.device.type == "cpu":
        out, dout = _cpu_operands(out, dout)
        if dlse is not None:
            out, dout = fold_dlse_into_out(out, dout, dlse)
        dq, dk, dv = _cpu_backward(dout, inputs, AttentionOutputs(out, lse), options)
        return InputGradients(dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype))
    if dlse is not None and q.dtype == torch.float16:
        D = q.shape[-1]
        q, k, v, out, dout = append_dlse_column(q, k, v, out, dout, dlse)
        wide = AttentionInputs(q, k, v, None, inputs.cu_seqlens)
        dq, dk, dv = _cuda_backward(dout, wide, AttentionOutputs(out, lse), options)
        return InputGradients(dq[..., :D], dk[..., :D], dv[..., :D])
    if dlse is not None:
        out, dout = fold_dlse_into_out(out, dout, dlse)
    return InputGradients(*_cuda_backward(dout, inputs, AttentionOutputs(out, lse), options))


def _cpu_operands(*tensors: Tensor) -> list[Tensor]:
    """Return tensors as the CPU operator takes them: not float16, last dimension contiguous."""
    operands = []
    for x in tensors:
        x = x.float() if x.dtype == torch.float16 else x
        operands.append(x if x.stride(-1) == 1 else x.contiguous())
    return operands


def _cpu_forward(inputs: AttentionInputs, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    operator = aten._scaled_dot_product_flash_attention_for_cpu
    q, k, v = _cpu_operands(inputs.q, inputs.k, inputs.v)
    outs, lses = [], []
    for rows, keys, mask in _cpu_blocks(inputs, options, q.dtype):
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
    dout: Tensor, inputs: AttentionInputs, outputs: AttentionOutputs, options: AttentionOptions
) -> tuple[Tensor, Tensor, Tensor]:
    operator = aten._scaled_dot_product_flash_attention_for_cpu_backward
    q, k, v = _cpu_operands(inputs.q, inputs.k, inputs.v)
    gradients = None
    for rows, keys, mask in _cpu_blocks(inputs, options, q.dtype):
        block: tuple[Tensor, Tensor, Tensor] = operator(
            dout[:, :, rows],
            q[:, :, rows],
            k[:, :, keys],
            v[:, :, keys],
            outputs.out[:, :, rows],
            outputs.lse[:, :, rows],
            0.0,
            options.causal and mask is None,
            attn_mask=mask,
            scale=options.scale,
        )
        if rows == keys == slice(0, q.shape[2]):
            return block
        if gradients is None:  # the blocks' keys overlap: accumulate in the accumulator's dtype
            dtype = torch.promote_types(q.dtype, torch.float32)
            shapes = [t.transpose(1, 2).shape for t in (q, k, v)]
            gradients = [torch.zeros(shape, dtype=dtype, device=q.device).transpose(1, 2) for shape in shapes]
        dq, dk, dv = gradients
        dq[:, :, rows] = block[0]
        dk[:, :, keys] += block[1]
        dv[:, :, keys] += block[2]
    if gradients is None:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    return dq, dk, dv


def _cpu_blocks(
    inputs: AttentionInputs, options: AttentionOptions, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Yield the CPU operator's calls: queries, the keys they see, and a mask in ``dtype`` unless causality suffices."""
    B, H = inputs.q.shape[:2]
    for begin, end in zip(inputs.bounds[:-1], inputs.bounds[1:], strict=True):
        window = end - begin if options.window is None else min(options.window, end - begin)
        if B == 0 or H == 0 or begin == end:
            continue
        if window == end - begin and (options.causal or options.window is None or options.window >= end - begin):
            yield slice(begin, end), slice(begin, end), None
            continue
        first = begin
        if options.causal:  # the first `window` queries see every key before them
            first = begin + window
            yield slice(begin, first), slice(begin, first), None
        for start in range(first, end, WINDOW_BLOCK):
            stop = min(start + WINDOW_BLOCK, end)
            low, high = max(begin, start - window + 1), stop if options.causal else end
            row, column = (torch.arange(*ends, device=inputs.q.device) for ends in ((start, stop), (low, high)))
            hidden = ~visible(row, column, options.causal, window)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
            yield slice(start, stop), slice(low, high), mask


def _use_cudnn(inputs: AttentionInputs, options: AttentionOptions, backward: bool) -> bool:
    """Return whether cuDNN serves a call, and count the call if it could."""
    if not _cudnn_supports(inputs, options):
        return False
    q, k, v = inputs.q, inputs.k, inputs.v
    key = (backward, options.causal, q.dtype, q.device, *((*x.shape, *x.stride()) for x in (q, k, v)))
    plans: set[Hashable] = _plans.__dict__.setdefault("keys", set())
    if key in plans:
        return True
    if _capturing():  # no plan can be built during the capture of a CUDA graph
        return False
    with _work_lock:
        work = _work.pop(key, 0.0)
        if work >= CUDNN_PAYS:
            plans.add(key)
        _work[key] = work + _flops(inputs, options)
        if len(_work) > KEPT:
            del _work[next(iter(_work))]
    return key in plans


def _cudnn_supports(inputs: AttentionInputs, options: AttentionOptions) -> bool:
    """Return whether cuDNN can serve a call and may be faster; here it is neither deterministic, windowed nor
    packed."""
    q = inputs.q
    return (
        inputs.cu_seqlens is None
        and options.window is None
        and q.shape[-1] <= 128
        and q.shape[2] >= CUDNN_ROWS
        and not ROUNDED_LENGTHS
        and torch.version.hip is None
        and torch.backends.cuda.cudnn_sdp_enabled()
        and torch.cuda.get_device_capability(q.device)[0] >= 9
        and not torch.are_deterministic_algorithms_enabled()
    )


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _flops(inputs: AttentionInputs, options: AttentionOptions) -> float:
    """Return the floating-point operations of the forward, without a window."""
    B, H, M, D = inputs.q.shape
    return 2.0 * B * H * M * M * (D + inputs.v.shape[-1]) / (2 if options.causal else 1)


def _cuda_forward(inputs: AttentionInputs, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    inputs = _cuda_inputs(inputs)
    q, k, v = inputs.q, inputs.k, inputs.v
    if _use_cudnn(inputs, options, backward=False):
        result = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, options.causal, False, scale=options.scale
        )
        return result[0], result[1].reshape(q.shape[:3])
    rest = _flash_options(options)
    packed, bounds, M = inputs.cu_seqlens is not None, inputs.cu_seqlens, q.shape[2]
    q, k, v = (_flash_layout(t, packed) for t in (q, k, v))
    out, lse, *_ = aten._flash_attention_forward(q, k, v, bounds, bounds, M, M, 0.0, options.causal, False, **rest)
    return _from_flash_layout(out, packed), lse[None] if packed else lse


def _cuda_backward(
    dout: Tensor, inputs: AttentionInputs, outputs: AttentionOutputs, options: AttentionOptions
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = _cuda_inputs(inputs)
    dout, out = aligned(dout), aligned(outputs.out)
    q, k, v, lse = inputs.q, inputs.k, inputs.v, outputs.lse
    if _use_cudnn(inputs, options, backward=True):
        state = torch.empty((), dtype=torch.int64, device=q.device)  # of the unused dropout: never read
        M = q.shape[2]
        # PyTorch looks up the plan by the strides of q, k and v only. Those of O follow from q's; dO gets O's.
        operands = (match_strides(dout, out.stride()), q, k, v, out, lse.contiguous()[..., None])
        dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
            *operands, state, state, None, None, None, M, M, 0.0, options.causal, scale=options.scale
        )
        return dq, dk, dv
    rest = _flash_options(options)
    packed, bounds, M = inputs.cu_seqlens is not None, inputs.cu_seqlens, q.shape[2]
    dout, q, k, v, out = (_flash_layout(t, packed) for t in (dout, q, k, v, out))
    lse = lse[0] if packed else lse
    state = torch.empty(2, dtype=torch.uint64, device=q.device)  # as above
    unused = torch.empty((), dtype=torch.uint64, device=q.device)
    dq, dk, dv = aten._flash_attention_backward(
        dout, q, k, v, out, lse, bounds, bounds, M, M, 0.0, options.causal, state, unused, **rest
    )
    return _from_flash_layout(dq, packed), _from_flash_layout(dk, packed), _from_flash_layout(dv, packed)


def _cuda_inputs(inputs: AttentionInputs) -> AttentionInputs:
    """Return inputs as the CUDA operators take them: q, k and v with aligned rows."""
    q, k, v = aligned(inputs.q), aligned(inputs.k), aligned(inputs.v)
    return AttentionInputs(q, k, v, inputs.sinks, inputs.cu_seqlens)


def _flash_layout(x: Tensor, packed: bool) -> Tensor:
    """Return a view of ``x (B, H, M, D)`` in aten's layout, ``(B, M, H, D)`` or packed ``(total, H, D)``."""
    return x.transpose(1, 2)[0] if packed else x.transpose(1, 2)


def _from_flash_layout(x: Tensor, packed: bool) -> Tensor:
    return (x[None] if packed else x).transpose(1, 2)


def _flash_options(options: AttentionOptions) -> dict[str, Any]:
    """Return aten's scale and window.

    The longest packed sequence is not known on the host without a synchronisation; the callers pass the total in its
    place, a bound that costs idle thread blocks only.
    """
    rest: dict[str, Any] = {"scale": options.scale}
    if options.window is not None:
        rest |= {"window_size_left": options.window - 1, "window_size_right": 0}
    return rest
