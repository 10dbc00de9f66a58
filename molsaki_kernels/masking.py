"""Which keys a query may see."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(rows: Tensor, columns: Tensor, causal: bool, window: int | None) -> Tensor:
    """``(M, C)`` bool: query position ``rows[i]`` sees key position ``columns[j]`` of the same sequence.

    With a window, a query sees its last ``window`` keys, itself included; with ``causal``, none after itself.
    """
    mask = torch.ones(rows.shape[0], columns.shape[0], dtype=torch.bool, device=rows.device)
    if causal:
        mask &= columns[None, :] <= rows[:, None]
    if window is not None:
        mask &= columns[None, :] > rows[:, None] - window
    return mask
