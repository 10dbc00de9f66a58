"""What a dry run counts of the examples."""

from __future__ import annotations

import collections
import statistics
from typing import Any

from molsaki.batches.tokenized import all_left_out

Found = dict[str, Any]


class Counts:
    """Steps, words and tokens of the examples that are used, and the number left out, by reason."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.words: list[int] = []
        self.tokens: list[int] = []
        self.left_out: dict[str, int] = {}
        self.entries = 0

    def add(self, steps: int | None, words: int | None, tokens: int) -> None:
        if steps is not None and words is not None:
            self.steps.append(steps)
            self.words.append(words)
            self.entries += steps * words
        self.tokens.append(tokens)

    def leave_out(self, reason: str, count: int = 1) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + count

    @property
    def used(self) -> int:
        return len(self.tokens)

    def need_some(self) -> None:
        if not self.tokens:
            raise ValueError(all_left_out(collections.Counter(self.left_out)))

    def summary(self, words: str = "key_words") -> Found:
        found: Found = {}
        for name, values in (("steps", self.steps), (words, self.words)):
            if values:
                found[name] = {"mean": round(statistics.fmean(values), 1), "max": max(values)}
        if any(self.tokens):
            found["tokens"] = {
                "median": round(statistics.median(self.tokens)),
                "longest": max(self.tokens),
                "total": sum(self.tokens),
            }
        return found


def count_examples(examples: Any, counts: Counts) -> Found:
    found: Found = {"used": counts.used, "left_out": counts.left_out}
    return found | {"not_read": len(getattr(examples, "left_out", ()))}
