"""The error budget: twice the error of eager attention on the same input in the same dtype, plus one rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def error(got: Tensor, oracle: Tensor) -> float:
    """Root-mean-square error relative to the oracle's root-mean-square; absolute where the oracle is zero."""
    difference = (got.double() - oracle).norm()
    scale = oracle.norm()
    return (difference / scale if scale > 0 else difference).item()


def assert_within_budget(name: str, got: Tensor, oracle: Tensor, eager: Tensor) -> None:
    """``got`` and ``eager`` were computed in the working dtype, ``oracle`` in float64, from the same numbers."""
    assert got.shape == oracle.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(oracle.shape)}"
    assert got.isfinite().all(), f"{name}: not finite"
    rounding = torch.finfo(got.dtype).eps
    if got.dtype == torch.float64 and eager.dtype == torch.float64:
        rounding *= 16  # the oracle has the same precision, and its own error is unknown
    allowed = 2 * error(eager, oracle) + rounding
    assert error(got, oracle) <= allowed, f"{name}: error {error(got, oracle):.2e} exceeds the budget {allowed:.2e}"
