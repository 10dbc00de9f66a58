"""Attention in chunks (Llama 4): a query sees the keys of its own chunk up to itself.

Each chunk is a text of a packed batch, and the map of a text is the sum of the maps of its chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from molsaki_kernels import StepPlan, stepwise_attention


def chunked_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: StepPlan, chunk: int, cu_seqlens: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Out and map, as `stepwise_attention`; chunks of ``chunk`` tokens count from the start of each text."""
    B, _, M, _ = query.shape
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, B * M + 1, M, device=query.device, dtype=torch.int32)
    # Every text gets as many chunks as the longest possible text; some may be empty.
    first = torch.arange(0, M, chunk, device=query.device, dtype=torch.int32)
    starts = torch.minimum(cu_seqlens[:-1, None] + first, cu_seqlens[1:, None]).flatten()
    query, key, value = (t.transpose(0, 1).flatten(1, 2)[None] for t in (query, key, value))
    bounds = torch.cat([starts, cu_seqlens[-1:]])
    out, maps = stepwise_attention(query, key, value, _plan_of_chunks(plan, first, chunk), cu_seqlens=bounds, **options)
    out = out[0].unflatten(1, (B, M)).transpose(0, 1)
    return out, maps.unflatten(0, (len(plan), len(first))).sum(1)


def _plan_of_chunks(plan: StepPlan, first: Tensor, chunk: int) -> StepPlan:
    """The plan of N texts cut into K chunks each, as N * K sequences. ``first (K,)``: first tokens of the chunks."""
    first = first.long()
    steps = (plan.steps[:, None] - first[:, None, None]).clamp(0, chunk)
    inside = (plan.tokens[:, None] // chunk == first[:, None] // chunk) & (plan.word_of_token[:, None] >= 0)
    order = (~inside).to(torch.int8).argsort(dim=-1, stable=True)  # padding tokens last
    tokens = torch.where(inside, plan.tokens[:, None] - first[:, None], 0).gather(-1, order)
    words = torch.where(inside, plan.word_of_token[:, None], -1).gather(-1, order)
    K = len(first)
    return StepPlan(
        steps=steps.flatten(0, 1),
        tokens=tokens.flatten(0, 1),
        word_of_token=words.flatten(0, 1),
        step_mask=plan.step_mask.repeat_interleave(K, 0),
        word_mask=plan.word_mask.repeat_interleave(K, 0),
        extents=(),  # the plan has been checked as a whole
    )
