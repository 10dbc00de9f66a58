"""The functions behind the custom operators, called without the operators.

An operator written in Python costs the host a good part of a millisecond a layer, both passes, where a
``torch.autograd.Function`` costs 30 us. Where something watches operators (tracers, dispatch modes), they are called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether nothing watches operators: no tracer, no dispatch mode, no function transform, no subclass of Tensor."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(t is None or (type(t) in _KINDS and t.device.type in ("cpu", "cuda")) for t in tensors)
    )


_KINDS = (Tensor, torch.nn.Parameter)


def function(name: str, forward: Callable, setup: Callable, backward: Callable) -> Callable:
    """What applies ``forward(*inputs)`` with the gradient ``backward(ctx, *gradients)``.

    Args:
        name: the profiler's.
        setup: ``setup(ctx, inputs, output)``, as a custom operator's.
        backward: with gradients enabled (``create_graph=True``) it has to call an operator: one without a gradient of
            its own says so when it is differentiated.
    """

    def both(ctx, *inputs):
        output = forward(*inputs)
        setup(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(both), "backward": staticmethod(backward)}
    made: type[torch.autograd.Function] = type(name, (torch.autograd.Function,), methods)
    return made.apply


def is_plain_backward(*gradients: Tensor | None) -> bool:
    """As :func:`is_plain`, of a backward that nobody wants the gradient of."""
    return not torch.is_grad_enabled() and is_plain(*gradients)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Autocast casts what a caller hands in, not the products inside, whose precision is chosen there."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()
