"""The custom operators: schemas, fakes and autograd of attention with its map, of the map alone and of value pooling.

Operators take tensors and numbers, so the dataclasses of ``spec.py`` are flattened and rebuilt here, and only here. An
operator gets the names of the engines, so that its backward uses the same ones. Every output is a fresh tensor.

``run_attention``, ``run_map`` and ``run_pooling`` call an operator or, where nothing observes operators
(``direct_call.py``), an autograd function that calls them too. The public functions check all arguments first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from molsaki_kernels import widened_values
from molsaki_kernels.attention import ENGINES, sdpa
from molsaki_kernels.attention.protocol import as_served
from molsaki_kernels.attention.sinks import sinks_gradient
from molsaki_kernels.attention_map import MAP_ENGINES
from molsaki_kernels.direct_call import runs_untraced, without_autocast
from molsaki_kernels.spec import (
    AttentionInputs,
    AttentionOptions,
    AttentionOutputs,
    InputGradients,
    MapInputs,
    OutputGradients,
    PlanTensors,
    PoolingOptions,
)
from molsaki_kernels.strides import dense_strides, empty_out, match_strides, out_strides
from molsaki_kernels.value_pooling import POOLING_ENGINES

_OPTIONS = "bool causal, float scale, SymInt? window, float? softcap, bool per_head"
_PLAN = "Tensor steps, Tensor tokens, Tensor word_of_token, SymInt num_words"
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? cu_seqlens"
_MAP_INPUTS = "Tensor q, Tensor k, Tensor lse, Tensor? cu_seqlens"


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
    flat = (*_flat_inputs(inputs), *_flat_options(options), *_flat_plan(plan), engine, map_engine)
    return AttentionOutputs(*torch.ops.molsaki.stepwise_attention(*flat))


def _run_widened(
    inputs: AttentionInputs, options: AttentionOptions, plan: PlanTensors, engine: str
) -> AttentionOutputs:
    """Compute attention and its map by calls of the engine with v widened, and a segmented sum."""
    implementation = ENGINES[engine]
    usual = "" if implementation.COMPUTES_MAP else "torch"
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
        out, part = _run_split(found.out, v_columns, num_words, inputs.cu_seqlens, plan.steps, options.per_head)
        outputs.append(AttentionOutputs(out, found.lse))
        maps.append(part)
    whole = maps[0] if len(maps) == 1 else torch.cat(maps, -1)
    return AttentionOutputs(outputs[0].out, outputs[0].lse, whole)


def _run_split(
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


def run_map(inputs: MapInputs, options: AttentionOptions, plan: PlanTensors, engine: str) -> Tensor:
    """Compute the map, differentiably in q, k and lse. ``engine`` is one of :data:`MAP_ENGINES`."""
    maps: Tensor
    if runs_untraced(inputs.q, inputs.k, inputs.lse):
        maps = _apply_map(inputs.q, inputs.k, inputs.lse, (inputs, options, plan, engine))
    else:
        flat = (*_flat_map_inputs(inputs), *_flat_options(options), *_flat_plan(plan), engine)
        maps = torch.ops.molsaki.stepwise_map(*flat)
    return maps


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


# Attention and its map


def _attention(
    inputs: AttentionInputs, options: AttentionOptions, plan: PlanTensors, engine: str, map_engine: str
) -> AttentionOutputs:
    with without_autocast(inputs.q):
        q, value_dim = inputs.q, inputs.v.shape[3]
        fits = q.shape[3] == value_dim and not value_dim % getattr(ENGINES[engine], "HEAD_DIM_MULTIPLE", 1)
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
        if dq.stride() != (strides := _gradient_strides(inputs.q, engine)):
            dq = match_strides(dq, strides)
        if dk.stride() != (strides := _gradient_strides(inputs.k, engine)):
            dk = match_strides(dk, strides)
        if dv.stride() != (strides := _gradient_strides(inputs.v, engine)):
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
    module: Any = ENGINES[engine]  # three of its functions are optional
    served = _padded(inputs, options, engine, backward=True)
    may_fuse = gradients.dmaps is not None and map_engine == "triton" and hasattr(module, "why_not_fused")
    if may_fuse and served is inputs and module.why_not_fused(inputs, options, plan) is None:
        fused: InputGradients = module.backward_with_map(gradients, inputs, outputs, options, plan)
        return fused
    dlse = gradients.dlse
    dout = torch.zeros_like(outputs.out) if gradients.dout is None else gradients.dout
    upstream, attention = OutputGradients(dout, dlse), outputs
    map_gradient = None
    if gradients.dmaps is not None:
        map_inputs = inputs.map_inputs(outputs.lse)
        map_gradient = MAP_ENGINES[map_engine].Gradient(gradients.dmaps, map_inputs, options, plan)
        if hasattr(module, "folds_dlse") and module.folds_dlse(served):
            folded_out, folded_dout, dlse = map_gradient.fold(outputs.out, dout, dlse)
            upstream, attention = OutputGradients(folded_dout), AttentionOutputs(folded_out, outputs.lse)
        else:
            dlse = map_gradient.dlse if dlse is None else map_gradient.dlse + dlse
            upstream = OutputGradients(dout, dlse)
    result = _engine_gradients(upstream, inputs, served, attention, options, plan, engine)
    # Folding dlse replaces a vanished dO by tiny numbers, which leave a trace in dv.
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
    if width == inputs.v.shape[3] and not width % getattr(ENGINES[engine], "HEAD_DIM_MULTIPLE", 1):
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
    outputs = _attention(*_call_of(flat))
    return outputs.out, outputs.lse, outputs.maps


def _attention_fake(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, options, plan, *_ = _call_of(flat)
    q, maps = inputs.q, _empty_map(inputs.q, options, plan)
    return empty_out(q, inputs.v), q.new_empty(q.shape[:3], dtype=maps.dtype), maps


def _attention_backward_operator(
    dout: Tensor | None, dlse: Tensor | None, dmaps: Tensor | None, out: Tensor, lse: Tensor, *flat: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, options, plan, engine, map_engine = _call_of(flat)
    gradients, outputs = OutputGradients(dout, dlse, dmaps), AttentionOutputs(out, lse)
    result = _attention_gradients(gradients, inputs, outputs, options, plan, engine, map_engine)
    dsinks = inputs.q.new_empty(0) if result.dsinks is None else result.dsinks
    return result.dq, result.dk, result.dv, dsinks


def _attention_backward_fake(
    dout: Tensor | None, dlse: Tensor | None, dmaps: Tensor | None, out: Tensor, lse: Tensor, *flat: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, _, _, engine, _ = _call_of(flat)
    dq, dk, dv = (x.new_empty_strided(x.shape, _gradient_strides(x, engine)) for x in (inputs.q, inputs.k, inputs.v))
    return dq, dk, dv, inputs.q.new_empty(0) if inputs.sinks is None else torch.empty_like(inputs.sinks)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    attention_inputs, options, plan, *engines = _call_of(inputs)
    _save(ctx, attention_inputs, options, plan, AttentionOutputs(*output), tuple(engines))


def _save(
    ctx: Any,
    inputs: AttentionInputs,
    options: AttentionOptions,
    plan: PlanTensors,
    outputs: AttentionOutputs,
    engines: tuple[str, ...],
) -> None:
    tensors = (*_flat_inputs(inputs), outputs.out, outputs.lse, plan.steps, plan.tokens, plan.word_of_token)
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
    flat = (*_flat_inputs(inputs), *_flat_options(ctx.options), *_flat_plan(plan), *ctx.engines)
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
        # With create_graph=True the operator is called, which has no derivative and says so.
        directly = not torch.is_grad_enabled() and runs_untraced(dout, dlse, dmaps)
        return *_differentiate_attention(ctx, dout, dlse, dmaps, directly), None


_apply_attention: Callable[..., Any] = _Attention.apply


# Out and the map of an attention with v widened


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


# The map alone


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
    return _map(*_map_call_of(flat))


def _map_fake(*flat: Any) -> Tensor:
    inputs, options, plan, _ = _map_call_of(flat)
    return _empty_map(inputs.q, options, plan)


def _map_backward_operator(dmaps: Tensor, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _map_gradients(dmaps, *_map_call_of(flat))


def _map_backward_fake(dmaps: Tensor, q: Tensor, k: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk = (x.new_empty_strided(x.shape, dense_strides(x)) for x in (q, k))
    return dq, dk, torch.empty_like(lse)


def _save_map(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    map_inputs, options, plan, engine = _map_call_of(inputs)
    ctx.save_for_backward(*_flat_map_inputs(map_inputs), plan.steps, plan.tokens, plan.word_of_token)
    ctx.call = options, plan.num_words, engine


def _differentiate_map(ctx: Any, dmaps: Tensor, directly: bool) -> tuple[Tensor, Tensor, Tensor]:
    q, k, lse, cu_seqlens, steps, tokens, word_of_token = ctx.saved_tensors
    options, num_words, engine = ctx.call
    inputs, plan = MapInputs(q, k, lse, cu_seqlens), PlanTensors(steps, tokens, word_of_token, num_words)
    if directly:
        return _map_gradients(dmaps, inputs, options, plan, engine)
    flat = (*_flat_map_inputs(inputs), *_flat_options(options), *_flat_plan(plan), engine)
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
        _save_map(ctx, (*_flat_map_inputs(inputs), *_flat_options(options), *_flat_plan(plan), engine), maps)
        return maps

    @staticmethod
    def backward(ctx: Any, dmaps: Tensor) -> Any:
        directly = not torch.is_grad_enabled() and runs_untraced(dmaps)
        return *_differentiate_map(ctx, dmaps, directly), None


_apply_map: Callable[..., Any] = _Map.apply


# Value pooling


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


# Flattening and rebuilding


def _flat_inputs(inputs: AttentionInputs) -> tuple[Any, ...]:
    return inputs.q, inputs.k, inputs.v, inputs.sinks, inputs.cu_seqlens


def _flat_map_inputs(inputs: MapInputs) -> tuple[Any, ...]:
    return inputs.q, inputs.k, inputs.lse, inputs.cu_seqlens


def _flat_options(options: AttentionOptions) -> tuple[Any, ...]:
    return options.causal, options.scale, options.window, options.softcap, options.per_head


def _flat_plan(plan: PlanTensors) -> tuple[Any, ...]:
    return plan.steps, plan.tokens, plan.word_of_token, plan.num_words


def _call_of(flat: tuple[Any, ...]) -> tuple[AttentionInputs, AttentionOptions, PlanTensors, str, str]:
    engine, map_engine = flat[14:]
    plan = _plan_of(*flat[10:14])
    return AttentionInputs(*flat[:5]), AttentionOptions(*flat[5:10]), plan, engine, map_engine


def _map_call_of(flat: tuple[Any, ...]) -> tuple[MapInputs, AttentionOptions, PlanTensors, str]:
    return MapInputs(*flat[:4]), AttentionOptions(*flat[4:9]), _plan_of(*flat[9:13]), flat[13]


def _plan_of(steps: Tensor, tokens: Tensor, word_of_token: Tensor, num_words: int) -> PlanTensors:
    return PlanTensors(steps, tokens, word_of_token, num_words, keep=False)


def _gradient_strides(x: Tensor, engine: str) -> tuple[int, ...]:
    """Return the strides of x's gradient: those of x, but the CPU flash operator returns ``(B, M, H, D)``."""
    if engine == sdpa.NAME and x.device.type == "cpu":
        B, H, M, D = x.shape
        return M * H * D, D, H * D, 1
    return x.stride() if x.is_contiguous() else dense_strides(x)


