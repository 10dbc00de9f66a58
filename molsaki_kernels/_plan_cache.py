"""Keep what depends on a plan alone for as long as the plan's tensors live.

It is computed once per plan and used by every layer, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch.utils.weak import WeakTensorKeyDictionary

from molsaki_kernels.spec import PlanTensors

T = TypeVar("T")
# A plan's tokens -> {everything else the value depends on: (the value, the plan's other tensors)}
_cache: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def cached(plan: PlanTensors, key: tuple[Hashable, ...], compute: Callable[[], T]) -> T:
    """Return ``compute()``, or its result for the same unchanged plan and ``key`` from an earlier call.

    The result must not hold a view of the plan's tokens, which would keep the plan alive.
    """
    tokens, steps, words = plan.tokens, plan.steps, plan.word_of_token
    key = (
        id(steps),
        id(words),
        None if tokens.is_inference() else tokens._version,  # inference tensors have no version
        None if steps.is_inference() else steps._version,
        None if words.is_inference() else words._version,
        plan.num_words,
        *key,
    )
    results: dict[tuple[Hashable, ...], Any] | None = _cache.get(tokens)
    if results is None:
        results = _cache[tokens] = {}
    result = results.get(key)
    if result is None:
        result = results[key] = (compute(), steps, words)  # holding steps and words reserves their ids
    value: T = result[0]
    return value
