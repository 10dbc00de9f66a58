"""The definition of correct: eager attention that materialises every weight, in whatever dtype it is given.

Nothing here is fast. The kernels are tested against it in float64, and every error budget is read from its float64
result and its result in the working dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molsaki_kernels.plan import StepPlan


def visible(rows: Tensor, columns: Tensor, causal: bool, window: int | None) -> Tensor:
    """``(M, C)`` bool: may query ``rows[i]`` see key ``columns[j]``? Positions within one sequence.

    A window lets a query see keys from ``window - 1`` before itself on; causality, if on, lets it see none after.
    """
    mask = torch.ones(rows.shape[0], columns.shape[0], dtype=torch.bool, device=rows.device)
    if causal:
        mask &= columns[None, :] <= rows[:, None]
    if window is not None:
        mask &= columns[None, :] > rows[:, None] - window
    return mask


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

    Like the models' eager attention, scores are made in the inputs' dtype and the softmax in at least float32.
    """
    M, D = q.shape[-2:]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.transpose(-1, -2) * (D**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    position = torch.arange(M, device=q.device)
    scores = scores.masked_fill(~visible(position, position, causal, window), float("-inf"))
    if sinks is None:
        lse = scores.logsumexp(-1)
    else:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        lse = torch.cat([scores, column], -1).logsumexp(-1)
    return (scores - lse[..., None]).exp(), lse


def reduce_weights(weights: Tensor, plan: StepPlan, heads: str = "mean") -> Tensor:
    """Eq. 2 and 3: weights ``(N, H, M, M)`` to the map ``(N, S, W)``, or ``(N, H, S, W)`` with ``heads="none"``."""
    M = weights.shape[-1]
    position = torch.arange(M, device=weights.device)
    in_step = (position >= plan.steps[..., :1]) & (position < plan.steps[..., 1:])  # (N, S, M)
    in_word = torch.zeros(len(plan), plan.num_words, M, dtype=torch.bool, device=weights.device)
    sequence, token = (plan.word_of_token >= 0).nonzero(as_tuple=True)
    in_word[sequence, plan.word_of_token[sequence, token], plan.tokens[sequence, token]] = True
    maps = torch.einsum("nsi,nhij,nwj->nhsw", in_step.to(weights.dtype), weights, in_word.to(weights.dtype))
    return maps.mean(1) if heads == "mean" else maps


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
    engine: str = "reference",
) -> tuple[Tensor, Tensor]:
    """One attention layer and its map, as :func:`molsaki_kernels.stepwise_attention`; ``engine`` is ignored."""
    options = dict(causal=causal, scale=scale, window=window, softcap=softcap, sinks=sinks)
    outs, maps = [], []
    for n, (q_n, k_n, v_n) in enumerate(_sequences(cu_seqlens, q, k, v)):
        weights, _ = attention_weights(q_n, k_n, **options)
        outs.append(weights.to(v.dtype) @ v_n.repeat_interleave(q.shape[1] // v.shape[1], dim=1))
        maps.append(reduce_weights(weights, plan if cu_seqlens is None else plan[n], heads))
    return (outs[0], maps[0]) if cu_seqlens is None else (torch.cat(outs, dim=2), torch.cat(maps))


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
    backend: str = "reference",
) -> Tensor:
    """The map from q, k and a given lse, as :func:`molsaki_kernels.stepwise_map`.

    ``sinks`` and ``backend`` change nothing: lse counts the sinks already.
    """
    del sinks, backend
    maps = []
    for n, (q_n, k_n, lse_n) in enumerate(_sequences(cu_seqlens, q, k, lse)):
        M, D = q_n.shape[-2:]
        k_n = k_n.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = q_n @ k_n.transpose(-1, -2) * (D**-0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(M, device=q.device)
        scores = scores.to(lse.dtype).masked_fill(~visible(position, position, causal, window), float("-inf"))
        maps.append(reduce_weights((scores - lse_n[..., None]).exp(), plan if cu_seqlens is None else plan[n], heads))
    return maps[0] if cu_seqlens is None else torch.cat(maps)


def pool_values(
    v: Tensor,
    lengths: Tensor | None = None,
    *,
    eps: float = 1e-6,
    pooling: str = "sum",
    heads: str = "concat",
    cu_seqlens: Tensor | None = None,
    backend: str = "reference",
) -> Tensor:
    """Eq. 5's h, as :func:`molsaki_kernels.pool_values`."""
    del backend
    pooled = []
    for n, (v_n,) in enumerate(_sequences(cu_seqlens, v)):
        x = v_n.mean(1) if heads == "mean" else v_n.transpose(1, 2).flatten(2)  # (B, M, width)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        count = torch.full((x.shape[0],), x.shape[1], device=v.device) if lengths is None else lengths
        if cu_seqlens is not None and lengths is not None:
            count = lengths[n : n + 1]
        keep = torch.arange(x.shape[1], device=v.device) < count[:, None]
        h = (x * keep[..., None]).sum(1)
        pooled.append(h / count.clamp(min=1)[:, None] if pooling == "mean" else h)
    return pooled[0] if cu_seqlens is None else torch.cat(pooled)


def _sequences(cu_seqlens: Tensor | None, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The batch as it is, or one ``(1, H, length, ...)`` slice a packed sequence."""
    if cu_seqlens is None:
        return [tensors]
    bounds = cu_seqlens.tolist()
    return [tuple(t[:, :, a:b] for t in tensors) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
