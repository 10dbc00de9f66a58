"""Attention sinks for engines that know none: a correction of what the attention without them gave."""

from __future__ import annotations

import torch
from torch import Tensor


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse with the sinks in the softmax's denominator; exact, and differentiable in all three.

        lse' = logaddexp(lse, sink),   out' = out exp(lse - lse')

    A flash backward that is handed out' and lse' makes exactly the weights with sinks again.

    Args:
        out: ``(B, H, M, D)``. lse: ``(B, H, M)``. sinks: ``(H,)`` logits.

    Returns:
        out' in out's dtype and lse' in lse's.
    """
    # Spread in float64, so that dsinks, a sum over all rows of both signs, is summed in it.
    both = torch.logaddexp(lse, sinks.double()[:, None].expand_as(lse).to(lse.dtype))
    return (out * (lse - both).exp()[..., None]).to(out.dtype), both
