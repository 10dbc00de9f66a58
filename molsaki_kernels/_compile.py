"""Mark functions whose result torch.compile may take as a constant, without importing its compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant_when_compiled(function: F) -> F:
    """Have ``torch.compile`` call ``function`` while it traces and use the result as a constant.

    The same as ``torch.compiler.assume_constant_result``, which imports ``torch._dynamo`` (as much again as
    ``import torch``) as soon as it decorates anything. ``tests/kernels/test_api.py`` compares the two.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
