"""The stepwise map by the Triton kernels."""

from __future__ import annotations

import functools

from torch import Tensor

from molsaki_kernels._triton.support import why_no_triton
from molsaki_kernels.attention_map.protocol import MapGradient
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


class Gradient(MapGradient):
    """The map's gradient in two phases; the second recomputes the weights, which costs less than storing them."""

    def __init__(self, dmaps: Tensor, inputs: MapInputs, options: AttentionOptions, plan: PlanTensors):
        self._call = dmaps, _prepared(inputs), options, plan

    @functools.cached_property
    def dlse(self) -> Tensor:  # type: ignore[override]  # computed on first read; fold may not need it
        """``(B, Hq, M)`` float32."""
        from molsaki_kernels._triton.map_backward import map_dlse

        return map_dlse(*self._call)[0]

    def fold(self, out: Tensor, dout: Tensor, dlse: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Compute O', dO' and dlse in one pass."""
        from molsaki_kernels._triton.map_backward import map_dlse

        total, folded_out, folded_dout = map_dlse(*self._call, dlse=dlse, out=out, dout=dout)
        assert folded_out is not None and folded_dout is not None
        return folded_out, folded_dout, total

    def add_to(self, dq: Tensor, dk: Tensor) -> None:
        """Add to dq ``(B, Hq, M, D)`` and dk ``(B, Hkv, M, D)`` in place."""
        from molsaki_kernels._triton.map_backward import add_map_gradients

        add_map_gradients(*self._call, dq, dk)


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
