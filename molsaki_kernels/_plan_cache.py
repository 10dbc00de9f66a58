"""Cache values that depend only on a plan, for as long as the plan's tensors live.

Such a value is computed once per plan and used by every layer, forward and backward. On a CPU every change of the
plan's tensors is detected. On a GPU a change is detected by the tensors' versions and addresses, so do not write to
them through ``.data``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from molsaki_kernels.spec import PlanTensors

T = TypeVar("T")
MOST_ENTRIES = 64  # of one plan; more are needed only where cu_seqlens is a new tensor in every layer
# A plan's tokens -> {everything else the value depends on: (the value, the other tensors that it depends on)}
_cache: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def cached(
    plan: PlanTensors, key: tuple[Hashable, ...], compute: Callable[[], T], cu_seqlens: Tensor | None = None
) -> T:
    """Return ``compute()``, or its result for the same unchanged tensors and ``key`` from an earlier call.

    The result must not hold a view of the plan's tokens, which would keep the plan alive.
    """
    tokens, steps, words = plan.tokens, plan.steps, plan.word_of_token
    # Inlined, because every layer of every training step runs this code.
    states: tuple[Hashable, ...]
    if tokens.is_cpu:  # the numbers themselves: a version misses changes through .data, numpy and in inference mode
        bounds = None if cu_seqlens is None else cu_seqlens.numpy().tobytes()
        states = (tokens.numpy().tobytes(), steps.numpy().tobytes(), words.numpy().tobytes(), bounds)
    elif tokens.is_inference() or steps.is_inference() or words.is_inference():
        return compute()  # without a version, a change cannot be seen without waiting for the device
    elif cu_seqlens is None:
        states = (tokens._version, steps._version, words._version, *map(Tensor.data_ptr, (tokens, steps, words)))
    elif cu_seqlens.is_inference():
        return compute()
    else:
        states = (tokens._version, steps._version, words._version, cu_seqlens._version)
        states += tuple(map(Tensor.data_ptr, (tokens, steps, words, cu_seqlens)))
    key = (id(steps), id(words), id(cu_seqlens), *states, plan.num_words, *key)
    results: dict[tuple[Hashable, ...], Any] | None = _cache.get(tokens)
    if results is None:
        results = _cache[tokens] = {}
    result = results.get(key)
    if result is None:
        if len(results) >= MOST_ENTRIES:
            results.clear()
        # Holding the tensors reserves their ids; ``tokens`` has its own, and held here would never be freed.
        held = [x for x in (steps, words, cu_seqlens) if x is not tokens]
        result = results[key] = (compute(), held)
    value: T = result[0]
    return value


def cached_on_device(
    plan: PlanTensors, cu_seqlens: Tensor | None, key: tuple[Hashable, ...], compute: Callable[[], T]
) -> T:
    """:func:`cached`, for tensors that ``compute`` fills on the plan's device without waiting for it.

    Nothing is cached while a CUDA graph is captured, nor inside operators, which compiled code calls (also in the
    warm-up of ``torch.compile(mode="reduce-overhead")``): the memory could belong to a graph, and a replay could change
    the plan without being detected. Nothing is cached for inference tensors either, whose changes cannot be detected. A
    cached tensor is used only on the stream that computed it.
    """
    tensors = (plan.tokens, plan.steps, plan.word_of_token, *(() if cu_seqlens is None else (cu_seqlens,)))
    stream = 0
    if not plan.keep or any(t.is_inference() for t in tensors):
        return compute()
    if plan.tokens.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return compute()
        stream = torch.cuda.current_stream(plan.tokens.device).cuda_stream
    return cached(plan, (stream, *key), compute, cu_seqlens)
