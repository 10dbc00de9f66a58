"""The stepwise map by the native library: what `molsaki_kernels.stepmap` computes, in float32 and bfloat16 on a CPU."""

from __future__ import annotations

import ctypes
import itertools

import torch
from torch import Tensor

from molsaki_kernels._native.build import library, why_not_for
from molsaki_kernels._native.plan_arrays import Plan, sequences_of
from molsaki_kernels._workspace import scratch
from molsaki_kernels.spec import AttentionOptions, PlanTensors
from molsaki_kernels.strides import contiguous_rows

BACKWARD_ROWS = 24  # of a tile; a task's rows are a multiple
TASKS_PER_THREAD = 16  # of the backward, so that threads end together
LARGEST_KEPT = 4 << 20  # numbers of dq kept from the first half of the gradient to the second; more are made again
_CPU = torch.device("cpu")  # whatever the defaults are
_FLOAT32 = {"dtype": torch.float32, "device": _CPU}


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, softcap: float | None) -> str | None:
    """Why the native library cannot make this map, or None."""
    return "it has no softcap" if softcap is not None else why_not_for(device, dtype, head_dim)


def forward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    plan: PlanTensors,
    options: AttentionOptions,
    cu_seqlens: Tensor | None = None,
    per_head: bool = False,
) -> Tensor:
    """The map, ``(N, S, W)`` or per head ``(N, Hq, S, W)``, float32. As :func:`molsaki_kernels.stepmap.forward`."""
    N, S = plan.steps.shape[:2]
    heads = q.shape[1] if per_head else 1
    shape = (N, *((heads,) if per_head else ()), S, plan.num_words)
    if plan.is_empty(q):
        return torch.zeros(shape, **_FLOAT32)
    maps = torch.empty(shape, **_FLOAT32)
    sequences, known = sequences_of(plan, q.shape[0], q.shape[2], cu_seqlens)
    q, k, lse = contiguous_rows(q), contiguous_rows(k), lse.contiguous()
    call = _call(known, q, k, lse, plan, options, per_head)
    call.maps = maps.data_ptr()
    C, D = sequences.columns, q.shape[3]
    memory = _workspace(call, packed=N * k.shape[1] * D * C, sums=2 * heads * sequences.task_steps * C)  # in float64
    library().molsaki_map_forward(ctypes.byref(call))
    del memory  # not before
    return maps


class Gradient:
    """The map's gradient, in two halves. As :class:`molsaki_kernels.stepmap.Gradient`.

    A thread's working memory is its latest Gradient's: the second half has to come before another one is made.
    """

    def __init__(
        self,
        dmaps: Tensor,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        plan: PlanTensors,
        options: AttentionOptions,
        cu_seqlens: Tensor | None = None,
    ):
        self.dlse = torch.zeros(lse.shape, **_FLOAT32)
        self._call = None
        if plan.is_empty(q):
            return
        per_head = dmaps.dim() == 4
        dmaps = dmaps.float().contiguous()
        sequences, known = sequences_of(plan, q.shape[0], q.shape[2], cu_seqlens)
        q, k, lse = contiguous_rows(q), contiguous_rows(k), lse.contiguous()
        call = _call(known, q, k, lse, plan, options, per_head)
        (N, C), (Hq, D), Hkv = sequences.tokens.shape, q.shape[1::2], k.shape[1]
        tiles = -(-sequences.longest // BACKWARD_ROWS)
        chunks = min(tiles, -(-TASKS_PER_THREAD * call.threads // (N * Hq)))
        call.chunk_rows = -(-tiles // chunks) * BACKWARD_ROWS
        call.chunks = -(-sequences.longest // call.chunk_rows)

        sizes = dict(
            packed=N * Hkv * D * C,
            keys=N * Hkv * C * D,
            upstream=N * (Hq if per_head else 1) * plan.steps.shape[1] * C,
            dk_parts=N * Hq * call.chunks * C * D,
            dk_tokens=N * Hkv * C * D,
        )
        size = N * Hq * sequences.longest * D
        memory = _workspace(call, **sizes, **(dict(kept=size) if size <= LARGEST_KEPT else {}))
        call.dmaps, call.dlse = dmaps.data_ptr(), self.dlse.data_ptr()
        library().molsaki_map_dlse(ctypes.byref(call))
        self._call, self._memory = call, (q, k, lse, sequences, memory)  # what the second half reads

    def add_to(self, dq: Tensor, dk: Tensor) -> None:
        """Add to dq ``(B, Hq, M, D)`` and dk ``(B, Hkv, M, D)`` in place."""
        if self._call is None:
            return
        targets = [x if x.stride(-1) == 1 else x.new_zeros(x.shape) for x in (dq, dk)]
        call = self._call
        call.dq, call.dk = (x.data_ptr() for x in targets)
        call.dq_strides[:], call.dk_strides[:] = (x.stride()[:3] for x in targets)
        library().molsaki_map_add(ctypes.byref(call))
        for x, target in zip((dq, dk), targets, strict=True):
            if target is not x:
                x += target


class _Call(ctypes.Structure):
    """``Call`` of stepmap.c."""

    _fields_ = [
        ("plan", Plan),
        *((name, ctypes.c_int64) for name in (
            "q_heads", "kv_heads", "head_dim", "steps", "words",
            "causal", "window", "is_bf16", "per_head", "threads", "chunk_rows", "chunks",
        )),
        *((name, ctypes.c_int64 * 3) for name in ("q_strides", "k_strides", "dq_strides", "dk_strides")),
        ("lse_strides", ctypes.c_int64 * 2), ("scale", ctypes.c_double), ("word_weight", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in (
            "q", "k", "lse", "sums", "packed", "maps",
            "dmaps", "upstream", "keys", "dk_parts", "dk_tokens", "kept", "dlse", "dq", "dk",
        )),
    ]  # fmt: skip


def _call(
    known: Plan, q: Tensor, k: Tensor, lse: Tensor, plan: PlanTensors, options: AttentionOptions, per_head: bool
) -> _Call:
    call = _Call(plan=known)
    (_, call.q_heads, _, call.head_dim), call.kv_heads = q.shape, k.shape[1]
    call.steps, call.words, call.per_head = plan.steps.shape[1], plan.num_words, per_head
    call.causal, call.window, call.scale = options.causal, min(options.window or 0, q.shape[2]), options.scale
    call.is_bf16, call.threads = q.dtype == torch.bfloat16, torch.get_num_threads()
    call.word_weight = 1 if per_head else 1 / q.shape[1]
    call.q, call.k, call.lse = q.data_ptr(), k.data_ptr(), lse.data_ptr()
    call.q_strides[:], call.k_strides[:], call.lse_strides[:] = q.stride()[:3], k.stride()[:3], lse.stride()[:2]
    return call


def _workspace(call: _Call, **sizes: int) -> Tensor:
    """Working memory for fields of the call, so many float32 each; it has to be held for as long as they are used."""
    offsets = [0, *itertools.accumulate(-(-size // 16) * 16 for size in sizes.values())]
    memory = scratch("map workspace", (offsets[-1],), torch.float32, _CPU)
    start = memory.data_ptr()
    for name, offset in zip(sizes, offsets, strict=False):
        setattr(call, name, start + 4 * offset)
    return memory
