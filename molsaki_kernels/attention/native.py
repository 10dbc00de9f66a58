"""Engine "native": the project's own attention on a CPU, in C, with the map in the same pass, forward and backward.

float32 and bfloat16; the source is ``csrc/attention.c``.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from molsaki_kernels._native.build import bf16_unit, library, why_not_for
from molsaki_kernels._native.build import why_not as available
from molsaki_kernels._native.plan_arrays import plan_arrays
from molsaki_kernels._native.structs import FLOAT32, HEAD_DIM_MULTIPLE, AttentionCall, AttentionMemory, Plan
from molsaki_kernels._workspace import workspace
from molsaki_kernels.attention.sinks import sinks_gradient
from molsaki_kernels.spec import (
    AttentionInputs,
    AttentionOptions,
    AttentionOutputs,
    AttentionRequest,
    InputGradients,
    OutputGradients,
    PlanTensors,
)
from molsaki_kernels.strides import empty_out, with_contiguous_head_dim

__all__ = [
    "COMPUTES_MAP", "DIFFERENTIABLE", "HEAD_DIM_MULTIPLE", "NAME", "available", "backward", "forward",
    "takes_value_dim", "why_not",
]  # fmt: skip

NAME = "native"
COMPUTES_MAP = True
DIFFERENTIABLE = False
SMALLEST_SCALE = 1e-6  # for products in bfloat16, whose scores are scaled later: the maximum is in units of the scale
TASKS_PER_THREAD = 16  # in the forward pass, so that threads finish at about the same time
_CPU = torch.device("cpu")  # also where another default device is set


def why_not(request: AttentionRequest) -> str | None:
    """Return the reason why the engine cannot serve a call, or None."""
    return why_not_for(request.device, request.dtype, request.head_dim)


def takes_value_dim(request: AttentionRequest, value_dim: int) -> bool:
    """Return whether the library supports values of this width: the widths of q and k, in any combination."""
    return why_not_for(request.device, request.dtype, value_dim) is None


def forward(inputs: AttentionInputs, options: AttentionOptions, plan: PlanTensors) -> AttentionOutputs:
    """Compute out in q's dtype and layout, and lse and the map in float32."""
    q = inputs.q
    B, Hq, M, _ = q.shape
    N, S = plan.steps.shape[:2]
    maps_shape = (N, Hq, S, plan.num_words) if options.per_head else (N, S, plan.num_words)
    if q.numel() == 0:
        maps = torch.zeros(maps_shape, dtype=torch.float32, device=_CPU)
        return AttentionOutputs(empty_out(q, inputs.v), torch.empty((B, Hq, M), dtype=torch.float32, device=_CPU), maps)
    arrays, struct = plan_arrays(inputs, plan)
    maps = torch.empty(maps_shape, dtype=torch.float32, device=_CPU)
    covered = arrays.total == B * M  # otherwise there are queries in no sequence, whose results are 0
    lse = (torch.empty if covered else torch.zeros)((B, Hq, M), dtype=torch.float32, device=_CPU)
    out = _result(q, inputs.v.shape[3], covered, q.dtype)
    outputs = AttentionOutputs(out, lse, maps)
    call, memory = _call(struct, inputs, outputs, options, plan, backward=False)
    call.maps = maps.data_ptr()
    groups = Hq if options.per_head else min(Hq, -(-TASKS_PER_THREAD * call.threads // max(struct.tasks, 1)))
    sums = workspace("map sums", (groups * arrays.task_steps * arrays.columns,), torch.float64, _CPU)
    call.groups, call.sums = groups, sums.data_ptr()
    library().molsaki_attention_forward(ctypes.byref(call))
    del memory  # the call used it until here
    return outputs


def backward(
    gradients: OutputGradients,
    inputs: AttentionInputs,
    outputs: AttentionOutputs,
    options: AttentionOptions,
    plan: PlanTensors,
) -> InputGradients:
    """Compute dq, dk and dv in the dtypes and layouts of q, k and v, and dsinks; the map's part is included."""
    q, sinks, lse = inputs.q, inputs.sinks, outputs.lse
    if q.numel() == 0:
        dq, dk, dv = (torch.zeros_like(x) for x in (q, inputs.k, inputs.v))
        return InputGradients(dq, dk, dv, None if sinks is None else torch.zeros_like(sinks))
    arrays, struct = plan_arrays(inputs, plan)
    covered = arrays.total == q.shape[0] * q.shape[2]
    call, memory = _call(struct, inputs, outputs, options, plan, backward=True)
    part_of = torch.empty(2 * call.threads, dtype=torch.int64, device=_CPU)
    call.part_of = part_of.data_ptr()
    dout, dlse, dmaps = gradients.dout, gradients.dlse, gradients.dmaps
    if dout is not None:
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        call.dout, call.dout_strides = dout.data_ptr(), dout.stride()[:3]
    if dlse is not None:
        dlse = dlse.float().contiguous()
        call.dlse = dlse.data_ptr()
    if dmaps is not None and dmaps.numel() and arrays.columns:
        dmaps = dmaps.float().contiguous()
        call.dmaps = dmaps.data_ptr()
    if sinks is not None:
        delta = torch.zeros(lse.shape, dtype=torch.float64, device=_CPU)
        call.delta = delta.data_ptr()
    dtype = torch.float32 if call.unit == FLOAT32 else torch.bfloat16
    dq = _result(q, q.shape[3], covered, dtype)
    dk = _result(inputs.k, inputs.k.shape[3], covered, dtype)
    dv = _result(inputs.v, inputs.v.shape[3], covered, dtype)
    call.dq, call.dk, call.dv = dq.data_ptr(), dk.data_ptr(), dv.data_ptr()
    call.dq_strides, call.dk_strides, call.dv_strides = dq.stride()[:3], dk.stride()[:3], dv.stride()[:3]
    library().molsaki_attention_backward(ctypes.byref(call))
    del memory  # the call used it until here
    if q.dtype != dtype:
        dq, dk, dv = dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)
    return InputGradients(dq, dk, dv, None if sinks is None else sinks_gradient(sinks, lse, delta))


def _call(
    struct: Plan,
    inputs: AttentionInputs,
    outputs: AttentionOutputs,
    options: AttentionOptions,
    plan: PlanTensors,
    backward: bool,
) -> tuple[AttentionCall, object]:
    """Return the struct of a call and the tensors it points to that have to be kept while it is used."""
    q, k, v, out = inputs.q, inputs.k, inputs.v, outputs.out
    if not q.stride(-1) == k.stride(-1) == v.stride(-1) == out.stride(-1) == 1:
        q, k, v, out = map(with_contiguous_head_dim, (q, k, v, out))
    lse = outputs.lse.contiguous()
    sinks = None if inputs.sinks is None else inputs.sinks.detach().float().contiguous()
    in_bf16 = q.dtype == torch.bfloat16 and options.scale >= SMALLEST_SCALE
    call = AttentionCall(
        plan=struct,
        rows=q.shape[2],
        q_heads=q.shape[1],
        kv_heads=k.shape[1],
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        steps=plan.steps.shape[1],
        words=plan.num_words,
        causal=options.causal,
        window=min(options.window or 0, q.shape[2]),
        is_bf16=q.dtype == torch.bfloat16,
        per_head=options.per_head,
        threads=torch.get_num_threads(),
        unit=bf16_unit() if in_bf16 else FLOAT32,
        scale=options.scale,
        softcap=options.softcap or 0,
        word_weight=1 if options.per_head else 1 / q.shape[1],
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        sinks=None if sinks is None else sinks.data_ptr(),
        q_strides=q.stride()[:3],
        k_strides=k.stride()[:3],
        v_strides=v.stride()[:3],
        out_strides=out.stride()[:3],
    )
    kept = [q, k, v, out, lse, sinks]
    sizes = AttentionMemory()
    library().molsaki_attention_memory(ctypes.byref(call), backward, ctypes.byref(sizes))
    for name, *_ in AttentionMemory._fields_:
        if size := getattr(sizes, name):
            memory = workspace(f"attention {name}", (size,), torch.uint8, _CPU)
            setattr(call, name, memory.data_ptr())
            kept.append(memory)
    return call, kept


def _result(x: Tensor, width: int, covered: bool, dtype: torch.dtype) -> Tensor:
    """Return a tensor ``(B, H, M, width)`` for ``x (B, H, M, D)``, with the memory layout ``(B, M, H, width)`` if x has
    it; filled with zeros if not covered.
    """
    allocate = torch.empty if covered else torch.zeros
    if not x.is_contiguous() and x.transpose(1, 2).is_contiguous():
        B, H, M, _ = x.shape
        return allocate((B, M, H, width), dtype=dtype, device=_CPU).transpose(1, 2)
    return allocate((*x.shape[:3], width), dtype=dtype, device=_CPU)
