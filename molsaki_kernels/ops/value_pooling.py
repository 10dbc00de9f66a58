"""The operator of value pooling: schema, fake, autograd, and its call without the operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from molsaki_kernels.direct_call import runs_untraced, without_autocast
from molsaki_kernels.ops.flat import (
    register,
)
from molsaki_kernels.spec import (
    PoolingOptions,
)
from molsaki_kernels.strides import dense_strides, match_strides
from molsaki_kernels.value_pooling import POOLING_ENGINES

_POOLING = "Tensor v, Tensor? lengths, Tensor? cu_seqlens, float eps, bool mean, bool mean_heads, str engine"


def run_pooling(
    v: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, options: PoolingOptions, engine: str
) -> Tensor:
    """Pool value vectors, differentiably. ``engine`` is one of :data:`POOLING_ENGINES`."""
    pooled: Tensor
    if runs_untraced(v):
        pooled = _apply_pooling(v, (lengths, cu_seqlens, options, engine))
    else:
        flat = (lengths, cu_seqlens, options.eps, options.mean, options.mean_heads, engine)
        pooled = torch.ops.molsaki.pool_values(v, *flat)
    return pooled


def _pool(v: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, options: PoolingOptions, engine: str) -> Tensor:
    with without_autocast(v):
        return POOLING_ENGINES[engine].forward(v, lengths, cu_seqlens, options)


def _pool_gradient(
    dpooled: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    options: PoolingOptions,
    engine: str,
) -> Tensor:
    with without_autocast(v):
        dv = POOLING_ENGINES[engine].backward(dpooled, v, lengths, cu_seqlens, options)
        return match_strides(dv, dense_strides(v))


def _pool_operator(v: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, *rest: Any) -> Tensor:
    *options, engine = rest
    return _pool(v, lengths, cu_seqlens, PoolingOptions(*options), engine)


def _pool_fake(v: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, *rest: Any) -> Tensor:
    options = PoolingOptions(*rest[:-1])
    N = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    width = v.shape[3] * (1 if options.mean_heads else v.shape[1])
    return v.new_empty((N, width), dtype=torch.promote_types(v.dtype, torch.float32))


def _pool_backward_operator(
    dpooled: Tensor, v: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, *rest: Any
) -> Tensor:
    *options, engine = rest
    return _pool_gradient(dpooled, v, lengths, cu_seqlens, PoolingOptions(*options), engine)


def _pool_backward_fake(dpooled: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return v.new_empty_strided(v.shape, dense_strides(v))


def _save_pool(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.rest = inputs[3:]


def _pool_backward(ctx: Any, dpooled: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.molsaki.pool_values_backward(dpooled, *ctx.saved_tensors, *ctx.rest), *(None,) * 6


class _Pooling(Function):
    """Value pooling without the operator."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, call: tuple[Any, ...]) -> Any:
        lengths, cu_seqlens, options, engine = call
        ctx.save_for_backward(v, lengths, cu_seqlens)
        ctx.rest = (options.eps, options.mean, options.mean_heads, engine)
        return _pool(v, *call)

    @staticmethod
    def backward(ctx: Any, dpooled: Tensor) -> Any:
        if torch.is_grad_enabled() or not runs_untraced(dpooled):
            return _pool_backward(ctx, dpooled)[:2]
        return _pool_backward_operator(dpooled, *ctx.saved_tensors, *ctx.rest), None


_apply_pooling: Callable[..., Any] = _Pooling.apply

register("pool_values", f"({_POOLING}) -> Tensor", _pool_operator, _pool_fake).register_autograd(
    _pool_backward, setup_context=_save_pool
)
register(
    "pool_values_backward", f"(Tensor dpooled, {_POOLING}) -> Tensor", _pool_backward_operator, _pool_backward_fake
)
