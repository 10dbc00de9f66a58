"""Attention and its stepwise map by the native library, forward and backward: float32 and bfloat16 on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from molsaki_kernels._native.build import library
from molsaki_kernels._native.plan_arrays import Plan, Sequences, sequences_of
from molsaki_kernels._workspace import scratch
from molsaki_kernels.spec import AttentionOptions, PlanTensors
from molsaki_kernels.strides import contiguous_rows

TASKS_PER_THREAD = 16  # of the forward pass, so that threads end together
_CPU = torch.device("cpu")  # whatever the default device is
_FLOAT32 = {"dtype": torch.float32, "device": _CPU}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PlanTensors,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    options: AttentionOptions,
    per_head: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out ``(B, Hq, M, D)`` in q's dtype; lse ``(B, Hq, M)`` and the map ``(N, [Hq,] S, W)``, float32."""
    N, S, heads = *plan.steps.shape[:2], (q.shape[1],) if per_head else ()
    shape, maps_shape = q.shape[:3], (N, *heads, S, plan.num_words)
    if q.numel() == 0:
        return torch.empty_like(q), torch.empty(shape, **_FLOAT32), torch.zeros(maps_shape, **_FLOAT32)
    sequences, known = sequences_of(plan, q.shape[0], q.shape[2], cu_seqlens)
    make = torch.empty if sequences.total == q.shape[0] * q.shape[2] else torch.zeros  # of rows in no sequence
    maps, lse = torch.empty(maps_shape, **_FLOAT32), make(shape, **_FLOAT32)
    out = _new(q, make, q.dtype)
    q, k, v = map(contiguous_rows, (q, k, v))
    call, held = _call(known, q, k, v, out, lse, sinks, plan, options, per_head)
    blocks = max(known.tasks, 1)
    call.groups = q.shape[1] if per_head else min(q.shape[1], -(-TASKS_PER_THREAD * call.threads // blocks))
    sums = scratch("map sums", (call.groups, sequences.task_steps, sequences.columns), torch.float64, _CPU)
    work = _work(call, sequences)
    call.sums, call.maps, call.work = sums.data_ptr(), maps.data_ptr(), work.data_ptr()
    library().molsaki_attention_forward(ctypes.byref(call))
    del held
    return out, lse, maps


def backward(
    dout: Tensor | None,
    dmaps: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: PlanTensors,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv in the dtypes and layouts of q, k, v, and dsinks; the map's part included."""
    grads = [torch.empty_like(x, dtype=torch.float32) for x in (q, k, v)]
    delta = None if sinks is None else torch.zeros(lse.shape, dtype=torch.float64, device=_CPU)
    if out.numel():
        sequences, known = sequences_of(plan, q.shape[0], q.shape[2], cu_seqlens)
        make = torch.empty if sequences.total == q.shape[0] * q.shape[2] else torch.zeros
        grads = [_new(x, make, torch.float32) for x in (q, k, v)]
        q, k, v, out, lse = *map(contiguous_rows, (q, k, v, out)), lse.contiguous()
        per_head = dmaps is not None and dmaps.dim() == 4
        call, held = _call(known, q, k, v, out, lse, sinks, plan, options, per_head)
        work = _work(call, sequences)
        parts = scratch("attention parts", (call.threads, 2, sequences.longest, q.shape[3]), torch.float32, _CPU)
        part_of = torch.empty(call.threads, dtype=torch.int64, device=_CPU)
        call.work, call.parts, call.part_of = work.data_ptr(), parts.data_ptr(), part_of.data_ptr()
        if dout is not None:
            dout = contiguous_rows(dout)
            call.dout, call.dout_strides = dout.data_ptr(), _Strides(*dout.stride()[:3])
        if dlse is not None:
            dlse = dlse.float().contiguous()
            call.dlse = dlse.data_ptr()
        if dmaps is not None and dmaps.numel() and sequences.columns:
            dmaps = dmaps.float().contiguous()
            call.dmaps = dmaps.data_ptr()
        if delta is not None:
            call.delta = delta.data_ptr()
        for name, x in zip(("dq", "dk", "dv"), grads, strict=True):
            setattr(call, name, x.data_ptr())
            setattr(call, f"{name}_strides", _Strides(*x.stride()[:3]))
        library().molsaki_attention_backward(ctypes.byref(call))
        del held
    dsinks = None
    if sinks is not None:  # dS of the sink's column: p_sink (0 - delta), summed over the rows
        terms = (sinks.double()[:, None] - lse).exp_() * delta
        dsinks = -terms.masked_fill_(delta == 0, 0).sum((0, 2)).to(sinks.dtype)  # a row in no sequence has no lse
    dq, dk, dv = (g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv, dsinks


_Strides = ctypes.c_int64 * 3
_TENSORS = ("q", "k", "v", "out")


class _Call(ctypes.Structure):
    """``Call`` of attention.c."""

    _fields_ = [
        ("plan", Plan),
        *((name, ctypes.c_int64) for name in (
            "rows", "q_heads", "kv_heads", "head_dim", "steps", "words", "causal", "window", "is_bf16", "per_head",
            "threads",
        )),
        *((f"{name}_strides", _Strides) for name in (*_TENSORS, "dout", "dq", "dk", "dv")),
        *((name, ctypes.c_double) for name in ("scale", "softcap", "word_weight")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "sinks", "out", "lse", "work")),
        ("groups", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in (
            "sums", "maps",
            "dout", "dlse", "dmaps", "delta", "dq", "dk", "dv", "parts", "part_of",
        )),
    ]  # fmt: skip


def _call(
    known: Plan, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None, plan: PlanTensors,
    options: AttentionOptions, per_head: bool,
) -> tuple[_Call, object]:  # fmt: skip
    """With what it points to and nobody else holds."""
    sinks = None if sinks is None else sinks.detach().float().contiguous()
    call = _Call(
        plan=known, rows=q.shape[2], q_heads=q.shape[1], kv_heads=k.shape[1], head_dim=q.shape[3],
        steps=plan.steps.shape[1], words=plan.num_words, causal=options.causal,
        window=min(options.window or 0, q.shape[2]), is_bf16=q.dtype == torch.bfloat16, per_head=per_head,
        threads=torch.get_num_threads(), scale=options.scale, softcap=options.softcap or 0,
        word_weight=1 if per_head else 1 / q.shape[1],
        lse=lse.data_ptr(), sinks=None if sinks is None else sinks.data_ptr(),
    )  # fmt: skip
    for name, x in zip(_TENSORS, (q, k, v, out), strict=True):
        setattr(call, name, x.data_ptr())
        setattr(call, f"{name}_strides", _Strides(*x.stride()[:3]))
    return call, sinks


def _new(x: Tensor, make: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
    """A result laid out as x if x's rows are contiguous, ``(B, H, M, D)`` or ``(B, M, H, D)``."""
    if x.transpose(1, 2).is_contiguous():
        B, H, M, D = x.shape
        return make((B, M, H, D), dtype=dtype, device=_CPU).transpose(1, 2)
    return make(x.shape, dtype=dtype, device=_CPU)


def _work(call: _Call, sequences: Sequences) -> Tensor:
    """Working memory of every thread; it has to be held for as long as the call runs."""
    size = call.threads * library().molsaki_attention_work(*map(ctypes.c_int64, (sequences.columns, call.head_dim)))
    return scratch("attention work", (size,), torch.uint8, _CPU)
