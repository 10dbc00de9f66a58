"""The operator of attention with its map: schema, fake, autograd, and its call without the operator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from molsaki_kernels import widened_values
from molsaki_kernels.attention import ENGINES
from molsaki_kernels.attention.protocol import as_served
from molsaki_kernels.attention.sinks import sinks_gradient
from molsaki_kernels.attention_map import MAP_ENGINES, SERVES_EVERY_CALL
from molsaki_kernels.direct_call import runs_untraced, without_autocast
from molsaki_kernels.ops.attention_map import run_map
from molsaki_kernels.ops.flat import (
    CALL,
    call_of,
    empty_map,
    flat_inputs,
    flat_options,
    flat_plan,
    register,
)
from molsaki_kernels.ops.split_widened import run_split
from molsaki_kernels.spec import (
    AttentionInputs,
    AttentionOptions,
    AttentionOutputs,
    InputGradients,
    OutputGradients,
    PlanTensors,
)
from molsaki_kernels.strides import dense_strides, empty_out, match_strides, out_strides


def run_attention(
    inputs: AttentionInputs, options: AttentionOptions, plan: PlanTensors, engine: str, map_engine: str
) -> AttentionOutputs:
    """Compute attention and its map, differentiably.

    Args:
        engine: one of :data:`ENGINES`.
        map_engine: one of :data:`MAP_ENGINES`, or "widened" (``widened_values.py``); unused if the engine computes the
            map.
    """
    if map_engine == widened_values.NAME:
        return _run_widened(inputs, options, plan, engine)
    implementation = ENGINES[engine]
    if implementation.DIFFERENTIABLE:
        outputs = implementation.forward(_padded(inputs, options, engine), options, plan)
        maps = run_map(inputs.map_inputs(outputs.lse), options, plan, map_engine)
        out, value_dim = outputs.out, inputs.v.shape[3]
        return AttentionOutputs(out if out.shape[3] == value_dim else out[..., :value_dim].clone(), outputs.lse, maps)
    q, k, v, sinks = inputs.q, inputs.k, inputs.v, inputs.sinks
    if runs_untraced(q, k, v, sinks):
        call = (inputs, options, plan, engine, map_engine)
        return AttentionOutputs(*_apply_attention(q, k, v, sinks, call))
    flat = (*flat_inputs(inputs), *flat_options(options), *flat_plan(plan), engine, map_engine)
    return AttentionOutputs(*torch.ops.molsaki.stepwise_attention(*flat))


def _run_widened(
    inputs: AttentionInputs, options: AttentionOptions, plan: PlanTensors, engine: str
) -> AttentionOutputs:
    """Compute attention and its map by calls of the engine with v widened, and a segmented sum."""
    implementation = ENGINES[engine]
    usual = "" if implementation.COMPUTES_MAP else SERVES_EVERY_CALL
    if plan.is_empty(inputs.q):
        return run_attention(inputs, options, plan, engine, usual)
    widths = widened_values.widths(implementation, inputs.request(options), plan.num_words)
    outputs, maps = [], []
    for (v_columns, _, num_words, _), (call, no_map) in zip(
        widths.groups, widened_values.calls(inputs, plan, widths), strict=True
    ):
        if implementation.DIFFERENTIABLE:
            found = implementation.forward(call, options, no_map)
        else:
            found = run_attention(call, options, no_map, engine, usual)
        out, part = run_split(found.out, v_columns, num_words, inputs.cu_seqlens, plan.steps, options.per_head)
        outputs.append(AttentionOutputs(out, found.lse))
        maps.append(part)
    whole = maps[0] if len(maps) == 1 else torch.cat(maps, -1)
    return AttentionOutputs(outputs[0].out, outputs[0].lse, whole)


def _attention(
    inputs: AttentionInputs, options: AttentionOptions, plan: PlanTensors, engine: str, map_engine: str
) -> AttentionOutputs:
    with without_autocast(inputs.q):
        q, value_dim = inputs.q, inputs.v.shape[3]
        fits = q.shape[3] == value_dim and not value_dim % ENGINES[engine].HEAD_DIM_MULTIPLE
        served = inputs if fits else _padded(inputs, options, engine)
        outputs = ENGINES[engine].forward(served, options, plan)
        out = outputs.out if outputs.out.shape[3] == value_dim else outputs.out[..., :value_dim]
        lse, maps = outputs.lse, outputs.maps
        if maps is None:
            lse = lse.contiguous()
            maps = MAP_ENGINES[map_engine].forward(inputs.map_inputs(lse), options, plan)
        promised = match_strides(out, dense_strides(q) if q.shape[3] == value_dim else out_strides(q, value_dim))
        return outputs if promised is outputs.out and maps is outputs.maps else AttentionOutputs(promised, lse, maps)


def _attention_gradients(
    gradients: OutputGradients,
    inputs: AttentionInputs,
    outputs: AttentionOutputs,
    options: AttentionOptions,
    plan: PlanTensors,
    engine: str,
    map_engine: str,
) -> InputGradients:
    with without_autocast(inputs.q):
        if ENGINES[engine].COMPUTES_MAP:
            served = _padded(inputs, options, engine, backward=True)
            result = _engine_gradients(gradients, inputs, served, outputs, options, plan, engine)
        else:
            result = _gradients_with_map(gradients, inputs, outputs, options, plan, engine, map_engine)
        dq, dk, dv = result.dq, result.dk, result.dv
        strides_of = ENGINES[engine].gradient_strides
        if dq.stride() != (strides := strides_of(inputs.q)):
            dq = match_strides(dq, strides)
        if dk.stride() != (strides := strides_of(inputs.k)):
            dk = match_strides(dk, strides)
        if dv.stride() != (strides := strides_of(inputs.v)):
            dv = match_strides(dv, strides)
        return InputGradients(dq, dk, dv, result.dsinks)


def _gradients_with_map(
    gradients: OutputGradients,
    inputs: AttentionInputs,
    outputs: AttentionOutputs,
    options: AttentionOptions,
    plan: PlanTensors,
    engine: str,
    map_engine: str,
) -> InputGradients:
    """Compute the gradients by an engine that does not compute the map: the map's gradient passes through dlse."""
    implementation = ENGINES[engine]
    served = _padded(inputs, options, engine, backward=True)
    may_fuse = gradients.dmaps is not None and map_engine == implementation.FUSED_MAP and served is inputs
    if may_fuse and implementation.why_not_fused(inputs, options, plan) is None:
        return implementation.backward_with_map(gradients, inputs, outputs, options, plan)
    dlse = gradients.dlse
    dout = torch.zeros_like(outputs.out) if gradients.dout is None else gradients.dout
    upstream, attention = OutputGradients(dout, dlse), outputs
    map_gradient = None
    if gradients.dmaps is not None:
        map_inputs = inputs.map_inputs(outputs.lse)
        map_gradient = MAP_ENGINES[map_engine].Gradient(gradients.dmaps, map_inputs, options, plan)
        if implementation.folds_dlse(served):
            folded_out, folded_dout, dlse = map_gradient.fold(outputs.out, dout, dlse)
            upstream, attention = OutputGradients(folded_dout), AttentionOutputs(folded_out, outputs.lse)
        else:
            dlse = map_gradient.dlse if dlse is None else map_gradient.dlse + dlse
            upstream = OutputGradients(dout, dlse)
    result = _engine_gradients(upstream, inputs, served, attention, options, plan, engine)
    # Folding dlse replaces a vanished dO by tiny numbers, which slightly affect dv.
    dv = torch.zeros_like(inputs.v) if gradients.dout is None else result.dv
    if map_gradient is not None:
        map_gradient.add_to(result.dq, result.dk)
    dsinks = None
    if inputs.sinks is not None:
        dtype = torch.float64 if inputs.q.dtype == torch.float32 else outputs.lse.dtype
        delta = (dout.to(dtype) * outputs.out).sum(-1)
        dsinks = sinks_gradient(inputs.sinks, outputs.lse, delta if dlse is None else delta - dlse)
    return InputGradients(result.dq, result.dk, dv, dsinks)


