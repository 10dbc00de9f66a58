"""The project's own fused kernels: attention and its map in one pass over q, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from molsaki_kernels._triton.support import INSTALLED, INTERPRETED, why_no_triton
from molsaki_kernels.spec import AttentionOptions, AttentionRequest, PlanTensors
from molsaki_kernels.strides import contiguous_rows

NAME = "triton"


def available() -> str | None:
    """Why this machine cannot run Triton kernels, or None."""
    if not INSTALLED:
        return "triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available():
        return "no GPU (TRITON_INTERPRET=1 runs the kernels slowly on a CPU)"
    return None


def why_not(call: AttentionRequest) -> str | None:
    """Why this engine cannot do ``call``, or None."""
    reason = why_no_triton(call.device, call.dtype)
    if reason is not None:
        return reason
    if not 16 <= call.head_dim <= 256:
        return f"the kernels take head_dim 16 to 256, not {call.head_dim}"
    if call.options.scale <= 0:
        return f"the kernels take a positive scale, not {call.options.scale}"
    return None


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
    """out ``(B, Hq, M, D)``, lse ``(B, Hq, M)`` float32 and the map ``(N, [Hq,] S, W)`` float32."""
    from molsaki_kernels._triton.attention_forward import flash_forward

    return flash_forward(*map(contiguous_rows, (q, k, v)), plan, options, sinks, cu_seqlens, per_head)


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
    """dq, dk, dv and dsinks, the map's part included."""
    from molsaki_kernels._triton.attention_backward import flash_backward

    q, k, v, out = map(contiguous_rows, (q, k, v, out))
    return flash_backward(q, k, v, out, lse, dout, options, plan, dmaps, dlse, sinks, cu_seqlens)
