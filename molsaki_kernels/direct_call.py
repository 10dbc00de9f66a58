"""Decide whether a call may bypass the custom operator and use the functions behind it directly.

Dispatching an operator that is written in Python costs a good part of a millisecond per layer, forward and backward
together; a ``torch.autograd.Function`` costs 30 us. The operator is needed only if something observes it: a tracer, a
dispatch mode, a function transform or a subclass of Tensor.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_TENSOR_TYPES = (Tensor, torch.nn.Parameter)
_DEVICE_TYPES = ("cpu", "cuda")
_UNCHANGED = contextlib.nullcontext()


def runs_untraced(*tensors: Tensor | None) -> bool:
    """Return whether nothing observes the operators called with these tensors.

    Raises:
        NotImplementedError: under a transform of torch.func that differentiates, or with a tangent of forward-mode AD;
            a custom operator would drop the tangent silently.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        _refuse_derivatives()
        return False
    if forward_ad._current_level >= 0 and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    ):
        raise NotImplementedError("molsaki_kernels: expected no tangent of forward-mode AD; there is only a backward")
    if torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack():
        return False
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _TENSOR_TYPES or not (tensor.is_cuda or tensor.is_cpu)):
            return False
    return True


def _refuse_derivatives() -> None:
    for interpreter in torch._C._functorch.get_interpreter_stack() or ():
        kind = interpreter.key().name
        if kind in ("Grad", "Jvp"):
            raise NotImplementedError(
                f"molsaki_kernels: expected no transform of torch.func but vmap, got {kind.lower()}; "
                "differentiate with torch.autograd.grad or backward(), once and in reverse mode"
            )


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context without autocast for x's device.

    Autocast has cast the inputs already; the precision of the products inside is chosen here.
    """
    kind = x.device.type
    if (kind in _DEVICE_TYPES or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return _UNCHANGED


def autocast_is_on(x: Tensor) -> bool:
    """Return whether autocast is enabled for x's device."""
    kind = x.device.type
    return (kind in _DEVICE_TYPES or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)