def _empty_map(q: Tensor, options: AttentionOptions, plan: PlanTensors) -> Tensor:
    heads = (q.shape[1],) if options.per_head else ()
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((plan.steps.shape[0], *heads, plan.steps.shape[1], plan.num_words), dtype=dtype)


# Registration


def _operator(name: str, schema: str, function: Any, fake: Any) -> Any:
    def checked(*flat: Any) -> Any:
        if forward_ad._current_level >= 0:  # compiled code would drop the tangents
            raise NotImplementedError(f"molsaki::{name} has no forward-mode derivative (torch.func.jvp, dual_level)")
        return fake(*flat)

    operator = torch.library.custom_op(f"molsaki::{name}", function, mutates_args=(), schema=schema)
    operator.register_fake(checked)
    return operator


_CALL = f"{_INPUTS}, {_OPTIONS}, {_PLAN}, str engine, str map_engine"
_MAP_CALL = f"{_MAP_INPUTS}, {_OPTIONS}, {_PLAN}, str engine"
_SPLIT = "Tensor? cu_seqlens, Tensor steps, bool per_head"
_POOLING = "Tensor v, Tensor? lengths, Tensor? cu_seqlens, float eps, bool mean, bool mean_heads, str engine"

_operator(
    "stepwise_attention", f"({_CALL}) -> (Tensor out, Tensor lse, Tensor maps)", _attention_operator, _attention_fake
).register_autograd(_attention_backward, setup_context=_save_attention)
_operator(
    "stepwise_attention_backward",
    f"(Tensor? dout, Tensor? dlse, Tensor? dmaps, Tensor out, Tensor lse, {_CALL}) -> (Tensor, Tensor, Tensor, Tensor)",
    _attention_backward_operator,
    _attention_backward_fake,
)
_operator(
    "split_widened",
    f"(Tensor wide, SymInt v_columns, SymInt num_words, {_SPLIT}) -> (Tensor out, Tensor maps)",
    _split,
    _split_fake,
).register_autograd(_split_backward, setup_context=_save_split)
_operator(
    "split_widened_backward",
    f"(Tensor? dout, Tensor? dmaps, Tensor wide, SymInt v_columns, {_SPLIT}) -> Tensor",
    _split_backward_operator,
    _split_backward_fake,
)
_operator("stepwise_map", f"({_MAP_CALL}) -> Tensor", _map_operator, _map_fake).register_autograd(
    _map_backward, setup_context=_save_map
)
_operator(
    "stepwise_map_backward",
    f"(Tensor dmaps, {_MAP_CALL}) -> (Tensor, Tensor, Tensor)",
    _map_backward_operator,
    _map_backward_fake,
)
_operator("pool_values", f"({_POOLING}) -> Tensor", _pool_operator, _pool_fake).register_autograd(
    _pool_backward, setup_context=_save_pool
)
_operator(
    "pool_values_backward", f"(Tensor dpooled, {_POOLING}) -> Tensor", _pool_backward_operator, _pool_backward_fake
)
