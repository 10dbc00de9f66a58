"""Engine "triton": the project's own fused Triton kernels: attention and its map in one pass over q, and its backward.

The kernels and their launchers are in ``_triton/attention_forward.py`` and ``_triton/attention_backward.py``; they are
imported when they are first used.
"""

from __future__ import annotations

import dataclasses

import torch

from molsaki_kernels._triton.support import INSTALLED, INTERPRETED, why_no_triton
from molsaki_kernels.spec import (
    AttentionInputs,
    AttentionOptions,
    AttentionOutputs,
    AttentionRequest,
    InputGradients,
    OutputGradients,
    PlanTensors,
)
from molsaki_kernels.strides import with_contiguous_head_dim

NAME = "triton"
COMPUTES_MAP = True
DIFFERENTIABLE = False


def available() -> str | None:
    """Return the reason why this machine cannot run Triton kernels, or None."""
    if not INSTALLED:
        return "triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available():
        return "no GPU (TRITON_INTERPRET=1 runs the kernels slowly on a CPU)"
    return None


def why_not(request: AttentionRequest) -> str | None:
    """Return the reason why the engine cannot serve a call, or None."""
    reason = why_no_triton(request.device, request.dtype)
    if reason is not None:
        return reason
    if not 16 <= request.head_dim <= 256:
        return f"the kernels take head_dim 16 to 256, not {request.head_dim}"
    if request.options.scale <= 0:
        return f"the kernels take a positive scale, not {request.options.scale}"
    return None


def takes_value_dim(request: AttentionRequest, value_dim: int) -> bool:
    """Return whether v is as wide as q and k."""
    return value_dim == request.head_dim


def forward(inputs: AttentionInputs, options: AttentionOptions, plan: PlanTensors) -> AttentionOutputs:
    """Compute out in q's dtype, and lse and the map in float32."""
    from molsaki_kernels._triton.attention_forward import attention_forward

    return attention_forward(_prepared(inputs), options, plan)


def backward(
    gradients: OutputGradients,
    inputs: AttentionInputs,
    outputs: AttentionOutputs,
    options: AttentionOptions,
    plan: PlanTensors,
) -> InputGradients:
    """Compute dq, dk, dv and dsinks; the map's part is included."""
    from molsaki_kernels._triton.attention_backward import attention_backward

    outputs = AttentionOutputs(with_contiguous_head_dim(outputs.out), outputs.lse)
    return attention_backward(gradients, _prepared(inputs), outputs, options, plan)


def _prepared(inputs: AttentionInputs) -> AttentionInputs:
    if inputs.q.stride(-1) == inputs.k.stride(-1) == inputs.v.stride(-1) == 1:
        return inputs
    q, k, v = (with_contiguous_head_dim(x) for x in (inputs.q, inputs.k, inputs.v))
    return dataclasses.replace(inputs, q=q, k=k, v=v)
