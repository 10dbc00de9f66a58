"""Attention sinks for engines that do not support them, and the gradient of the sinks."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Add the sinks to the softmax's denominator of an attention that was computed without them.

        lse' = logaddexp(lse, sink),   out' = out exp(lse - lse')

    This is exact and differentiable in all three. A flash backward that gets out' and lse' recomputes exactly the
    weights with sinks.

    Args:
        out: ``(B, H, M, D)``. lse: ``(B, H, M)``. sinks: ``(H,)`` logits.

    Returns:
        out' in out's dtype and lse' in lse's.
    """
    # Expanded in float64, so that autograd sums dsinks, a sum over all queries of terms of both signs, in float64.
    both = torch.logaddexp(lse, sinks.double()[:, None].expand_as(lse).to(lse.dtype))
    return (out * (lse - both).exp()[..., None]).to(out.dtype), both


def sinks_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Return dsinks ``(H,)``: dS of the sink's column is ``p_sink (0 - delta)``, summed over the queries.

    Args:
        sinks: ``(H,)``. lse: ``(B, H, M)``.
        delta: ``(B, H, M)``, ``rowsum(dO * O) - dlse``, 0 for a query in no sequence, which has no lse. Its dtype is
            that of the computation: for float32 inputs float64, because the terms have both signs.
    """
    terms = (sinks.to(delta.dtype)[:, None] - lse).exp_() * delta
    return -terms.masked_fill_(delta == 0, 0).sum((0, 2), dtype=torch.float64).to(sinks.dtype)
