"""The plan: the tokens of each step and of each key word. It is checked once and used by every layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data._utils.collate import default_collate_fn_map

NO_WORD = -1  # word_of_token of a padding token


@dataclasses.dataclass(frozen=True, eq=False)
class StepPlan:
    """The steps and key words of a batch of N sequences (MoLSAKI, arXiv 2604.15701, Eq. 2 and 3).

    Use :meth:`from_spans`, which checks its arguments; the constructor takes tensors that are valid already.

    Attributes:
        steps: ``(N, S, 2)`` int64, half-open token ranges, ascending; padded with ``(0, 0)``.
        tokens: ``(N, C)`` int64, the key tokens' positions, ascending in each sequence; padded with 0 on the right.
        word_of_token: ``(N, C)`` int64, the word (column of the map) of each key token; -1 marks padding.
        step_mask: ``(N, S)`` bool, False where a sequence has fewer than S steps.
        word_mask: ``(N, W)`` bool, False where a sequence has fewer than W words.
        extents: N ints on the host, one past the last token that each sequence's plan refers to: a batch can be checked
            against them without waiting for a device.
        extent: the largest of them, 0 if there is none. Compiled code reads only this one: the tuple would cost a
            compilation for each number of sequences and each of their values.
    """

    steps: Tensor
    tokens: Tensor
    word_of_token: Tensor
    step_mask: Tensor
    word_mask: Tensor
    extents: tuple[int, ...]
    extent: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "extent", max(self.extents, default=0))

    @classmethod
    def from_spans(
        cls,
        steps: Sequence[Sequence[tuple[int, int]]],
        words: Sequence[Sequence[Sequence[int]]],
        device: torch.device | str | None = None,
    ) -> StepPlan:
        """Build the plan of N sequences.

        Args:
            steps: for each sequence, a list of ``(start, stop)`` half-open token ranges, disjoint and ascending. Tokens
                may belong to no step; a step may be empty.
            words: for each sequence, a list of key words, each a list of token indices. No token is in two words. The
                words may be in any order: word w is column w of the map.
            device: of the tensors; the default device if None.

        Raises:
            TypeError: a span or a token index is not an int.
            ValueError: the two lists differ in length, a range is negative, reversed or overlaps the one before, or a
                token is negative or in two words. The message names the argument, the sequence and the entry.
        """
        steps, words = list(steps), list(words)
        if len(steps) != len(words):
            raise ValueError(
                f"steps and words: expected one entry per sequence in both, got {len(steps)} and {len(words)}"
            )
        step_rows = [_checked_steps(n, s) for n, s in enumerate(steps)]
        word_rows = [_checked_words(n, w) for n, w in enumerate(words)]
        pairs = [sorted((token, w) for w, word in enumerate(row) for token in word) for row in word_rows]
        num_steps = [len(row) for row in step_rows]
        num_words = [len(row) for row in word_rows]
        C = max(map(len, pairs), default=0)
        return cls(
            steps=_padded(step_rows, max(num_steps, default=0), (0, 0), device, width=2),
            tokens=_padded([[t for t, _ in row] for row in pairs], C, 0, device),
            word_of_token=_padded([[w for _, w in row] for row in pairs], C, NO_WORD, device),
            step_mask=_prefix_mask(num_steps, device),
            word_mask=_prefix_mask(num_words, device),
            extents=tuple(
                max([stop for start, stop in s if stop > start] + [t + 1 for t, _ in p], default=0)
                for s, p in zip(step_rows, pairs, strict=True)
            ),
        )

    @classmethod
    def cat(cls, plans: Iterable[StepPlan]) -> StepPlan:
        """Stack plans of ``N_1, N_2, ...`` sequences into one of ``N_1 + N_2 + ...``, padded to the widest."""
        plans = list(plans)
        if not plans:
            raise ValueError("plans: expected at least one StepPlan, got none")
        if any(not isinstance(p, StepPlan) for p in plans):
            raise TypeError(f"plans: expected StepPlan objects, got {[type(p).__name__ for p in plans]}")
        return cls(
            steps=_cat([p.steps for p in plans], 0),
            tokens=_cat([p.tokens for p in plans], 0),
            word_of_token=_cat([p.word_of_token for p in plans], NO_WORD),
            step_mask=_cat([p.step_mask for p in plans], False),
            word_mask=_cat([p.word_mask for p in plans], False),
            extents=sum((p.extents for p in plans), ()),
        )

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, index: int | slice) -> StepPlan:
        """The plan of one sequence (an int) or of a slice of them; the padding stays as wide as it was."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"index: expected one of {len(self)} sequences, got {index}")
            index = slice(index, index + 1 or None)
        if not isinstance(index, slice):
            raise TypeError(f"index: expected an int or a slice, got {type(index).__name__}")
        return StepPlan(**{name: getattr(self, name)[index] for name in (*_TENSORS, "extents")})

    def __iter__(self) -> Iterator[StepPlan]:
        return (self[n] for n in range(len(self)))

    def __repr__(self) -> str:
        return (
            f"StepPlan(sequences={len(self)}, steps={self.num_steps}, words={self.num_words}, "
            f"tokens={self.num_tokens}, device='{self.device}')"
        )

    @property
    def num_steps(self) -> int:
        """S, the steps of the longest sequence."""
        return self.step_mask.shape[1]

    @property
    def num_words(self) -> int:
        """W, the words of the longest sequence."""
        return self.word_mask.shape[1]

    @property
    def num_tokens(self) -> int:
        """C, the key tokens of the longest sequence."""
        return self.tokens.shape[1]

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> StepPlan:
        """This plan with its tensors on ``device``."""
        if torch.device(device) == self.device:
            return self
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in _TENSORS}
        return StepPlan(**moved, extents=self.extents)

    def pin_memory(self) -> StepPlan:
        """This plan in page-locked memory (what a ``DataLoader`` with ``pin_memory=True`` calls)."""
        return StepPlan(**{name: getattr(self, name).pin_memory() for name in _TENSORS}, extents=self.extents)


