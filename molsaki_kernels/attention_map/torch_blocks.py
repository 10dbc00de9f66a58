"""Cut a batch into blocks of queries for the PyTorch stepwise map, with each block's masks and word weights.

They depend only on the plan and the shapes, so they are computed once per plan and used by every layer, forward and
backward.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from molsaki_kernels._plan_cache import cached
from molsaki_kernels.spec import AttentionOptions, MapInputs, PlanTensors

TILE_ELEMENTS = 1 << 19  # of a block's weights (2 MiB in float32): they stay in cache from the product to the sum
# In tiles of 512 rows the columns map to the same cache sets: a product that runs at 165 GFLOP/s with 480 rows runs at
# 130. Columns that are not aligned to cache lines (291 rows instead of 288) cost 10 %.
MIN_ROWS, MAX_ROWS, ROWS_STEP = 16, 480, 32
LARGEST_KEPT = 16 << 20  # bytes of a plan's blocks that are kept; the others are computed again in every pass


class Block(NamedTuple):
    """Some queries with the steps and key columns they touch."""

    rows: slice
    columns: slice
    steps: slice
    in_step: Tensor  # (n, s, m): 1 where query i is in step s
    masked: int  # columns from this one on may be hidden from a query
    hidden: Tensor | None  # (n, 1, c - masked, m): True where query i does not see column j; None: all are visible
    elements: int  # n m c


class BlockedSequences:
    """Some sequences of one length, cut into blocks of queries.

    Attributes:
        sequences: the plan's sequences. rows: where they are packed, their tokens; else None.
        tokens: ``(n, C)``. no_token: ``(n, 1, C, 1)``, True for padding.
        words: ``(n, C, W)``, ``weight`` where token j is in word w, zero for padding.
        outside: ``(n, 1, M)``, True for a query in no step; None if there is none (known on a CPU only).
        block_rows: queries of the largest block. elements: weights per head of all blocks.
    """

    def __init__(
        self,
        sequences: slice,
        rows: slice | None,
        length: int,
        heads: int,
        options: AttentionOptions,
        plan: PlanTensors,
        dtype: torch.dtype,
    ):
        weight = 1.0 if options.per_head else 1 / max(heads, 1)
        self.sequences, self.rows = sequences, rows
        self._options, self._length = options, length
        steps, tokens, words = (
            t[sequences].clone() for t in (plan.steps, plan.tokens, plan.word_of_token)
        )  # a copy: a view would keep the plan alive
        self.tokens, self.no_token = tokens, (words < 0)[:, None, :, None]
        word = torch.arange(plan.num_words, device=tokens.device)
        self.words = (words[..., None] == word).to(dtype).mul_(weight)
        self._starts, self._stops = steps[..., :1], steps[..., 1:]
        self._row = torch.arange(length, device=tokens.device)
        outside = ~self._in_step(slice(None), slice(None)).any(1, keepdim=True)
        self.outside = outside if tokens.device.type != "cpu" or outside.any() else None
        self._sequence = torch.arange(len(tokens), device=tokens.device)[:, None, None]
        most = min(max(TILE_ELEMENTS // (len(tokens) * heads * tokens.shape[1]), MIN_ROWS), MAX_ROWS)
        self.block_rows = min(most if most < ROWS_STEP else most // ROWS_STEP * ROWS_STEP, length)
        self._bounds = list(self._bounds_on_host(steps, tokens, words))
        self.elements = sum(self._elements(rows, columns) for rows, columns, *_ in self._bounds)
        self._kept: list[Block] = []
        size = 0
        for bound in self._bounds:
            block = self._block(*bound)
            size += block.in_step.nbytes + (0 if block.hidden is None else block.hidden.nbytes)
            if size > LARGEST_KEPT:
                break
            self._kept.append(block)

    def __len__(self) -> int:
        """The number of sequences."""
        return len(self.tokens)

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks that hold a query of a step, ascending."""
        yield from self._kept
        for bound in self._bounds[len(self._kept) :]:
            yield self._block(*bound)

    def view(self, tensor: Tensor) -> Tensor:
        """Return these sequences' part of a ``(B, H, M, ...)`` tensor."""
        return tensor[self.sequences] if self.rows is None else tensor[:, :, self.rows]

    def key_tokens(self, k: Tensor) -> Tensor:
        """Return a copy ``(n, Hkv, C, D)`` of the key tokens of k ``(n, Hkv, M, D)``."""
        heads = torch.arange(k.shape[1], device=k.device)
        return k[self._sequence, heads[:, None], self.tokens[:, None]]

    def _bounds_on_host(
        self, steps: Tensor, tokens: Tensor, words: Tensor
    ) -> Iterator[tuple[slice, slice, slice, int, bool]]:
        """Yield each block's queries, columns and steps, its first masked column, and whether the window may hide one.

        On a CPU the plan's numbers can be read at no cost; on other devices a block takes all columns and steps.
        """
        M, C, options = self._length, tokens.shape[1], self._options
        on_cpu = tokens.device.type == "cpu"
        if on_cpu:
            host_steps = steps.tolist()
            host_tokens = [
                [t for t, w in zip(t_row, w_row, strict=True) if w >= 0]
                for t_row, w_row in zip(tokens.tolist(), words.tolist(), strict=True)
            ]
        for start in range(0, M, self.block_rows):
            rows = slice(start, min(start + self.block_rows, M))
            if not on_cpu:
                hides = options.causal or options.window is not None
                yield rows, slice(0, C), slice(0, steps.shape[1]), 0 if hides else C, options.window is not None
                continue
            touched = [
                s for row in host_steps for s, (a, b) in enumerate(row) if max(a, rows.start) < min(b, rows.stop)
            ]
            low = 0 if options.window is None else rows.start - options.window + 1
            high = rows.stop if options.causal else M
            first = min(bisect.bisect_left(row, low) for row in host_tokens)
            last = max(bisect.bisect_left(row, high) for row in host_tokens)
            if not touched or first >= last:
                continue
            masked = last
            if options.causal:
                masked = max(first, min(bisect.bisect_right(row, rows.start) for row in host_tokens))
            windowed = options.window is not None and rows.stop - options.window > min(
                (row[first] for row in host_tokens if first < len(row)), default=M
            )
            masked = first if windowed else masked
            yield rows, slice(first, last), slice(min(touched), max(touched) + 1), masked - first, windowed

    def _block(self, rows: slice, columns: slice, steps: slice, masked: int, windowed: bool) -> Block:
        hidden = None
        if masked < columns.stop - columns.start:
            column, row = self.tokens[:, None, columns][..., masked:, None], self._row[rows]
            hidden = column > row if self._options.causal else torch.zeros_like(column > row)
            if windowed and self._options.window is not None:
                hidden |= column <= row - self._options.window
        in_step = self._in_step(rows, steps).to(self.words.dtype)
        return Block(rows, columns, steps, in_step, masked, hidden, self._elements(rows, columns))

    def _elements(self, rows: slice, columns: slice) -> int:
        elements: int = len(self) * (rows.stop - rows.start) * (columns.stop - columns.start)
        return elements

    def _in_step(self, rows: slice, steps: slice) -> Tensor:
        """Return a bool ``(n, s, m)`` tensor: whether query i is in step s."""
        row = self._row[rows]
        return (row >= self._starts[:, steps]) & (row < self._stops[:, steps])


