"""The door: one attention layer with its stepwise map, and the map alone. Checks, choice of engine, nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from molsaki_kernels import engine_selection as auto
from molsaki_kernels import ops
from molsaki_kernels import validation as checks
from molsaki_kernels._native.build import has_amx
from molsaki_kernels.attention import flex
from molsaki_kernels.plan import StepPlan
from molsaki_kernels.spec import AttentionOptions, AttentionRequest

# Which engine "auto" tries first. CPU: measured (docs/notes.md). CUDA: a guess until measured rows replace it, so
# flash_attn and flex, which can do nothing that triton and eager cannot, wait outside for theirs.
AUTO = {"cpu": ("native", "sdpa", "eager"), "cuda": ("sdpa", "triton", "eager")}


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
    heads: str = "mean",
    engine: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One attention layer and its stepwise map (MoLSAKI, arXiv 2604.15701, Eq. 2 and 3).

    ``map[n, s, w]`` is the attention mass that the rows of step s put on the tokens of word w: a sum over both, the
    mean over heads. It costs no ``M x M`` weights and is differentiable in everything the output is.

    Args:
        q: ``(B, Hq, M, D)`` queries; bfloat16, float16, float32 or float64; any strides.
        k, v: ``(B, Hkv, M, D)`` keys and values, ``Hq % Hkv == 0``.
        plan: steps and key words of the N sequences (N = B, or as ``cu_seqlens`` says), on q's device.
        causal: a query sees no key after itself.
        scale: of the scores; ``D ** -0.5`` if None.
        window: a query sees no key further back than ``window - 1`` tokens.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before the mask (Gemma 2).
        sinks: ``(Hq,)`` logits that take part in the softmax's denominator only (gpt-oss).
        cu_seqlens: ``(N + 1,)`` int32 boundaries of packed sequences; q, k, v are ``(1, H, total, D)`` and the plan's
            indices count within each sequence.
        heads: "mean", or "none" for a map of every head.
        engine: "auto" takes the fastest that can do the call; a name from :func:`engines` takes that one.

    Returns:
        out ``(B, Hq, M, D)`` in q's dtype, and the map ``(N, S, W)`` (``heads="none"``: ``(N, Hq, S, W)``) in float32
        (float64 for float64). Padding steps and words are 0.

    Raises:
        TypeError, ValueError: the message names the argument, its shape and what was expected; also where ``engine``
            cannot do the call, with the reason.
    """
    q, k, v = _autocast(q, k, v)
    checks.check_attention(q, k, v)
    checks.check_options(q, scale, window, softcap, sinks, heads)
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, q, "q")
    checks.check_plan(plan, q, cu_seqlens)
    options = _options(q, causal, scale, window, softcap)
    name = _choose(engine, q, k, v, sinks, cu_seqlens, options)
    if name == flex.NAME:  # differentiable as it is, lse too
        out, lse = flex.forward(q, k, v, sinks, cu_seqlens, options)
        return out, _map(q, k, lse, plan, cu_seqlens, options, heads, "auto")
    backend = checks.choose_map_backend("auto", q, options.softcap)
    out, maps, _ = ops.run_attention(
        q, k, v, plan.steps, plan.tokens, plan.word_of_token, plan.num_words, sinks, cu_seqlens, options.causal,
        options.scale, options.window, options.softcap, heads == "none", name, backend,
    )  # fmt: skip
    return out, maps


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
    heads: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """The stepwise map alone, for whoever has the log-sum-exp of the attention already (Eq. 2 and 3).

    Args:
        lse: ``(B, Hq, M)`` float32 (float64 for float64 inputs), natural logarithm of the softmax's denominator,
            counting the sinks if there are any.
        sinks: accepted so that one set of options serves both functions; the map needs lse only.
        backend: "auto", "triton", "native" (C, for CPU tensors) or "torch".
        The rest as in :func:`stepwise_attention`.

    Returns:
        ``(N, S, W)`` (``heads="none"``: ``(N, Hq, S, W)``) float32 (float64 for float64). Differentiable in q, k and
        lse: whoever computed lse differentiably gets the whole gradient.

    Raises:
        TypeError, ValueError: the message names the argument, its shape and what was expected.
    """
    q, k = _autocast(q, k)
    checks.check_attention(q, k, None)
    checks.check_options(q, scale, window, softcap, sinks, heads)
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, q, "q")
    checks.check_plan(plan, q, cu_seqlens)
    checks.check_tensor(lse, "lse", "(B, Hq, M)", 3)
    expected = torch.promote_types(q.dtype, torch.float32)
    if lse.shape != q.shape[:3] or lse.dtype != expected or lse.device != q.device:
        raise ValueError(
            f"lse: expected {expected} {tuple(q.shape[:3])} on {q.device}, "
            f"got {lse.dtype} {tuple(lse.shape)} on {lse.device}"
        )
    return _map(q, k, lse, plan, cu_seqlens, _options(q, causal, scale, window, softcap), heads, backend)


def engines() -> dict[str, str]:
    """Every engine's name, with "ready" or the reason why it is not on this machine."""
    return {name: engine.available() or "ready" for name, engine in ops.ENGINES.items()}


def _map(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    plan: StepPlan,
    cu_seqlens: Tensor | None,
    options: AttentionOptions,
    heads: str,
    backend: str,
) -> Tensor:
    backend = checks.choose_map_backend(backend, q, options.softcap)
    return ops.run_map(
        q, k, lse, plan.steps, plan.tokens, plan.word_of_token, plan.num_words, cu_seqlens, options.causal,
        options.scale, options.window, options.softcap, heads == "none", backend,
    )  # fmt: skip


def _options(
    q: Tensor, causal: bool, scale: float | None, window: int | None, softcap: float | None
) -> AttentionOptions:
    if window is not None and window >= q.shape[2]:
        window = None  # every key is near enough
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return AttentionOptions(bool(causal), scale, window, None if softcap is None else float(softcap))


def _choose(
    engine: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    options: AttentionOptions,
) -> str:
    """The first engine in order of speed that can do the call, or the one asked for, or an error that says why not."""
    if engine != "auto" and engine not in ops.ENGINES:
        raise ValueError(f'engine: expected "auto" or one of {sorted(ops.ENGINES)}, got {engine!r}')
    gradients = (t for t in (q, k, v, sinks) if t is not None)
    call = AttentionRequest(
        device=q.device,
        dtype=q.dtype,
        batch=q.shape[0],
        q_heads=q.shape[1],
        kv_heads=k.shape[1],
        length=q.shape[2],
        head_dim=q.shape[3],
        options=options,
        sinks=sinks is not None,
        packed=cu_seqlens is not None,
        backward=torch.is_grad_enabled() and any(t.requires_grad for t in gradients),
    )
    names = auto.order(call, _default_order(call)) if engine == "auto" else (engine,)
    reasons = {}
    for name in names:
        reasons[name] = ops.ENGINES[name].available() or ops.ENGINES[name].why_not(call)
        if reasons[name] is None:
            return name
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ValueError(f"engine: {engine!r} cannot serve this call ({listed})")


def _default_order(call: AttentionRequest) -> tuple[str, ...]:
    names = AUTO.get(call.device.type, ("eager",))
    if call.device.type == "cpu" and call.dtype == torch.bfloat16 and not call.backward and has_amx():
        return ("sdpa", *(name for name in names if name != "sdpa"))  # twice as fast there (docs/notes.md)
    return names


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, what PyTorch's own attention does: everything but float64 goes to the autocast dtype."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)
