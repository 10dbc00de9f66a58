"""The custom operators: schemas, fakes and autograd of attention with its map, and of the map alone.

``attention.py`` checks everything before it calls one. An operator is told by name which engine or backend to run, so
that its backward runs the same one. Every output is a fresh tensor.

``run_attention`` and ``run_map`` call an operator or, where nothing watches operators, the functions it is made of
(``plain.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from molsaki_kernels.attention import eager, flash_attn, flex, native, sdpa, triton
from molsaki_kernels.attention_map import native as native_stepmap
from molsaki_kernels.attention_map import torch as stepmap
from molsaki_kernels.direct_call import function, is_plain, is_plain_backward, without_autocast
from molsaki_kernels.spec import AttentionOptions, PlanTensors
from molsaki_kernels.strides import contiguous_rows

ENGINES = {engine.NAME: engine for engine in (triton, native, flash_attn, flex, sdpa, eager)}
_FUSED = {triton.NAME: triton, native.NAME: native}  # engines that make the map in the same pass


def run_attention(*inputs) -> tuple[Tensor, Tensor, Tensor]:
    """out, the map and lse; the arguments are those of the operator ``molsaki::stepwise_attention``."""
    return (_plain_attention if is_plain(*inputs[:3]) else torch.ops.molsaki.stepwise_attention)(*inputs)


def run_map(*inputs) -> Tensor:
    """The map; the arguments are those of the operator ``molsaki::stepwise_map``."""
    return (_plain_map if is_plain(*inputs[:3]) else torch.ops.molsaki.stepwise_map)(*inputs)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    steps: Tensor,
    tokens: Tensor,
    word_of_token: Tensor,
    num_words: int,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    per_head: bool,
    engine: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """out ``(B, Hq, M, D)``, the map ``(N, [Hq,] S, W)`` and lse ``(B, Hq, M)``."""
    options = AttentionOptions(causal, scale, window, softcap)
    plan = PlanTensors(steps, tokens, word_of_token, num_words)
    with without_autocast(q):
        if engine in _FUSED:
            out, lse, maps = _FUSED[engine].forward(q, k, v, plan, sinks, cu_seqlens, options, per_head)
        else:
            out, lse = ENGINES[engine].forward(q, k, v, sinks, cu_seqlens, options)
            lse = lse.contiguous()
            maps = _map_forward(q, k, lse, plan, options, cu_seqlens, per_head, backend)
        return _laid_out(out, _strides(q)), maps, lse


attention = torch.library.custom_op("molsaki::stepwise_attention", mutates_args=())(_attention)


@attention.register_fake
def _(q, k, v, steps, tokens, word_of_token, num_words, sinks, cu_seqlens, causal, scale, window, softcap, per_head,
      engine, backend):  # fmt: skip
    maps = _fake_map(q, steps, num_words, per_head)
    return torch.empty_like(q), maps, q.new_empty(q.shape[:3], dtype=maps.dtype)


def _attention_gradients(
    dout: Tensor | None,
    dmaps: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    steps: Tensor,
    tokens: Tensor,
    word_of_token: Tensor,
    num_words: int,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    engine: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and dsinks (empty without sinks)."""
    with without_autocast(q):
        options = AttentionOptions(causal, scale, window, softcap)
        plan = PlanTensors(steps, tokens, word_of_token, num_words)
        if engine in _FUSED:
            grads = _FUSED[engine].backward(dout, dmaps, dlse, q, k, v, out, lse, plan, sinks, cu_seqlens, options)
            dq, dk, dv, dsinks = grads
            dsinks = q.new_empty(0) if dsinks is None else dsinks
            return *_promised((dq, dk, dv), (q, k, v), engine), dsinks
        gradient = None
        if dmaps is not None:
            gradient = _GRADIENTS[backend](dmaps, q, k, lse, plan, options, cu_seqlens)
            dlse = gradient.dlse if dlse is None else gradient.dlse + dlse
        no_dout = dout is None
        if no_dout:
            dout = torch.zeros_like(out)
        dq, dk, dv = ENGINES[engine].backward(dout, dlse, q, k, v, out, lse, sinks, cu_seqlens, options)
        if no_dout:
            dv = torch.zeros_like(v)  # the fold may have left a trace of its tiny dO
        if gradient is not None:
            gradient.add_to(dq, dk)
        dsinks = q.new_empty(0)
        if sinks is not None:
            # dS of the sink's column: p_sink * (0 - (D - dlse)), a sum over the rows of terms of both signs. For
            # float32 inputs it is made in float64, or it would be further off than what it is made of.
            wide = torch.float64 if q.dtype == torch.float32 else lse.dtype
            delta = (dout.to(wide) * out).sum(-1)
            delta = -delta if dlse is None else dlse - delta
            dsinks = ((sinks.to(wide)[:, None] - lse).exp_() * delta).sum((0, 2), dtype=torch.float64)
            dsinks = dsinks.to(sinks.dtype)
        return *_promised((dq, dk, dv), (q, k, v), engine), dsinks


