"""Pooling of value vectors, the router's input (MoLSAKI, arXiv 2604.15701, Eq. 5): Triton and PyTorch.

    x_i = V_i  (all heads concatenated, width Hkv * D; or the mean of the heads, width D)
    r_i = (mean(x_i^2) + eps)^-1/2,   y_i = r_i x_i,   h = sum_i y_i  (or the mean over the sequence)
    dx_i = r_i (dh - y_i mean(dh * y_i))

Each file provides ``NAME``, ``why_not(v)``, ``forward(v, lengths, cu_seqlens, options)`` and
``backward(dpooled, v, lengths, cu_seqlens, options)``.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from molsaki_kernels.spec import PoolingOptions
from molsaki_kernels.value_pooling import torch, triton


class PoolingEngine(Protocol):
    """One implementation of value pooling. An implementation is a module."""

    NAME: str

    def why_not(self, v: Tensor) -> str | None:
        """Return the reason why ``v`` cannot be pooled, or None."""

    def forward(self, v: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, options: PoolingOptions) -> Tensor:
        """Compute h, ``(N, width)`` float32 (float64 for float64)."""

    def backward(
        self,
        dpooled: Tensor,
        v: Tensor,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
        options: PoolingOptions,
    ) -> Tensor:
        """Compute dv in v's dtype."""


POOLING_ENGINES: dict[str, PoolingEngine] = {engine.NAME: engine for engine in (triton, torch)}
