"""What is made once a plan, used by every layer forward and backward, and kept as long as the plan's tensors live."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

from torch.utils.weak import WeakTensorKeyDictionary

from molsaki_kernels.spec import PlanTensors

T = TypeVar("T")
_kept = WeakTensorKeyDictionary()  # a plan's tokens -> {what else it depends on: (what was made, the plan's rest)}


def kept(plan: PlanTensors, key: tuple[Hashable, ...], make: Callable[[], T]) -> T:
    """What ``make()`` gave for this plan and ``key`` before, or gives now.

    It must not hold a view of the plan's tokens: that would keep the plan alive.
    """
    rest = (plan.steps, plan.word_of_token)
    versions = tuple(-1 if t.is_inference() else t._version for t in (plan.tokens, *rest))
    whole = (*map(id, rest), versions, plan.num_words, *key)
    known = _kept.setdefault(plan.tokens, {})
    if whole not in known:
        known[whole] = (make(), rest)  # rest: keeps its ids taken
    return known[whole][0]