def _engine_gradients(
    gradients: OutputGradients,
    inputs: AttentionInputs,
    served: AttentionInputs,
    outputs: AttentionOutputs,
    options: AttentionOptions,
    plan: PlanTensors,
    engine: str,
) -> InputGradients:
    """Call the engine's backward with ``served``, the inputs as it takes them, and cut the gradients to the inputs."""
    if served is inputs:
        return ENGINES[engine].backward(gradients, inputs, outputs, options, plan)
    D, Dv = inputs.q.shape[3], inputs.v.shape[3]
    width, dout = served.v.shape[3], gradients.dout
    gradients = dataclasses.replace(gradients, dout=None if dout is None else _with_width(dout, width))
    outputs = dataclasses.replace(outputs, out=_with_width(outputs.out, width))
    result = ENGINES[engine].backward(gradients, served, outputs, options, plan)
    return InputGradients(result.dq[..., :D], result.dk[..., :D], result.dv[..., :Dv], result.dsinks)


def _padded(inputs: AttentionInputs, options: AttentionOptions, engine: str, backward: bool = False) -> AttentionInputs:
    """Return the inputs as the engine's forward or backward gets them: see :func:`as_served`."""
    width = inputs.q.shape[3]
    if width == inputs.v.shape[3] and not width % ENGINES[engine].HEAD_DIM_MULTIPLE:
        return inputs
    request = dataclasses.replace(inputs.request(options), backward=backward)
    served = as_served(ENGINES[engine], request)
    if (served.head_dim, served.value_dim) == (request.head_dim, request.value_dim):
        return inputs
    q, k = (_with_width(x, served.head_dim) for x in (inputs.q, inputs.k))
    v = _with_width(inputs.v, served.value_dim or served.head_dim)
    return dataclasses.replace(inputs, q=q, k=k, v=v)


