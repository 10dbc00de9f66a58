"""The protocol of stepwise-map implementations. An implementation is a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from molsaki_kernels.attention.lse_gradient import fold_dlse_into_out
from molsaki_kernels.spec import AttentionOptions, MapInputs, PlanTensors


class MapGradient(Protocol):
    """The gradient of the map, in two phases.

    The first phase gives :attr:`dlse`, which the attention's own backward needs, or folds it into O for a backward that
    ignores it. The second, :meth:`add_to`, adds the key columns' part to the dq and dk that this backward returned.

    Attributes:
        dlse: ``(B, Hq, M)`` float32 (float64 for float64 inputs).
    """

    dlse: Tensor

    def fold(self, out: Tensor, dout: Tensor, dlse: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return O' and dO' with :attr:`dlse`, and ``dlse`` if given, folded into them, and the sum of the two.

        An implementation that can do so in the pass that computes dlse overrides this.

        Args:
            out, dout: ``(B, Hq, M, D)``, not float16; see :func:`fold_dlse_into_out`.
        """
        total = self.dlse if dlse is None else self.dlse + dlse
        return *fold_dlse_into_out(out, dout, total), total

    def add_to(self, dq: Tensor, dk: Tensor) -> None:
        """Add to dq ``(B, Hq, M, D)`` and dk ``(B, Hkv, M, D)`` in place."""


class MapEngine(Protocol):
    """One implementation of the map."""

    NAME: str

    def why_not(self, q: Tensor, options: AttentionOptions) -> str | None:
        """Return the reason why the map of ``q`` cannot be computed, or None."""

    def forward(self, inputs: MapInputs, options: AttentionOptions, plan: PlanTensors) -> Tensor:
        """Compute the map, ``(N, S, W)`` or per head ``(N, Hq, S, W)``, float32 (float64 for float64 inputs)."""

    def backward(
        self, dmaps: Tensor, inputs: MapInputs, options: AttentionOptions, plan: PlanTensors
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute dq, dk and dlse where the map alone is differentiated."""

    @property
    def Gradient(self) -> Callable[[Tensor, MapInputs, AttentionOptions, PlanTensors], MapGradient]:
        """``Gradient(dmaps, inputs, options, plan)``; dmaps has the shape of the map."""


def both_phases(gradient: MapGradient, inputs: MapInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dlse of a gradient in two phases where the map alone is differentiated."""
    dq, dk = torch.zeros_like(inputs.q), torch.zeros_like(inputs.k)
    gradient.add_to(dq, dk)
    return dq, dk, gradient.dlse.to(inputs.lse.dtype)