attention_backward = torch.library.custom_op("molsaki::stepwise_attention_backward", mutates_args=())(
    _attention_gradients
)


@attention_backward.register_fake
def _(dout, dmaps, dlse, q, k, v, out, lse, steps, tokens, word_of_token, num_words, sinks, *rest):
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return *(x.new_empty_strided(x.shape, _gradient_strides(x, rest[-2])) for x in (q, k, v)), dsinks


def _attention_setup(ctx, inputs, output):
    q, k, v, steps, tokens, word_of_token, num_words, sinks, cu_seqlens, *options, _, engine, backend = inputs
    out, _, lse = output
    ctx.save_for_backward(q, k, v, out, lse, steps, tokens, word_of_token, sinks, cu_seqlens)
    ctx.num_words, ctx.options, ctx.engine, ctx.backend = num_words, options, engine, backend
    ctx.set_materialize_grads(False)


def _attention_backward(ctx, dout, dmaps, dlse, run=attention_backward):
    nothing = (None,) * 13
    if dout is None and dmaps is None and dlse is None:
        return None, None, None, *nothing
    q, k, v, out, lse, steps, tokens, word_of_token, sinks, cu_seqlens = ctx.saved_tensors
    dq, dk, dv, dsinks = run(
        dout, dmaps, dlse, q, k, v, out, lse, steps, tokens, word_of_token, ctx.num_words, sinks, cu_seqlens,
        *ctx.options, ctx.engine, ctx.backend,
    )  # fmt: skip
    return dq, dk, dv, None, None, None, None, dsinks if sinks is not None else None, *nothing[5:]


def _plain_attention_backward(ctx, dout, dmaps, dlse):
    run = _attention_gradients if is_plain_backward(dout, dmaps, dlse) else attention_backward
    return _attention_backward(ctx, dout, dmaps, dlse, run)


attention.register_autograd(_attention_backward, setup_context=_attention_setup)
_plain_attention = function("molsaki_attention", _attention, _attention_setup, _plain_attention_backward)


def _map(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    steps: Tensor,
    tokens: Tensor,
    word_of_token: Tensor,
    num_words: int,
    cu_seqlens: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    per_head: bool,
    backend: str,
) -> Tensor:
    """The map ``(N, [Hq,] S, W)``."""
    options = AttentionOptions(causal, scale, window, softcap)
    plan = PlanTensors(steps, tokens, word_of_token, num_words)
    with without_autocast(q):
        return _map_forward(q, k, lse, plan, options, cu_seqlens, per_head, backend)


stepwise_map = torch.library.custom_op("molsaki::stepwise_map", mutates_args=())(_map)


@stepwise_map.register_fake
def _(
    q, k, lse, steps, tokens, word_of_token, num_words, cu_seqlens, causal, scale, window, softcap, per_head, backend
):
    return _fake_map(q, steps, num_words, per_head)


