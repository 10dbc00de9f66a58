"""Attention under an explicit boolean or additive mask, for the cases without a map: generation, dropout, suffixes.

A suffix is the rest of a packed text whose prefix is shared with another text, see
:mod:`molsaki.batches.shared_prefix`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from molsaki.batches.shared_prefix import SharedPrefix
from molsaki_kernels.masking import visible


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention ``(B, Hq, M, Dv)`` of ``query (B, Hq, M, D)``; ``key (B, Hkv, n, D)``, ``value (B, Hkv, n, Dv)``.

    Args:
        mask: broadcasts to ``(B, Hq, M, n)``; boolean (True: visible) or added to the scores; None hides nothing.
        dropout: probability of dropping a weight.
        sinks: ``(Hq,)``, or ``(Hq, M)`` where queries have their own.
        bias: broadcasts to ``(B, Hq, M, n)``, added to the scores.
    """
    if mask is not None:
        mask = mask[..., : key.shape[2]]  # as eager attention does if a mask is longer than the cache
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    if bias is not None:
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.where(mask, bias, torch.finfo(query.dtype).min)
        else:
            mask = bias if mask is None else mask + bias
        mask = mask.to(query.dtype)
    if softcap is None and sinks is None:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale
        )
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        sinks = sinks.view(1, query.shape[1], -1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks.to(scores)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))[..., : key.shape[2]]
    return nn.functional.dropout(weights.to(value.dtype), dropout) @ value


def suffix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shared: SharedPrefix,
    *,
    window: int | None,
    sinks: Tensor | None,
    **options: Any,
) -> Tensor:
    """Causal attention ``(1, n, Hq, D)`` of the n suffix tokens of packed texts, each over its own prefix and suffix.

    Args:
        query: ``(1, Hq, n, D)``, of the suffix tokens, which are the last n of the packed sequence.
        key, value: ``(1, Hkv, M, D)``, of the whole packed sequence.
        window: a query sees its last ``window`` keys, itself included.
        options: ``dropout``, ``scale`` and ``softcap`` of `masked_attention`.
    """
    (N, T), kv_heads = shared.queries.shape, key.shape[1]
    groups = query.shape[1] // kv_heads
    first = key.shape[2] - query.shape[2]

    def gathered(t: Tensor, index: Tensor) -> Tensor:
        """``(1, H, M, D)`` at ``index (N, n)``: ``(N, H, n, D)``."""
        chosen = t[0].transpose(0, 1).index_select(0, index.flatten())
        return chosen.view(*index.shape, *chosen.shape[1:]).transpose(1, 2)

    # The query heads of a group become queries of one head, so that no key is repeated.
    query = gathered(query, shared.keys.gather(1, shared.queries) - first)
    query = query.reshape(N, kv_heads, groups * T, -1)
    if sinks is not None:
        sinks = sinks.view(kv_heads, groups).repeat_interleave(T, 1)
    column = torch.arange(shared.keys.shape[1], device=key.device)
    mask = visible(shared.queries.flatten(), column, True, window).view(N, 1, T, -1).repeat(1, 1, groups, 1)
    key, value = gathered(key, shared.keys), gathered(value, shared.keys)
    out = masked_attention(query, key, value, mask, sinks=sinks, **options)
    out = out.reshape(N, kv_heads, groups, T, -1).permute(0, 3, 1, 2, 4).reshape(N * T, kv_heads * groups, -1)
    return out.index_select(0, shared.suffixes)[None]
