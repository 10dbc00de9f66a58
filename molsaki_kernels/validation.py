"""Checks of public arguments. None needs a device synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from molsaki_kernels._triton.support import why_no_triton
from molsaki_kernels.attention_map import native as native_stepmap
from molsaki_kernels.plan import StepPlan

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_tensor(x: Tensor, name: str, shape: str, dims: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(x).__name__}")
    if x.dim() != dims:
        raise ValueError(f"{name}: expected a tensor {shape}, got shape {tuple(x.shape)}")


def check_attention(q: Tensor, k: Tensor, v: Tensor | None) -> None:
    """q ``(B, Hq, M, D)`` and k, v ``(B, Hkv, M, D)`` belong together."""
    check_tensor(q, "q", "(B, Hq, M, D)", 4)
    others: list[tuple[str, Tensor]] = [("k", k)] if v is None else [("k", k), ("v", v)]
    for name, x in others:
        check_tensor(x, name, "(B, Hkv, M, D)", 4)
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected on q's device {q.device}, got {x.device}")
        if x.shape != (q.shape[0], k.shape[1], *q.shape[2:]):
            raise ValueError(
                f"{name}: expected (B, Hkv, M, D) with q's B, M, D and one Hkv for k and v, "
                f"got {tuple(x.shape)} beside q {tuple(q.shape)} and k {tuple(k.shape)}"
            )
    if q.dtype not in DTYPES:
        raise TypeError(f"q: expected bfloat16, float16, float32 or float64, got {q.dtype}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q: expected a multiple of k's {k.shape[1]} heads, got {q.shape[1]} in {tuple(q.shape)}")
    if q.shape[3] == 0:
        raise ValueError(f"q: expected head_dim >= 1, got shape {tuple(q.shape)}")


def check_options(
    q: Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    heads: str,
) -> None:
    if scale is not None and not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")
    if window is not None:
        if isinstance(window, bool) or not isinstance(window, (int, torch.SymInt)):
            raise TypeError(f"window: expected an int or None, got {type(window).__name__}")
        if window < 1:
            raise ValueError(f"window: expected at least 1 key (the query itself), got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}")
    if sinks is not None:
        check_tensor(sinks, "sinks", f"({q.shape[1]},), a logit for each query head", 1)
        if sinks.shape[0] != q.shape[1]:
            raise ValueError(f"sinks: expected ({q.shape[1]},), a logit for each query head, got {tuple(sinks.shape)}")
        if not sinks.is_floating_point():
            raise TypeError(f"sinks: expected a floating dtype, got {sinks.dtype}")
        if sinks.device != q.device:
            raise ValueError(f"sinks: expected on q's device {q.device}, got {sinks.device}")
    if heads not in ("mean", "none"):
        raise ValueError(f'heads: expected "mean" or "none", got {heads!r}')


def check_cu_seqlens(cu_seqlens: Tensor, x: Tensor, name: str) -> None:
    check_tensor(cu_seqlens, "cu_seqlens", "(N + 1,) int32", 1)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: expected int32, got {cu_seqlens.dtype}")
    if cu_seqlens.shape[0] < 1:
        raise ValueError("cu_seqlens: expected (N + 1,) boundaries from 0 to the total, got an empty tensor")
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens: expected on {name}'s device {x.device}, got {cu_seqlens.device}")
    if x.shape[0] != 1:
        raise ValueError(f"{name}: expected (1, H, total, D) with cu_seqlens, got shape {tuple(x.shape)}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != x.shape[2] or any(b < a for a, b in zip(bounds, bounds[1:], strict=False)):
            raise ValueError(f"cu_seqlens: expected to rise from 0 to {name}'s total {x.shape[2]}, got {bounds}")


def check_plan(plan: StepPlan, q: Tensor, cu_seqlens: Tensor | None) -> None:
    if not isinstance(plan, StepPlan):
        raise TypeError(f"plan: expected a StepPlan, got {type(plan).__name__}")
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if len(plan) != sequences:
        whence = f"q has batch {q.shape[0]}" if cu_seqlens is None else f"cu_seqlens bounds {sequences}"
        raise ValueError(f"plan: expected one entry a sequence, got {len(plan)} where {whence}")
    if plan.device != q.device:
        raise ValueError(f"plan: expected on q's device {q.device}, got {plan.device}; use plan.to(...)")
    lengths = [q.shape[2]] * sequences
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        lengths = [b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    for n, (extent, length) in enumerate(zip(plan.extents, lengths, strict=True)):
        if extent > length:
            raise ValueError(
                f"plan: expected indices within sequence {n}'s {length} tokens, but it reaches {extent} "
                f"(q {tuple(q.shape)})"
            )


def choose_backend(backend: str, x: Tensor) -> str:
    """ "triton" or "torch"; "auto" takes Triton wherever there is a GPU for it."""
    return _chosen(backend, {"triton": why_no_triton(x.device, x.dtype), "torch": None}, x)


def choose_map_backend(backend: str, q: Tensor, softcap: float | None) -> str:
    """ "triton", "native" or "torch"; "auto" takes Triton wherever there is a GPU for it, on a CPU what is compiled."""
    reasons = {
        "triton": why_no_triton(q.device, q.dtype),
        "native": native_stepmap.why_not(q.device, q.dtype, q.shape[-1], softcap),
        "torch": None,
    }
    return _chosen(backend, reasons, q)


def _chosen(backend: str, reasons: dict[str, str | None], x: Tensor) -> str:
    if backend != "auto" and backend not in reasons:
        listed = ", ".join(f'"{name}"' for name in reasons)
        raise ValueError(f'backend: expected "auto" or one of {listed}, got {backend!r}')
    if backend == "auto":
        return next(n for n, reason in reasons.items() if reason is None and (n != "triton" or x.is_cuda))
    if reasons[backend] is not None:
        raise ValueError(f'backend: "{backend}" cannot serve this call: {reasons[backend]}')
    return backend
