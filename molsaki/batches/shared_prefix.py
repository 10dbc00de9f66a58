"""Texts that begin as another one of their packed row does: only their tails are in the row, after all whole texts.

The hidden states of what two texts begin with are the same in a causal model, so a tail's queries take the keys and
values of the first tokens from the whole text, and the tail's own.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Branches:
    """Where N texts, of K tokens at most, that branch off from N whole ones have their tails, of T tokens at most.

    Padding repeats a text's last token: as a key no query sees it, as a query nothing reads it, so its gradient is 0.

    Attributes:
        keys: ``(N, K)`` int64, the row that each token of a text is in.
        queries: ``(N, T)`` int64, the tail's tokens, counted from the text's first.
        tails: ``(n,)`` int64, where in the flattened queries each row of the tails is.
    """

    keys: Tensor
    queries: Tensor
    tails: Tensor

    @classmethod
    def of(cls, wholes: Tensor, prefixes: Tensor, tails: Tensor) -> Branches:
        """From how many tokens, ``(N,)`` int64 each, a whole text has, how many of those a branch begins with, and how
        many its tail has, at least one."""
        bounds = torch.cat([wholes, tails]).cumsum(0)
        starts, firsts = bounds[: len(wholes)] - wholes, bounds[len(wholes) :] - tails
        wholes, prefixes, tails, starts, firsts = (t[:, None] for t in (wholes, prefixes, tails, starts, firsts))
        last, tail = prefixes + tails - 1, torch.arange(int(tails.max()))
        token = torch.arange(int(last.max()) + 1).minimum(last)
        return cls(
            keys=torch.where(token < prefixes, starts + token, firsts + token - prefixes),
            queries=(prefixes + tail).minimum(last),
            tails=(tail < tails).flatten().nonzero()[:, 0],
        )

    def __len__(self) -> int:
        return self.keys.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Branches:
        """The same with its tensors on ``device``."""
        if torch.device(device) == self.keys.device:
            return self
        return Branches(*(t.to(device, non_blocking=non_blocking) for t in (self.keys, self.queries, self.tails)))

    def pin_memory(self) -> Branches:
        """The same in page-locked memory (what a ``DataLoader`` with ``pin_memory=True`` calls)."""
        return Branches(*(t.pin_memory() for t in (self.keys, self.queries, self.tails)))
