"""Which keys a query can see: shared by engines and attention hooks; the oracle has its own definition."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(queries: Tensor, keys: Tensor, causal: bool, window: int | None) -> Tensor:
    """Return a bool ``(M, C)`` tensor: whether the query at position ``queries[i]`` sees the key at ``keys[j]``.

    Args:
        queries: ``(M,)`` positions within one sequence. keys: ``(C,)`` likewise.
        causal: a query sees no key after itself.
        window: a query sees no key further back than ``window - 1`` tokens; None: no limit.
    """
    queries = queries[:, None]
    mask = keys <= queries if causal else torch.ones_like(keys <= queries)
    return mask if window is None else mask & (keys > queries - window)
