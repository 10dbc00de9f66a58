"""The operator of the map alone: schema, fake, autograd, and its call without the operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from molsaki_kernels.attention_map import MAP_ENGINES
from molsaki_kernels.direct_call import runs_untraced, without_autocast
from molsaki_kernels.ops.flat import (
    MAP_CALL,
    empty_map,
    flat_map_inputs,
    flat_options,
    flat_plan,
    map_call_of,
    register,
)
from molsaki_kernels.spec import (
    AttentionOptions,
    MapInputs,
    PlanTensors,
)
from molsaki_kernels.strides import dense_strides, match_strides


def run_map(inputs: MapInputs, options: AttentionOptions, plan: PlanTensors, engine: str) -> Tensor:
    """Compute the map, differentiably in q, k and lse. ``engine`` is one of :data:`MAP_ENGINES`."""
    maps: Tensor
    if runs_untraced(inputs.q, inputs.k, inputs.lse):
        maps = _apply_map(inputs.q, inputs.k, inputs.lse, (inputs, options, plan, engine))
    else:
        flat = (*flat_map_inputs(inputs), *flat_options(options), *flat_plan(plan), engine)
        maps = torch.ops.molsaki.stepwise_map(*flat)
    return maps


def _map(inputs: MapInputs, options: AttentionOptions, plan: PlanTensors, engine: str) -> Tensor:
    with without_autocast(inputs.q):
        return MAP_ENGINES[engine].forward(inputs, options, plan)


def _map_gradients(
    dmaps: Tensor, inputs: MapInputs, options: AttentionOptions, plan: PlanTensors, engine: str
) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(inputs.q):
        dq, dk, dlse = MAP_ENGINES[engine].backward(dmaps, inputs, options, plan)
        dq, dk = match_strides(dq, dense_strides(inputs.q)), match_strides(dk, dense_strides(inputs.k))
        return dq, dk, match_strides(dlse, torch.empty_like(inputs.lse, device="meta").stride())


def _map_operator(*flat: Any) -> Tensor:
    return _map(*map_call_of(flat))


def _map_fake(*flat: Any) -> Tensor:
    inputs, options, plan, _ = map_call_of(flat)
    return empty_map(inputs.q, options, plan)


def _map_backward_operator(dmaps: Tensor, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _map_gradients(dmaps, *map_call_of(flat))


def _map_backward_fake(dmaps: Tensor, q: Tensor, k: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk = (x.new_empty_strided(x.shape, dense_strides(x)) for x in (q, k))
    return dq, dk, torch.empty_like(lse)


def _save_map(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    map_inputs, options, plan, engine = map_call_of(inputs)
    ctx.save_for_backward(*flat_map_inputs(map_inputs), plan.steps, plan.tokens, plan.word_of_token)
    ctx.call = options, plan.num_words, engine


def _differentiate_map(ctx: Any, dmaps: Tensor, directly: bool) -> tuple[Tensor, Tensor, Tensor]:
    q, k, lse, cu_seqlens, steps, tokens, word_of_token = ctx.saved_tensors
    options, num_words, engine = ctx.call
    inputs, plan = MapInputs(q, k, lse, cu_seqlens), PlanTensors(steps, tokens, word_of_token, num_words)
    if directly:
        return _map_gradients(dmaps, inputs, options, plan, engine)
    flat = (*flat_map_inputs(inputs), *flat_options(options), *flat_plan(plan), engine)
    dq, dk, dlse = torch.ops.molsaki.stepwise_map_backward(dmaps, *flat)
    return dq, dk, dlse


def _map_backward(ctx: Any, dmaps: Tensor) -> tuple[Tensor | None, ...]:
    return *_differentiate_map(ctx, dmaps, directly=False), *(None,) * 11


class _Map(Function):
    """The map without the operator."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, lse: Tensor, call: tuple[Any, ...]) -> Any:
        maps = _map(*call)
        inputs, options, plan, engine = call
        _save_map(ctx, (*flat_map_inputs(inputs), *flat_options(options), *flat_plan(plan), engine), maps)
        return maps

    @staticmethod
    def backward(ctx: Any, dmaps: Tensor) -> Any:
        directly = not torch.is_grad_enabled() and runs_untraced(dmaps)
        return *_differentiate_map(ctx, dmaps, directly), None


_apply_map: Callable[..., Any] = _Map.apply

register("stepwise_map", f"({MAP_CALL}) -> Tensor", _map_operator, _map_fake).register_autograd(
    _map_backward, setup_context=_save_map
)
register(
    "stepwise_map_backward",
    f"(Tensor dmaps, {MAP_CALL}) -> (Tensor, Tensor, Tensor)",
    _map_backward_operator,
    _map_backward_fake,
)
