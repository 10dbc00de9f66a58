"""The public functions: attention with its stepwise map, the map alone, value pooling, and the list of engines.

Each validates its arguments, chooses an engine and runs it (``ops/``).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, overload

import torch
from torch import Tensor

from molsaki_kernels import engine_selection, ops
from molsaki_kernels.attention import ENGINES
from molsaki_kernels.direct_call import autocast_is_on
from molsaki_kernels.plan import StepPlan
from molsaki_kernels.spec import AttentionInputs, MapInputs, PlanTensors, PoolingOptions
from molsaki_kernels.validation import (
    assert_bounds,
    check_bounds,
    check_cu_seqlens,
    check_inputs,
    check_sinks,
    make_options,
    on_host,
    renamed,
)


@dataclasses.dataclass(frozen=True)
class EngineStatus:
    """Whether an engine can run on this machine, and the reason if it cannot."""

    ready: bool
    reason: str | None = None

    def __str__(self) -> str:
        return "ready" if self.ready else str(self.reason)


class EngineList(dict[str, EngineStatus]):
    """Name -> status; printed with one line per engine."""

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{name:{width}}  {status}" for name, status in self.items())


@overload
def stepwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: StepPlan,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    head_reduction: str = "mean",
    return_lse: Literal[False] = False,
    engine: str = "auto",
    map_engine: str = "auto",
    heads: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def stepwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: StepPlan,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    head_reduction: str = "mean",
    return_lse: Literal[True],
    engine: str = "auto",
    map_engine: str = "auto",
    heads: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...


def stepwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: StepPlan,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    head_reduction: str = "mean",
    return_lse: bool = False,
    engine: str = "auto",
    map_engine: str = "auto",
    heads: str | None = None,
) -> tuple[Tensor, ...]:
    """Compute one attention layer, causal by default, and its stepwise map (MoLSAKI, arXiv 2604.15701, Eq. 2 and 3).

    ``map[n, s, w]`` is the attention mass that the queries of step s put on the tokens of key word w: a sum over both,
    and the mean over heads. No ``M x M`` weights are stored. The map is differentiable with respect to the same inputs
    as the output.

    Args:
        q: ``(B, Hq, M, D)`` queries; bfloat16, float16, float32 or float64; any strides.
        k: ``(B, Hkv, M, D)`` keys, ``Hq % Hkv == 0``.
        v: ``(B, Hkv, M, Dv)`` values. Dv may differ from D (DeepSeek's MLA): an engine that takes only one width gets
            the narrower of them padded with zeros, which is exact.
        plan: steps and key words of the N sequences (N = B, or given by ``cu_seqlens``), on q's device.
        causal: a query sees no key after itself.
        scale: of the scores; ``D ** -0.5`` if None.
        window: a query sees its last ``window`` keys, itself included; flash-attention's ``(window - 1, 0)``.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before the mask (Gemma 2).
        sinks: ``(Hq,)`` logits in the softmax's denominator only (gpt-oss).
        cu_seqlens: ``(N + 1,)`` int32 boundaries of packed sequences. q, k and v are ``(1, H, total, D)`` or, as in
            flash-attention, ``(total, H, D)`` (v with Dv); the plan's indices count within each sequence.
        head_reduction: "mean", or "none" for one map per query head.
        return_lse: also return the log-sum-exp, differentiable like the output.
        engine: "auto" for the fastest engine that supports the call, or a name from :func:`engines`.
        map_engine: how the map is computed. "widened": v gets one column per key word, so that the engine's own
            attention computes masses and gradients (``widened_values.py``), with every engine. "triton", "native" or
            "torch": from the engine's log-sum-exp, with an engine that does not compute the map itself. "auto": by the
            engine itself, or by the fastest of these.
        heads: the old name of ``head_reduction``.

    Returns:
        out ``(B, Hq, M, Dv)``, or ``(total, Hq, Dv)`` where q is ``(total, Hq, D)``, in the dtype and layout of q; the
        map ``(N, S, W)`` (``head_reduction="none"``: ``(N, Hq, S, W)``) in float32 (float64 for float64), 0 for padding
        steps and words; and with ``return_lse`` the natural logarithm of the softmax's denominator, sinks counted,
        ``(B, Hq, M)`` (``(Hq, total)`` for ``(total, H, D)`` inputs) in the map's dtype.

    Raises:
        TypeError, ValueError: the message names the argument, its shape and what was expected; also if ``engine`` or
            ``map_engine`` does not support the call, with the reason.
    """
    if heads is not None:
        head_reduction = renamed("heads", heads, "head_reduction", head_reduction, "mean")
    flat = cu_seqlens is not None and isinstance(q, Tensor) and q.dim() == 3
    if flat:
        q, k, v = _heads_first(q, "q"), _heads_first(k, "k"), _heads_first(v, "v")
    if isinstance(q, Tensor) and autocast_is_on(q):
        q, k, v = _autocast(q), _autocast(k), _autocast(v)
    inputs = AttentionInputs(q, k, v, sinks, cu_seqlens)
    check_inputs(inputs, plan)
    if sinks is not None:
        check_sinks(sinks, q)
    options = make_options(q, causal=causal, scale=scale, window=window, softcap=softcap, head_reduction=head_reduction)
    request = inputs.request(options)
    name = engine_selection.choose_engine(engine, request, map_engine)
    tensors = PlanTensors(plan.steps, plan.tokens, plan.word_of_token, plan.num_words)
    own = map_engine == "auto" and ENGINES[name].COMPUTES_MAP
    map_name = "" if own else engine_selection.choose_map(map_engine, q, request)
    outputs = ops.run_attention(inputs, options, tensors, name, map_name)
    out, maps, lse = outputs.out, outputs.maps, outputs.lse
    assert maps is not None
    if flat:
        out, lse = out[0].transpose(0, 1), lse[0]
    return (out, maps, lse) if return_lse else (out, maps)


def stepwise_map(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    plan: StepPlan,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    head_reduction: str = "mean",
    engine: str = "auto",
    heads: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute the stepwise map alone, from an attention's log-sum-exp (Eq. 2 and 3).

    Arguments that are not listed are those of :func:`stepwise_attention`.

    Args:
        lse: ``(B, Hq, M)`` (``(Hq, total)`` if q is ``(total, Hq, D)``) float32 (float64 for float64 inputs), the
            natural logarithm of the softmax's denominator, sinks counted.
        sinks: accepted so that one set of options serves both functions; the map depends on them through lse only.
        engine: "auto", "triton", "native" (C, for CPU tensors) or "torch".
        heads, backend: the old names of ``head_reduction`` and ``engine``.

    Returns:
        ``(N, S, W)`` (``head_reduction="none"``: ``(N, Hq, S, W)``) float32 (float64 for float64). Differentiable in q,
        k and lse: if lse was computed differentiably, the gradient is complete.

    Raises:
        TypeError, ValueError: the message names the argument, its shape and what was expected.
    """
    if heads is not None:
        head_reduction = renamed("heads", heads, "head_reduction", head_reduction, "mean")
    if backend is not None:
        engine = renamed("backend", backend, "engine", engine, "auto")
    if cu_seqlens is not None and isinstance(q, Tensor) and q.dim() == 3:
        q, k = _heads_first(q, "q"), _heads_first(k, "k")
        if isinstance(lse, Tensor):
            if lse.dim() != 2:
                raise ValueError(f"lse: expected (Hq, total) with packed (total, Hq, D), got shape {tuple(lse.shape)}")
            lse = lse[None]
    if isinstance(q, Tensor) and autocast_is_on(q):
        q, k = _autocast(q), _autocast(k)
    inputs = MapInputs(q, k, lse, cu_seqlens)
    check_inputs(inputs, plan)
    if sinks is not None:
        check_sinks(sinks, q)
    options = make_options(q, causal=causal, scale=scale, window=window, softcap=softcap, head_reduction=head_reduction)
    name = engine_selection.choose_map_engine(engine, q, options)
    tensors = PlanTensors(plan.steps, plan.tokens, plan.word_of_token, plan.num_words)
    return ops.run_map(inputs, options, tensors, name)


def pool_values(
    v: Tensor,
    lengths: Tensor | None = None,
    *,
    eps: float = 1e-6,
    pooling: str = "sum",
    heads: str = "concat",
    cu_seqlens: Tensor | None = None,
    engine: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """Pool the value vectors of each sequence, the router's input (MoLSAKI, arXiv 2604.15701, Eq. 5).

    Args:
        v: ``(B, Hkv, M, D)`` values, any floating dtype; packed also ``(total, Hkv, D)``.
        lengths: ``(N,)`` integers; tokens from this one on are padding and are left out. None: there is no padding.
        eps: of the RMS norm.
        pooling: "sum" (the paper's) or "mean" over a sequence's tokens.
        heads: "concat" normalises over the width Hkv * D; "mean" averages the heads first and normalises over D.
        cu_seqlens: ``(N + 1,)`` int32 boundaries of packed sequences, ``v`` being ``(1, Hkv, total, D)``.
        engine: "auto", "triton" or "torch".
        backend: the old name of ``engine``.

    Returns:
        ``(N, Hkv * D)``, or ``(N, D)`` with ``heads="mean"``; float32 (float64 for float64). A sequence without tokens
        gives zeros. Differentiable in ``v``.

    Raises:
        TypeError, ValueError: the message names the argument and what was expected.
    """
    if backend is not None:
        engine = renamed("backend", backend, "engine", engine, "auto")
    if not isinstance(v, Tensor):
        raise TypeError(f"v: expected a floating (B, Hkv, M, D) tensor, got {type(v).__name__}")
    if cu_seqlens is not None and v.dim() == 3:
        v = _heads_first(v, "v")
    if v.dim() != 4 or not v.is_floating_point():
        raise ValueError(f"v: expected a floating (B, Hkv, M, D) tensor, got {v.dtype} {tuple(v.shape)}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: expected a finite number of at least 0, got {eps}")
    if pooling not in ("sum", "mean"):
        raise ValueError(f'pooling: expected "sum" or "mean", got {pooling!r}')
    if heads not in ("concat", "mean"):
        raise ValueError(f'heads: expected "concat" or "mean", got {heads!r}')
    sequences = v.shape[0]
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, v, "v")
        if on_host(cu_seqlens):
            check_bounds(tuple(cu_seqlens.tolist()), v.shape[2], "v")
        elif torch.compiler.is_compiling():
            assert_bounds(cu_seqlens, v.shape[2], "v")
        sequences = cu_seqlens.shape[0] - 1
    if lengths is not None:
        if not isinstance(lengths, Tensor):
            raise TypeError(f"lengths: expected a tensor ({sequences},) of integers, got {type(lengths).__name__}")
        if lengths.is_floating_point() or lengths.dtype == torch.bool or lengths.shape != (sequences,):
            raise ValueError(f"lengths: expected ({sequences},) integers, got {lengths.dtype} {tuple(lengths.shape)}")
        if lengths.device != v.device:
            raise ValueError(f"lengths: expected on v's device {v.device}, got {lengths.device}")
    name = engine_selection.choose_pooling_engine(engine, v)
    options = PoolingOptions(eps, pooling == "mean", heads == "mean")
    return ops.run_pooling(v, lengths, cu_seqlens, options, name)


def engines() -> EngineList:
    """Return the status of every attention engine on this machine, by name; printing it gives one line per engine."""
    reasons = {name: engine.available() for name, engine in ENGINES.items()}
    return EngineList({name: EngineStatus(reason is None, reason) for name, reason in reasons.items()})


def _heads_first(x: Tensor, name: str) -> Tensor:
    """Return a view ``(1, H, total, D)`` of packed ``x (total, H, D)``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor (total, H, D), got {type(x).__name__}")
    if x.dim() != 3:
        raise ValueError(f"{name}: expected (total, H, D) as q has, got shape {tuple(x.shape)}")
    return x.transpose(0, 1)[None]


def _autocast(x: Tensor) -> Tensor:
    """Cast as PyTorch's own attention does under autocast: everything but float64 to the autocast dtype."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