def _with_width(x: Tensor, width: int) -> Tensor:
    """Return ``x (B, H, M, D)`` with zeros appended up to ``width`` columns."""
    return x if x.shape[3] == width else torch.nn.functional.pad(x, (0, width - x.shape[3]))


def _attention_operator(*flat: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    outputs = _attention(*call_of(flat))
    return outputs.out, outputs.lse, outputs.maps


def _attention_fake(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, options, plan, *_ = call_of(flat)
    q, maps = inputs.q, empty_map(inputs.q, options, plan)
    return empty_out(q, inputs.v), q.new_empty(q.shape[:3], dtype=maps.dtype), maps


def _attention_backward_operator(
    dout: Tensor | None, dlse: Tensor | None, dmaps: Tensor | None, out: Tensor, lse: Tensor, *flat: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, options, plan, engine, map_engine = call_of(flat)
    gradients, outputs = OutputGradients(dout, dlse, dmaps), AttentionOutputs(out, lse)
    result = _attention_gradients(gradients, inputs, outputs, options, plan, engine, map_engine)
    dsinks = inputs.q.new_empty(0) if result.dsinks is None else result.dsinks
    return result.dq, result.dk, result.dv, dsinks


def _attention_backward_fake(
    dout: Tensor | None, dlse: Tensor | None, dmaps: Tensor | None, out: Tensor, lse: Tensor, *flat: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, _, _, engine, _ = call_of(flat)
    strides_of = ENGINES[engine].gradient_strides
    dq, dk, dv = (x.new_empty_strided(x.shape, strides_of(x)) for x in (inputs.q, inputs.k, inputs.v))
    return dq, dk, dv, inputs.q.new_empty(0) if inputs.sinks is None else torch.empty_like(inputs.sinks)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    attention_inputs, options, plan, *engines = call_of(inputs)
    _save(ctx, attention_inputs, options, plan, AttentionOutputs(*output), tuple(engines))


def _save(
    ctx: Any,
    inputs: AttentionInputs,
    options: AttentionOptions,
    plan: PlanTensors,
    outputs: AttentionOutputs,
    engines: tuple[str, ...],
) -> None:
    tensors = (*flat_inputs(inputs), outputs.out, outputs.lse, plan.steps, plan.tokens, plan.word_of_token)
    ctx.save_for_backward(*tensors)
    ctx.options, ctx.num_words, ctx.engines = options, plan.num_words, engines
    ctx.set_materialize_grads(False)


def _differentiate_attention(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, dmaps: Tensor | None, directly: bool
) -> tuple[Tensor | None, ...]:
    """Return dq, dk, dv and dsinks by the functions themselves or by the backward operator."""
    if dout is None and dlse is None and dmaps is None:
        return None, None, None, None
    q, k, v, sinks, cu_seqlens, out, lse, steps, tokens, word_of_token = ctx.saved_tensors
    inputs, plan = AttentionInputs(q, k, v, sinks, cu_seqlens), PlanTensors(steps, tokens, word_of_token, ctx.num_words)
    if directly:
        gradients, outputs = OutputGradients(dout, dlse, dmaps), AttentionOutputs(out, lse)
        result = _attention_gradients(gradients, inputs, outputs, ctx.options, plan, *ctx.engines)
        return result.dq, result.dk, result.dv, result.dsinks
    flat = (*flat_inputs(inputs), *flat_options(ctx.options), *flat_plan(plan), *ctx.engines)
    dq, dk, dv, dsinks = torch.ops.molsaki.stepwise_attention_backward(dout, dlse, dmaps, out, lse, *flat)
    return dq, dk, dv, None if sinks is None else dsinks


def _attention_backward(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, dmaps: Tensor | None
) -> tuple[Tensor | None, ...]:
    dq, dk, dv, dsinks = _differentiate_attention(ctx, dout, dlse, dmaps, directly=False)
    return dq, dk, dv, dsinks, *(None,) * 12


class _Attention(Function):
    """Attention and its map without the operator."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: tuple[Any, ...]) -> Any:
        outputs = _attention(*call)
        inputs, options, plan, *engines = call
        _save(ctx, inputs, options, plan, outputs, tuple(engines))
        return outputs.out, outputs.lse, outputs.maps

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, dmaps: Tensor | None) -> Any:
        # With create_graph=True the operator is called, which raises an error because it has no derivative.
        directly = not torch.is_grad_enabled() and runs_untraced(dout, dlse, dmaps)
        return *_differentiate_attention(ctx, dout, dlse, dmaps, directly), None


_apply_attention: Callable[..., Any] = _Attention.apply

register(
    "stepwise_attention", f"({CALL}) -> (Tensor out, Tensor lse, Tensor maps)", _attention_operator, _attention_fake
).register_autograd(_attention_backward, setup_context=_save_attention)
register(
    "stepwise_attention_backward",
    f"(Tensor? dout, Tensor? dlse, Tensor? dmaps, Tensor out, Tensor lse, {CALL}) -> (Tensor, Tensor, Tensor, Tensor)",
    _attention_backward_operator,
    _attention_backward_fake,
)
