"""Compares a function with itself compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def assert_compiles_alike(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], *rest: Any, dynamic: bool
) -> None:
    """``function(*tensors, *rest)``, a scalar, and its gradients are the same compiled as one graph."""
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    results = []
    for call in (function, compiled):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        value = call(*leaves, *rest)
        results.append((value, *torch.autograd.grad(value, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
