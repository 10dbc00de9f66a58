"""Shared-prefix packing: of two texts that start with the same tokens, the packed row holds the second one's rest only.

Those rests, the suffixes, stand after all whole texts. In a causal model both texts have the same hidden states in
their common prefix, so a suffix attends to the prefix's keys and values in the whole text, and to its own.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from molsaki.batches.movable import Movable


@dataclasses.dataclass(frozen=True, eq=False)
class SharedPrefix(Movable):
    """Positions in a packed row of N texts, of at most K tokens, whose suffixes have at most T tokens, n in total.

    Padding repeats a text's last token. No query sees it as a key and nothing reads it as a query, so its gradient
    is 0.

    Attributes:
        keys: ``(N, K)`` int64, the position in the row of each token of a text.
        queries: ``(N, T)`` int64, the position in its text of each suffix token.
        suffixes: ``(n,)`` int64, the position in the flattened ``queries`` of each suffix token of the row.
    """

    keys: Tensor
    queries: Tensor
    suffixes: Tensor

    @classmethod
    def from_lengths(cls, wholes: Tensor, prefixes: Tensor, suffixes: Tensor) -> SharedPrefix:
        """From ``(N,)`` int64 token counts: of each whole text, of the prefix shared with it, of the suffix (>= 1)."""
        bounds = torch.cat([wholes, suffixes]).cumsum(0)
        starts, firsts = bounds[: len(wholes)] - wholes, bounds[len(wholes) :] - suffixes
        prefixes, suffixes, starts, firsts = (t[:, None] for t in (prefixes, suffixes, starts, firsts))
        last, step = prefixes + suffixes - 1, torch.arange(int(suffixes.max()))
        token = torch.arange(int(last.max()) + 1).minimum(last)
        return cls(
            keys=torch.where(token < prefixes, starts + token, firsts + token - prefixes),
            queries=(prefixes + step).minimum(last),
            suffixes=(step < suffixes).flatten().nonzero()[:, 0],
        )

    def __len__(self) -> int:
        return self.keys.shape[0]
