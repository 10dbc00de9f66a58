"""What one call asks of an engine: plain facts, no tensors, so that choosing an engine never touches a device."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Options:
    """How scores become weights: ``P = softmax(mask(softcap(scale q.k)), sinks)``.

    A key is visible if ``key <= query`` (causal) and ``key > query - window`` (window).
    """

    causal: bool
    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """One attention call, as an engine's ``why_not(call)`` sees it. Shapes as in the specification."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    q_heads: int
    kv_heads: int
    length: int  # M; with packed sequences the total
    head_dim: int
    options: Options
    sinks: bool
    packed: bool
    backward: bool  # a gradient will be asked for


class PlanTensors(NamedTuple):
    """A StepPlan's tensors as the custom operators take them: ``(N, S, 2)``, ``(N, C)``, ``(N, C)``, and W."""

    steps: Tensor
    tokens: Tensor
    word_of_token: Tensor
    num_words: int

    def is_empty(self, q: Tensor) -> bool:
        """No row, key token, step or word anywhere: the map is zero and so is its gradient."""
        return 0 in (*q.shape, *self.steps.shape[:2], self.tokens.shape[1], self.num_words)