_TENSORS = ("steps", "tokens", "word_of_token", "step_mask", "word_mask")

# Lets a DataLoader's default_collate stack plans like tensors.
default_collate_fn_map[StepPlan] = lambda batch, *, collate_fn_map=None: StepPlan.cat(batch)


def _checked_steps(n: int, steps: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    if all(type(span) is tuple and len(span) == 2 for span in steps):  # the usual case, ten times as fast
        ends = [end for span in steps for end in span]
        if all(type(end) is int for end in ends) and min(ends, default=0) >= 0 and ends == sorted(ends):
            return list(steps)
    rows, last = [], 0
    for s, span in enumerate(steps):
        where = f"steps[{n}][{s}]"
        try:
            start, stop = span
        except (TypeError, ValueError):
            raise ValueError(f"{where}: expected a (start, stop) pair, got {span!r}") from None
        start, stop = _index(start, where), _index(stop, where)
        if start < 0 or stop < start:
            raise ValueError(f"{where}: expected 0 <= start <= stop, got ({start}, {stop})")
        if start < last:
            raise ValueError(
                f"{where}: expected disjoint, ascending steps, but ({start}, {stop}) starts before row {last}"
            )
        last = stop
        rows.append((start, stop))
    return rows


def _checked_words(n: int, words: Sequence[Sequence[int]]) -> list[list[int]]:
    if all(type(word) is list for word in words):  # the usual case, as above
        tokens = [token for word in words for token in word]
        are_ints = all(type(token) is int for token in tokens)
        if are_ints and min(tokens, default=0) >= 0 and len(set(tokens)) == len(tokens):
            return cast(list[list[int]], list(words))
    rows: list[list[int]] = []
    owner: dict[int, int] = {}
    for w, word in enumerate(words):
        where = f"words[{n}][{w}]"
        if isinstance(word, (int, str)):
            raise TypeError(f"{where}: expected a list of token indices, got {word!r}")
        row = [_index(token, where) for token in word]
        for token in row:
            if token < 0:
                raise ValueError(f"{where}: expected token indices >= 0, got {token}")
            if token in owner:
                raise ValueError(
                    f"{where}: token {token} is in word {owner[token]} already; a token belongs to one word"
                )
            owner[token] = w
        rows.append(row)
    return rows


def _index(value: int, where: str) -> int:
    try:
        return value.__index__()
    except AttributeError:
        raise TypeError(f"{where}: expected an int, got {value!r}") from None


def _padded(
    rows: Sequence[Sequence[Any]],
    length: int,
    fill: Any,
    device: torch.device | str | None,
    width: int | None = None,
) -> Tensor:
    shape = (len(rows), length) if width is None else (len(rows), length, width)
    data = np.array([[*row, *[fill] * (length - len(row))] for row in rows], np.int64).reshape(shape)
    return torch.from_numpy(data).to(device or torch.get_default_device())  # torch.tensor takes three times as long


def _prefix_mask(lengths: list[int], device: torch.device | str | None) -> Tensor:
    longest = max(lengths, default=0)
    columns = torch.arange(longest, device=device)
    return columns < torch.tensor(lengths, dtype=torch.int64, device=device).reshape(-1, 1)


def _cat(tensors: list[Tensor], fill: int | bool) -> Tensor:
    width = max(t.shape[1] for t in tensors)
    return torch.cat(
        [torch.cat([t, t.new_full((t.shape[0], width - t.shape[1], *t.shape[2:]), fill)], dim=1) for t in tensors]
    )