def _map_gradients(
    dmaps: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    steps: Tensor,
    tokens: Tensor,
    word_of_token: Tensor,
    num_words: int,
    cu_seqlens: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dlse."""
    options = AttentionOptions(causal, scale, window, softcap)
    plan = PlanTensors(steps, tokens, word_of_token, num_words)
    if backend == "triton":
        from molsaki_kernels._triton.map_backward import map_backward

        dq, dk, dlse = map_backward(contiguous_rows(q), contiguous_rows(k), lse, dmaps, plan, options, cu_seqlens)
        return _laid_out(dq, _strides(q)), _laid_out(dk, _strides(k)), dlse
    with without_autocast(q):
        gradient = _GRADIENTS[backend](dmaps, q, k, lse, plan, options, cu_seqlens)
        dq, dk = torch.zeros_like(q), torch.zeros_like(k)
        gradient.add_to(dq, dk)
        return dq, dk, gradient.dlse.to(lse.dtype)


stepwise_map_backward = torch.library.custom_op("molsaki::stepwise_map_backward", mutates_args=())(_map_gradients)


@stepwise_map_backward.register_fake
def _(dmaps, q, k, lse, *rest):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(lse)


def _map_setup(ctx, inputs, output):
    q, k, lse, steps, tokens, word_of_token, num_words, cu_seqlens, *options, _, backend = inputs
    ctx.save_for_backward(q, k, lse, steps, tokens, word_of_token, cu_seqlens)
    ctx.num_words, ctx.options, ctx.backend = num_words, options, backend


def _map_backward(ctx, dmaps, run=stepwise_map_backward):
    *tensors, cu_seqlens = ctx.saved_tensors
    grads = run(dmaps, *tensors, ctx.num_words, cu_seqlens, *ctx.options, ctx.backend)
    return *grads, *(None,) * 11


def _plain_map_backward(ctx, dmaps):
    return _map_backward(ctx, dmaps, _map_gradients if is_plain_backward(dmaps) else stepwise_map_backward)


stepwise_map.register_autograd(_map_backward, setup_context=_map_setup)
_plain_map = function("molsaki_map", _map, _map_setup, _plain_map_backward)


def _map_forward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    plan: PlanTensors,
    options: AttentionOptions,
    cu_seqlens: Tensor | None,
    per_head: bool,
    backend: str,
) -> Tensor:
    if backend == "triton":
        from molsaki_kernels._triton.map_forward import map_forward

        return map_forward(contiguous_rows(q), contiguous_rows(k), lse, plan, options, cu_seqlens, per_head)
    on_cpu = native_stepmap if backend == "native" else stepmap
    return on_cpu.forward(q, k, lse, plan, options, cu_seqlens, per_head)


class _TritonGradient:
    """As :class:`stepmap.Gradient`. The second half makes the weights again, which costs less than to keep them."""

    def __init__(self, dmaps: Tensor, q: Tensor, k: Tensor, lse: Tensor, plan, options, cu_seqlens):
        from molsaki_kernels._triton.map_backward import map_dlse

        self._arguments = (contiguous_rows(q), contiguous_rows(k), lse, dmaps, plan, options, cu_seqlens)
        self.dlse = map_dlse(*self._arguments)

    def add_to(self, dq: Tensor, dk: Tensor) -> None:
        from molsaki_kernels._triton.map_backward import map_backward

        map_backward(*self._arguments, dq=dq, dk=dk)


_GRADIENTS = {"torch": stepmap.Gradient, "native": native_stepmap.Gradient, "triton": _TritonGradient}


def _strides(x: Tensor) -> tuple[int, ...]:
    """The layout that an output of x's shape is promised in: x's own, without its gaps if it has any."""
    dense = x.is_contiguous() or x.transpose(1, 2).is_contiguous()
    return (x if dense else torch.empty_like(x, device="meta")).stride()


def _gradient_strides(x: Tensor, engine: str) -> tuple[int, ...]:
    """As x's, but for the CPU flash operator, which makes ``(B, M, H, D)``."""
    if engine == sdpa.NAME and x.device.type == "cpu":
        B, H, M, D = x.shape
        return M * H * D, D, H * D, 1
    return _strides(x)


def _promised(gradients: tuple[Tensor, ...], inputs: tuple[Tensor, ...], engine: str) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the layouts that the fake promised."""
    dq, dk, dv = (_laid_out(g, _gradient_strides(x, engine)) for g, x in zip(gradients, inputs, strict=True))
    return dq, dk, dv


def _laid_out(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """x in the strides that the fake promised."""
    if x.stride() == strides:
        return x
    if all(n == 1 or given == wanted for n, given, wanted in zip(x.shape, x.stride(), strides, strict=True)):
        return x.as_strided(x.shape, strides)  # of a dimension of one entry any stride is right: the packed batch
    return x.new_empty_strided(x.shape, strides).copy_(x)


def _fake_map(q: Tensor, steps: Tensor, num_words: int, per_head: bool) -> Tensor:
    heads = (q.shape[1],) if per_head else ()
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((steps.shape[0], *heads, steps.shape[1], num_words), dtype=dtype)
