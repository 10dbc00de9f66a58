"""The operator that splits the output of an attention with v widened into out and the map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from molsaki_kernels import widened_values
from molsaki_kernels.direct_call import runs_untraced, without_autocast
from molsaki_kernels.ops.flat import (
    register,
)
from molsaki_kernels.strides import empty_out

_SPLIT = "Tensor? cu_seqlens, Tensor steps, bool per_head"


def run_split(
    wide: Tensor,
    v_columns: int,
    num_words: int,
    cu_seqlens: Tensor | None,
    steps: Tensor,
    per_head: bool,
) -> tuple[Tensor, Tensor]:
    """Return out and the map of an attention with v widened, differentiably."""
    call = (v_columns, num_words, cu_seqlens, steps, per_head)
    if runs_untraced(wide):
        out, maps = _apply_split(wide, call)
    else:
        out, maps = torch.ops.molsaki.split_widened(wide, *call)
    return out, maps


def _split(
    wide: Tensor, v_columns: int, num_words: int, cu_seqlens: Tensor | None, steps: Tensor, per_head: bool
) -> tuple[Tensor, Tensor]:
    with without_autocast(wide):
        return widened_values.split(wide, v_columns, num_words, cu_seqlens, steps, per_head)


def _split_fake(
    wide: Tensor, v_columns: int, num_words: int, cu_seqlens: Tensor | None, steps: Tensor, per_head: bool
) -> tuple[Tensor, Tensor]:
    heads = (wide.shape[1],) if per_head else ()
    dtype = torch.promote_types(wide.dtype, torch.float32)
    maps = wide.new_empty((steps.shape[0], *heads, steps.shape[1], num_words), dtype=dtype)
    return empty_out(wide, wide[..., :v_columns]), maps


def _split_backward_operator(dout: Tensor | None, dmaps: Tensor | None, wide: Tensor, *rest: Any) -> Tensor:
    v_columns, cu_seqlens, steps, per_head = rest
    with without_autocast(wide):
        return widened_values.split_gradient(dout, dmaps, wide, v_columns, cu_seqlens, steps, per_head)


def _split_backward_fake(dout: Tensor | None, dmaps: Tensor | None, wide: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(wide)


def _save_split(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    wide, v_columns, _, cu_seqlens, steps, per_head = inputs
    ctx.save_for_backward(wide, cu_seqlens, steps)
    ctx.rest = v_columns, per_head
    ctx.set_materialize_grads(False)


def _differentiate_split(ctx: Any, dout: Tensor | None, dmaps: Tensor | None, directly: bool) -> Tensor | None:
    if dout is None and dmaps is None:
        return None
    wide, cu_seqlens, steps = ctx.saved_tensors
    v_columns, per_head = ctx.rest
    function = _split_backward_operator if directly else torch.ops.molsaki.split_widened_backward
    dwide: Tensor = function(dout, dmaps, wide, v_columns, cu_seqlens, steps, per_head)
    return dwide


def _split_backward(ctx: Any, dout: Tensor | None, dmaps: Tensor | None) -> tuple[Tensor | None, ...]:
    return _differentiate_split(ctx, dout, dmaps, directly=False), *(None,) * 5


class _Split(Function):
    """The split without the operator."""

    @staticmethod
    def forward(ctx: Any, wide: Tensor, call: tuple[Any, ...]) -> Any:
        outputs = _split(wide, *call)
        _save_split(ctx, (wide, *call), outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dmaps: Tensor | None) -> Any:
        directly = not torch.is_grad_enabled() and runs_untraced(dout, dmaps)
        return _differentiate_split(ctx, dout, dmaps, directly), None


_apply_split: Callable[..., Any] = _Split.apply

register(
    "split_widened",
    f"(Tensor wide, SymInt v_columns, SymInt num_words, {_SPLIT}) -> (Tensor out, Tensor maps)",
    _split,
    _split_fake,
).register_autograd(_split_backward, setup_context=_save_split)
register(
    "split_widened_backward",
    f"(Tensor? dout, Tensor? dmaps, Tensor wide, SymInt v_columns, {_SPLIT}) -> Tensor",
    _split_backward_operator,
    _split_backward_fake,
)
