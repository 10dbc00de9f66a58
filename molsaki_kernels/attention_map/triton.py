"""The stepwise map by the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from molsaki_kernels._triton.support import why_no_triton
from molsaki_kernels.spec import AttentionOptions, MapInputs, PlanTensors
from molsaki_kernels.strides import with_contiguous_head_dim

NAME = "triton"


def why_not(q: Tensor, options: AttentionOptions) -> str | None:
    """Return the reason why the map of ``q`` cannot be computed, or None."""
    return why_no_triton(q.device, q.dtype)


def forward(inputs: MapInputs, options: AttentionOptions, plan: PlanTensors) -> Tensor:
    """Compute the map, ``(N, S, W)`` or per head ``(N, Hq, S, W)``, float32."""
    from molsaki_kernels._triton.map_forward import map_forward

    return map_forward(_prepared(inputs), options, plan)


class Gradient:
    """The map's gradient in two phases; the second recomputes the weights, which costs less than storing them."""

    def __init__(self, dmaps: Tensor, inputs: MapInputs, options: AttentionOptions, plan: PlanTensors):
        from molsaki_kernels._triton.map_backward import map_dlse

        self._arguments = (dmaps, _prepared(inputs), options, plan)
        self.dlse = map_dlse(*self._arguments)

    def add_to(self, dq: Tensor, dk: Tensor) -> None:
        """Add to dq ``(B, Hq, M, D)`` and dk ``(B, Hkv, M, D)`` in place."""
        from molsaki_kernels._triton.map_backward import map_backward

        map_backward(*self._arguments, dq=dq, dk=dk)


def backward(
    dmaps: Tensor, inputs: MapInputs, options: AttentionOptions, plan: PlanTensors
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dq, dk and dlse in one pass."""
    from molsaki_kernels._triton.map_backward import map_backward

    return map_backward(dmaps, _prepared(inputs), options, plan)


def _prepared(inputs: MapInputs) -> MapInputs:
    if inputs.q.stride(-1) == inputs.k.stride(-1) == 1:
        return inputs
    q, k = with_contiguous_head_dim(inputs.q), with_contiguous_head_dim(inputs.k)
    return MapInputs(q, k, inputs.lse, inputs.cu_seqlens)
