"""What a dry run measures: the time of batches and replies, and memory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from molsaki.dry_run.counts import Found
from molsaki.measuring import peak_of_process, synchronize

TYPICAL = 2  # batches that are timed after the longest; as in molsaki.training.probe
BY_PROCESS = "the peak memory of this process, including the longest batch"
BY_DEVICE = "the peak that PyTorch allocated on the GPU, including the longest batch"


@dataclasses.dataclass(frozen=True)
class Probe:
    """Tokens per second in the batches that were timed."""

    rate: float
    batches: int
    tokens: int
    seconds: float

    def how(self, what: str) -> str:
        return (
            f"{self.batches} {what} with {self.tokens} tokens in {self.seconds:.3g} s, after one with the longest texts"
        )


def chosen_batches(groups: Sequence[tuple[list[int], int]]) -> list[tuple[list[int], int]]:
    """The largest batch, and typical ones: those with the median number of tokens."""
    ordered = sorted(groups, key=lambda group: group[1])
    middle = len(ordered) // 2
    typical = ordered[max(middle - TYPICAL // 2, 0) :][:TYPICAL]
    return [ordered[-1], *(typical if len(typical) == TYPICAL else [ordered[-1]] * TYPICAL)]


def timed(run: Callable[[Sequence[int]], Any], groups: Sequence[tuple[list[int], int]], device: Any) -> Probe:
    """Run the longest batch, then typical ones with a clock."""
    longest, *typical = chosen_batches(groups)
    run(longest[0])
    synchronize(device)
    start = time.perf_counter()
    for numbers, _ in typical:
        run(numbers)
    synchronize(device)
    seconds, tokens = time.perf_counter() - start, sum(count for _, count in typical)
    return Probe(tokens / seconds, len(typical), tokens, seconds)


def time_decoding(
    run: Callable[[Sequence[int], int], int], groups: Sequence[Sequence[int]], new_tokens: int
) -> tuple[int, float]:
    """Decode one token of the longest prompts, for the memory, then one typical batch to the end of its replies.

    Returns:
        The tokens that each reply of that batch took, the longest included, and the seconds.
    """
    run(groups[0], 1)
    batch = groups[len(groups) // 2]
    start = time.perf_counter()
    tokens = run(batch, new_tokens)
    return tokens // len(batch), time.perf_counter() - start


def how_decoded(decoded: int, new_tokens: int) -> str:
    return (
        f"one batch of questions of median length, whose longest reply had {decoded} of at most {new_tokens} tokens, "
        "times the number of batches"
    )


def memory_of(device: Any, parts: Found) -> Found:
    """The parts and the peak, as PyTorch's allocator or the system counted it."""

    if getattr(device, "type", "cpu") == "cuda":
        peak = max(torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count()))
        return {**parts, "peak": peak, "measured": BY_DEVICE}
    return {**parts, "peak": peak_of_process(), "measured": BY_PROCESS}
