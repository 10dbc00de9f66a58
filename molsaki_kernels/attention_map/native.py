"""The stepwise map in C, for float32 and bfloat16 on a CPU (``csrc/stepwise_map.c``)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from molsaki_kernels._native.build import library, why_not_for
from molsaki_kernels._native.build import why_not as unavailable
from molsaki_kernels._native.plan_arrays import plan_arrays
from molsaki_kernels._native.structs import MAP_TILE_ROWS, MapCall, Plan
from molsaki_kernels._workspace import workspace
from molsaki_kernels.attention_map.protocol import MapGradient, both_phases
from molsaki_kernels.spec import AttentionOptions, MapInputs, PlanTensors
from molsaki_kernels.strides import with_contiguous_head_dim

NAME = "native"
TASKS_PER_THREAD = 16  # in the backward pass, so that threads finish at about the same time
LARGEST_KEPT = 4 << 20  # elements of dq kept from the first phase of the gradient to the second; more are recomputed
_CPU = torch.device("cpu")  # also where another default device is set


def why_not(q: Tensor, options: AttentionOptions) -> str | None:
    """Return the reason why the map of ``q`` cannot be computed, or None."""
    if options.softcap is not None:
        return "it has no softcap"
    return why_not_for(q.device, q.dtype, q.shape[-1]) or unavailable()


def forward(inputs: MapInputs, options: AttentionOptions, plan: PlanTensors) -> Tensor:
    """Compute the map, ``(N, S, W)`` or per head ``(N, Hq, S, W)``, float32."""
    N, S = plan.steps.shape[:2]
    Hq, M, D = inputs.q.shape[1:]
    heads = Hq if options.per_head else 1
    shape = (N, Hq, S, plan.num_words) if options.per_head else (N, S, plan.num_words)
    if plan.is_empty(inputs.q):
        return torch.zeros(shape, dtype=torch.float32, device=_CPU)
    maps = torch.empty(shape, dtype=torch.float32, device=_CPU)
    arrays, struct = plan_arrays(inputs, plan)
    inputs = _prepared(inputs)
    call = _call(struct, inputs, options, plan)
    call.maps = maps.data_ptr()
    C = arrays.columns
    sums = 2 * heads * arrays.task_steps * C  # in float64
    memory = _attach_workspace(call, packed=N * inputs.k.shape[1] * D * C, sums=sums)
    library().molsaki_map_forward(ctypes.byref(call))
    del memory  # the call used it until here
    return maps


class Gradient(MapGradient):
    """The map's gradient in two phases.

    Args:
        dmaps: ``(N, S, W)``, or ``(N, Hq, S, W)`` for per-head maps.

    Attributes:
        dlse: ``(B, Hq, M)`` float32.

    A thread has working memory for one Gradient: :meth:`add_to` has to be called before another one is constructed.
    """

    def __init__(self, dmaps: Tensor, inputs: MapInputs, options: AttentionOptions, plan: PlanTensors):
        self.dlse = torch.zeros(inputs.lse.shape, dtype=torch.float32, device=_CPU)
        self._call: MapCall | None = None
        if plan.is_empty(inputs.q):
            return
        dmaps = dmaps.float().contiguous()
        arrays, struct = plan_arrays(inputs, plan)
        inputs = _prepared(inputs)
        call = _call(struct, inputs, options, plan)
        N, C = arrays.tokens.shape
        Hq, D, Hkv = inputs.q.shape[1], inputs.q.shape[3], inputs.k.shape[1]
        tiles = -(-arrays.longest // MAP_TILE_ROWS)
        chunks = min(tiles, -(-TASKS_PER_THREAD * call.threads // (N * Hq)))
        call.chunk_rows = -(-tiles // chunks) * MAP_TILE_ROWS
        call.chunks = -(-arrays.longest // call.chunk_rows)
        sizes = dict(
            packed=N * Hkv * D * C,
            keys=N * Hkv * C * D,
            upstream=N * (Hq if options.per_head else 1) * plan.steps.shape[1] * C,
            dk_parts=N * Hq * call.chunks * C * D,
            dk_tokens=N * Hkv * C * D,
        )
        kept = N * Hq * arrays.longest * D
        if kept <= LARGEST_KEPT:
            sizes["kept"] = kept
        memory = _attach_workspace(call, **sizes)
        call.dmaps, call.dlse = dmaps.data_ptr(), self.dlse.data_ptr()
        library().molsaki_map_dlse(ctypes.byref(call))
        self._call, self._memory = call, (inputs, arrays, memory)  # the second phase reads them

    def add_to(self, dq: Tensor, dk: Tensor) -> None:
        """Add to dq ``(B, Hq, M, D)`` and dk ``(B, Hkv, M, D)`` in place."""
        call = self._call
        if call is None:
            return
        to_dq = dq if dq.stride(-1) == 1 else dq.new_zeros(dq.shape)
        to_dk = dk if dk.stride(-1) == 1 else dk.new_zeros(dk.shape)
        call.dq, call.dk = to_dq.data_ptr(), to_dk.data_ptr()
        call.dq_strides[:], call.dk_strides[:] = to_dq.stride()[:3], to_dk.stride()[:3]
        library().molsaki_map_add(ctypes.byref(call))
        if to_dq is not dq:
            dq += to_dq
        if to_dk is not dk:
            dk += to_dk


def backward(
    dmaps: Tensor, inputs: MapInputs, options: AttentionOptions, plan: PlanTensors
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dq, dk and dlse."""
    return both_phases(Gradient(dmaps, inputs, options, plan), inputs)


def _prepared(inputs: MapInputs) -> MapInputs:
    q, k = with_contiguous_head_dim(inputs.q), with_contiguous_head_dim(inputs.k)
    return MapInputs(q, k, inputs.lse.contiguous(), inputs.cu_seqlens)


def _call(struct: Plan, inputs: MapInputs, options: AttentionOptions, plan: PlanTensors) -> MapCall:
    q, k, lse = inputs.q, inputs.k, inputs.lse
    call = MapCall(
        plan=struct,
        q_heads=q.shape[1],
        kv_heads=k.shape[1],
        head_dim=q.shape[3],
        steps=plan.steps.shape[1],
        words=plan.num_words,
        causal=options.causal,
        window=min(options.window or 0, q.shape[2]),
        is_bf16=q.dtype == torch.bfloat16,
        per_head=options.per_head,
        threads=torch.get_num_threads(),
        scale=options.scale,
        word_weight=1 if options.per_head else 1 / q.shape[1],
        q=q.data_ptr(),
        k=k.data_ptr(),
        lse=lse.data_ptr(),
    )
    call.q_strides[:], call.k_strides[:], call.lse_strides[:] = q.stride()[:3], k.stride()[:3], lse.stride()[:2]
    return call


def _attach_workspace(call: MapCall, **sizes: int) -> Tensor:
    """Point the named fields of the call to memory for so many float32; the result has to be kept while it is used."""
    total = 0
    offsets = {}
    for name, size in sizes.items():
        offsets[name] = total
        total += -(-size // 16) * 16
    memory = workspace("map workspace", (total,), torch.float32, _CPU)
    start = memory.data_ptr()
    for name, offset in offsets.items():
        setattr(call, name, start + 4 * offset)
    return memory