def blocked_sequences(
    inputs: MapInputs, options: AttentionOptions, plan: PlanTensors, dtype: torch.dtype
) -> list[BlockedSequences]:
    """Return the groups of sequences that cover a batch; packed sequences one by one.

    A group is small enough that MIN_ROWS queries of each of its sequences fit in a tile.

    Args:
        dtype: the map's.
    """
    heads, length = inputs.q.shape[1:3]
    bounds = None if inputs.cu_seqlens is None else inputs.bounds
    key = ("blocks", heads, length, dtype, options, bounds)
    return cached(plan, key, lambda: list(_cover(bounds, length, heads, options, plan, dtype)))


def _cover(
    bounds: tuple[int, ...] | None,
    length: int,
    heads: int,
    options: AttentionOptions,
    plan: PlanTensors,
    dtype: torch.dtype,
) -> Iterator[BlockedSequences]:
    N, C = plan.tokens.shape
    if bounds is not None:
        for n, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            if b > a:
                yield BlockedSequences(slice(n, n + 1), slice(a, b), b - a, heads, options, plan, dtype)
        return
    size = max(1, TILE_ELEMENTS // (heads * min(length, MAX_ROWS) * C))
    for n in range(0, N, size):
        yield BlockedSequences(slice(n, min(n + size, N)), None, length, heads, options, plan, dtype)
