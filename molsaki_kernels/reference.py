"""The reference implementation (oracle): eager attention that materialises every weight, in the dtype of its inputs.

It defines the correct result. The kernels are compared with it in float64, and every error budget is computed from its
results in float64 and in the working dtype. Only tests and benchmarks import it, and it imports only the plan.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molsaki_kernels.plan import StepPlan


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention weights ``(B, Hq, M, M)`` and the log-sum-exp ``(B, Hq, M)`` (natural, sinks counted).

    Args:
        q: ``(B, Hq, M, D)``.
        k: ``(B, Hkv, M, D)``, ``Hq % Hkv == 0``.
        sinks: ``(Hq,)`` logits that take part in the denominator only.

    As in the models' eager attention, scores are computed in the inputs' dtype and the softmax in at least float32.
    """
    M, D = q.shape[-2:]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.transpose(-1, -2) * (D**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.masked_fill(~_visible(M, causal, window, q.device), float("-inf"))
    if sinks is None:
        lse = scores.logsumexp(-1)
    else:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        lse = torch.cat([scores, column], -1).logsumexp(-1)
    return (scores - lse[..., None]).exp(), lse


def reduce_weights(weights: Tensor, plan: StepPlan, head_reduction: str = "mean") -> Tensor:
    """Reduce weights ``(N, H, M, M)`` to the map ``(N, S, W)``, or ``(N, H, S, W)`` without reduction (Eq. 2 and 3)."""
    M = weights.shape[-1]
    position = torch.arange(M, device=weights.device)
    in_step = (position >= plan.steps[..., :1]) & (position < plan.steps[..., 1:])  # (N, S, M)
    in_word = torch.zeros(len(plan), plan.num_words, M, dtype=torch.bool, device=weights.device)
    sequence, token = (plan.word_of_token >= 0).nonzero(as_tuple=True)
    in_word[sequence, plan.word_of_token[sequence, token], plan.tokens[sequence, token]] = True
    maps = torch.einsum("nsi,nhij,nwj->nhsw", in_step.to(weights.dtype), weights, in_word.to(weights.dtype))
    return maps.mean(1) if head_reduction == "mean" else maps


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
    engine: str = "reference",
) -> tuple[Tensor, ...]:
    """Compute one attention layer and its map, as :func:`molsaki_kernels.stepwise_attention`; ``engine`` is ignored.

    The width of v may differ from that of q and k: out is as wide as v.
    """
    del engine
    if q.dim() == 3:  # packed (total, H, D)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out, maps, lse = stepwise_attention(
            q, k, v, plan, causal=causal, scale=scale, window=window, softcap=softcap, sinks=sinks,
            cu_seqlens=cu_seqlens, head_reduction=head_reduction, return_lse=True,
        )  # fmt: skip
        out, lse = out[0].transpose(0, 1), lse[0]
        return (out, maps, lse) if return_lse else (out, maps)
    outs, all_maps, all_lse = [], [], []
    for n, (q_n, k_n, v_n) in enumerate(_sequences(cu_seqlens, q, k, v)):
        weights, lse = attention_weights(
            q_n, k_n, causal=causal, scale=scale, window=window, softcap=softcap, sinks=sinks
        )
        outs.append(weights.to(v.dtype) @ v_n.repeat_interleave(q.shape[1] // v.shape[1], dim=1))
        all_maps.append(reduce_weights(weights, plan if cu_seqlens is None else plan[n], head_reduction))
        all_lse.append(lse)
    out, maps, lse = torch.cat(outs, dim=2), torch.cat(all_maps), torch.cat(all_lse, dim=2)
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
    engine: str = "reference",
) -> Tensor:
    """Compute the map from q, k and a given lse, as :func:`molsaki_kernels.stepwise_map`.

    ``sinks`` and ``engine`` are ignored: lse counts the sinks already.
    """
    del sinks, engine
    if q.dim() == 3:  # packed (total, H, D)
        q, k, lse = q.transpose(0, 1)[None], k.transpose(0, 1)[None], lse[None]
    maps = []
    for n, (q_n, k_n, lse_n) in enumerate(_sequences(cu_seqlens, q, k, lse)):
        M, D = q_n.shape[-2:]
        k_n = k_n.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = q_n @ k_n.transpose(-1, -2) * (D**-0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.to(lse.dtype).masked_fill(~_visible(M, causal, window, q.device), float("-inf"))
        weights = (scores - lse_n[..., None]).exp()
        maps.append(reduce_weights(weights, plan if cu_seqlens is None else plan[n], head_reduction))
    return maps[0] if cu_seqlens is None else torch.cat(maps)


def pool_values(
    v: Tensor,
    lengths: Tensor | None = None,
    *,
    eps: float = 1e-6,
    pooling: str = "sum",
    heads: str = "concat",
    cu_seqlens: Tensor | None = None,
    engine: str = "reference",
) -> Tensor:
    """Compute Eq. 5's h, as :func:`molsaki_kernels.pool_values`; ``engine`` is ignored."""
    del engine
    if v.dim() == 3:  # packed (total, H, D)
        v = v.transpose(0, 1)[None]
    pooled = []
    for n, (v_n,) in enumerate(_sequences(cu_seqlens, v)):
        x = v_n.mean(1) if heads == "mean" else v_n.transpose(1, 2).flatten(2)  # (B, M, width)
        count = torch.full((x.shape[0],), x.shape[1], device=v.device) if lengths is None else lengths
        if cu_seqlens is not None and lengths is not None:
            count = lengths[n : n + 1]
        padding = torch.arange(x.shape[1], device=v.device) >= count[:, None]
        x = x.masked_fill(padding[..., None], 0).to(torch.promote_types(x.dtype, torch.float32))
        h = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).sum(1)
        pooled.append(h / count.clamp(min=1)[:, None] if pooling == "mean" else h)
    return pooled[0] if cu_seqlens is None else torch.cat(pooled)


def _visible(length: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Return a bool ``(M, M)`` tensor: whether query i sees key j.

    A window lets a query see keys from ``window - 1`` before itself on; causality lets it see no key after itself.
    """
    query, key = torch.arange(length, device=device)[:, None], torch.arange(length, device=device)[None, :]
    mask = torch.ones(length, length, dtype=torch.bool, device=device)
    if causal:
        mask &= key <= query
    if window is not None:
        mask &= key > query - window
    return mask


def _sequences(cu_seqlens: Tensor | None, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Return the batch as it is, or one ``(1, H, length, ...)`` slice per packed sequence."""
    if cu_seqlens is None:
        return [tensors]
    bounds = cu_seqlens.tolist()
    return [tuple(t[:, :, a:b] for t in tensors) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
