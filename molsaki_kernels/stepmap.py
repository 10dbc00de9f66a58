"""The stepwise map in plain PyTorch, forward and backward (backend "torch").

With P[i, j] = exp(s[i, j] - lse[i]) on the key columns j (s the scaled, softcapped, masked score; Eq. 2 and 3):

    A[s, w]  = sum_{i in step s} sum_{j in word w} P[i, j]                     (N, S, W), the mean over heads
    dS[i, j] = P[i, j] dA[step(i), word(j)]                                     key columns only
    dq[i]    = scale sum_j dS[i, j] k[j]         dk[j] = scale sum_i dS[i, j] q[i]
    dlse[i]  = - sum_j dS[i, j]

(softcap multiplies dS by 1 - tanh^2 before dq and dk.) The rows are walked in blocks small enough to stay in cache;
a block's columns are cut to those that one of its rows can see. Nothing of size M x C reaches memory.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .call import Options, PlanTensors
from .scratch import scratch

TILE_ELEMENTS = 1 << 19  # of a block's weights (1 MiB in float32): they stay in L2 from the product to the sum
MIN_ROWS, MAX_ROWS = 16, 512
LARGEST_EXPONENT = {torch.float32: 88.0, torch.float64: 709.0}  # exp of more is inf


def forward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    plan: PlanTensors,
    options: Options,
    cu_seqlens: Tensor | None = None,
    per_head: bool = False,
) -> Tensor:
    """The map, ``(N, S, W)`` or per head ``(N, Hq, S, W)``, float32 (float64 for float64 inputs).

    Args:
        q: ``(B, Hq, M, D)``. k: ``(B, Hkv, M, D)``. lse: ``(B, Hq, M)``, natural logarithm, sinks counted.
    """
    N, S = plan.steps.shape[:2]
    heads = (q.shape[1],) if per_head else ()
    maps = torch.zeros(N, *heads, S, plan.num_words, dtype=_accumulator(q), device=q.device)
    for part in _parts(q, k, lse, plan, options, cu_seqlens):
        columns = maps.new_zeros(part.size, *heads, S, plan.tokens.shape[1])
        tile = part.tile()
        for block in _blocks(part, options):
            weights, _ = _weights(part, block, options, tile)
            if not per_head:
                weights = weights.sum(1)
            in_step = part.rows_in_steps(block).to(weights.dtype)
            in_step = in_step if not per_head else in_step[:, None]
            columns[..., block.steps, block.columns] += in_step @ weights
        words = part.token_words(plan.num_words, maps.dtype)
        maps[part.sequences] = columns @ (words[:, None] if per_head else words)
    return maps if per_head else maps.div_(max(q.shape[1], 1))


def backward(
    dmaps: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    plan: PlanTensors,
    options: Options,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the map: dq ``(B, Hq, M, D)``, dk ``(N, Hkv, C, D)`` of the key tokens, dlse ``(B, Hq, M)``.

    All in float32 (float64 for float64 inputs). ``dmaps`` is ``(N, S, W)``, or ``(N, Hq, S, W)`` for per-head maps.
    Entries of dk at padding tokens are zero; :func:`add_key_gradient` puts dk where it belongs. On a CPU dq is scratch
    memory, valid until the next call.
    """
    B, Hq, M, D = q.shape
    Hkv = k.shape[1]
    dtype = _accumulator(q)
    per_head = dmaps.dim() == 4
    dmaps = dmaps.to(dtype) if per_head else (dmaps / max(Hq, 1)).to(dtype)
    dq = scratch("map dq", tuple(q.shape), dtype, q.device)
    if _is_empty(q, plan):
        dq.zero_()
    dlse = torch.zeros(lse.shape, dtype=dtype, device=q.device)
    dk = torch.zeros(plan.tokens.shape[0], Hkv, plan.tokens.shape[1], D, dtype=dtype, device=q.device)
    for part in _parts(q, k, lse, plan, options, cu_seqlens):
        words = part.token_words(plan.num_words, dtype).transpose(-1, -2)
        dcolumns = dmaps[part.sequences] @ (words[:, None] if per_head else words)  # (n, [Hq,] S, C)
        part_dk = dk.new_zeros(part.size, Hq, plan.tokens.shape[1], D)
        part_dq, part_dlse = part.slice_of(dq), part.slice_of(dlse)
        tile = part.tile()
        product_size = part.size * Hq * max(part.block_rows, plan.tokens.shape[1]) * D
        product = scratch("map product", (product_size,), dtype, q.device)
        done = 0
        for block in _blocks(part, options):
            part_dq[:, :, done : block.rows.start] = 0
            done = block.rows.stop
            weights, slope = _weights(part, block, options, tile)
            in_step = part.rows_in_steps(block).to(dtype).transpose(-1, -2)
            upstream = dcolumns[..., block.steps, block.columns]
            upstream = in_step[:, None] @ upstream if per_head else (in_step @ upstream)[:, None]
            dscores = weights.mul_(upstream)  # (n, Hq, m, c)
            part_dlse[:, :, block.rows] = dscores.sum(-1).neg_()
            if slope is not None:
                dscores.mul_(slope)
            dscores = dscores.flatten(0, 1)
            keys, queries = (t.flatten(0, 1) for t in (part.keys[:, :, block.columns], part.q_rows(block)))
            _bmm_into(part_dq[:, :, block.rows], dscores, keys, product)
            _bmm_into(part_dk[:, :, block.columns], dscores.transpose(1, 2), queries, product, add=True)
        part_dq[:, :, done:] = 0
        part_dk.mul_(options.scale)
        dk[part.sequences] = part_dk.view(part.size, Hkv, Hq // Hkv, -1, D).sum(2) if Hq != Hkv else part_dk
    return dq, dk, dlse


def add_key_gradient(dk: Tensor, dk_tokens: Tensor, plan: PlanTensors, cu_seqlens: Tensor | None) -> None:
    """Add the key tokens' gradient ``(N, Hkv, C, D)`` into ``dk (B, Hkv, M, D)`` in place.

    Deterministic: a token is in one word, and padding adds zeros.
    """
    tokens = plan.tokens
    if cu_seqlens is not None:
        tokens = (tokens + cu_seqlens[:-1, None].to(tokens)).view(1, -1)
        dk_tokens = dk_tokens.transpose(0, 1).flatten(1, 2)[None]
        valid = (plan.word_of_token >= 0).view(-1)
        tokens, dk_tokens = tokens[:, valid], dk_tokens[:, :, valid]
    if dk_tokens.numel():
        dk.scatter_add_(2, tokens[:, None, :, None].expand(dk_tokens.shape), dk_tokens.to(dk.dtype))


class _Block(NamedTuple):
    rows: slice
    columns: slice
    steps: slice
    masked: int  # columns from this one on may be hidden from a row by causality
    windowed: bool  # a column may be hidden from a row by the window


class _Part:
    """Some sequences of one length: views of their q, k, lse and their slice of the plan."""

    def __init__(
        self, sequences: slice, rows: slice | None, q: Tensor, k: Tensor, lse: Tensor, plan: PlanTensors, scale: float
    ):
        self.sequences, self.rows = sequences, rows
        steps, tokens, words = (t[sequences] for t in plan[:3])
        self.size, self.length = steps.shape[0], q.shape[2]
        self.tokens, self.word_of_token = tokens, words
        self.starts, self.stops = steps[..., :1], steps[..., 1:]
        self.row = torch.arange(self.length, device=q.device)
        dtype = _accumulator(q)
        keys = torch.stack([k_n.index_select(1, row) for k_n, row in zip(k, tokens, strict=True)]).to(dtype)
        self.keys = keys.mul_(scale).repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (n, Hq, C, D), scaled
        self.q = q
        rows_per_tile = TILE_ELEMENTS // (self.size * q.shape[1] * tokens.shape[1])
        self.block_rows = min(max(rows_per_tile, MIN_ROWS), MAX_ROWS, self.length)
        # A row in no step must not be able to add even inf * 0: its lse is inf and its weights are 0.
        in_step = self.rows_in_steps(slice(0, self.length), slice(None)).any(1)
        self.lse = lse.to(dtype).masked_fill(~in_step[:, None], float("inf"))
        if q.device.type == "cpu":  # on the host the plan's numbers are free to look at
            self.host_steps = steps.tolist()
            self.host_tokens = [
                [t for t, w in zip(t_row, w_row, strict=True) if w >= 0]
                for t_row, w_row in zip(tokens.tolist(), words.tolist(), strict=True)
            ]

    def rows_in_steps(self, block: _Block | slice, steps: slice | None = None) -> Tensor:
        """``(n, s, m)`` bool: is row i of the block in step s?"""
        rows, steps = (block.rows, block.steps) if isinstance(block, _Block) else (block, steps)
        row = self.row[rows]
        return (row >= self.starts[:, steps]) & (row < self.stops[:, steps])

    def q_rows(self, block: _Block) -> Tensor:
        """``(n, Hq, m, D)``: the block's queries in the accumulator's dtype."""
        return self.q[:, :, block.rows].to(self.keys.dtype)

    def token_words(self, num_words: int, dtype: torch.dtype) -> Tensor:
        """``(n, C, W)``: one-hot words of the key tokens, zero for padding."""
        word = torch.arange(num_words, device=self.tokens.device)
        return (self.word_of_token[..., None] == word).to(dtype)

    def tile(self) -> Tensor:
        """Memory for a block's weights."""
        size = self.size * self.q.shape[1] * self.block_rows * self.tokens.shape[1]
        return scratch("map tile", (size,), self.keys.dtype, self.keys.device)

    def slice_of(self, tensor: Tensor) -> Tensor:
        """This part's view of a ``(B, H, M, ...)`` tensor."""
        return tensor[self.sequences] if self.rows is None else tensor[:, :, self.rows]


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _parts(
    q: Tensor, k: Tensor, lse: Tensor, plan: PlanTensors, options: Options, cu_seqlens: Tensor | None
) -> Iterator[_Part]:
    """Few enough sequences at a time that MIN_ROWS rows of each fit a tile; packed sequences one by one."""
    N, C = plan.tokens.shape
    if _is_empty(q, plan):
        return
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        for n, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            if b > a:
                tensors = (t[:, :, a:b] for t in (q, k, lse))
                yield _Part(slice(n, n + 1), slice(a, b), *tensors, plan, options.scale)
        return
    size = max(1, TILE_ELEMENTS // (q.shape[1] * min(q.shape[2], MAX_ROWS) * C))
    for n in range(0, N, size):
        part = slice(n, min(n + size, N))
        yield _Part(part, None, q[part], k[part], lse[part], plan, options.scale)


def _blocks(part: _Part, options: Options) -> Iterator[_Block]:
    """Row blocks that hold a row of a step, with the steps and columns they touch."""
    M, C = part.length, part.tokens.shape[1]
    for start in range(0, M, part.block_rows):
        rows = slice(start, min(start + part.block_rows, M))
        if part.q.device.type != "cpu":
            yield _Block(rows, slice(0, C), slice(None), 0, options.window is not None)
            continue
        touched = [
            s for row in part.host_steps for s, (a, b) in enumerate(row) if max(a, rows.start) < min(b, rows.stop)
        ]
        low = 0 if options.window is None else rows.start - options.window + 1
        high = rows.stop if options.causal else M
        first = min(bisect.bisect_left(tokens, low) for tokens in part.host_tokens)
        last = max(bisect.bisect_left(tokens, high) for tokens in part.host_tokens)
        if not touched or first >= last:
            continue
        masked = last
        if options.causal:
            masked = max(first, min(bisect.bisect_right(tokens, rows.start) for tokens in part.host_tokens))
        windowed = options.window is not None and rows.stop - options.window > min(
            (tokens[first] for tokens in part.host_tokens if first < len(tokens)), default=M
        )
        yield _Block(rows, slice(first, last), slice(min(touched), max(touched) + 1), masked - first, windowed)


def _weights(part: _Part, block: _Block, options: Options, tile: Tensor) -> tuple[Tensor, Tensor | None]:
    """A block's attention weights ``(n, Hq, m, c)`` (in ``tile``'s memory) and, with a softcap, its tanh's slope."""
    q, keys = part.q_rows(block), part.keys[:, :, block.columns]
    shape = (*q.shape[:3], keys.shape[2])
    scores = tile[: math.prod(shape)].view(-1, *shape[2:])
    torch.bmm(q.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), out=scores)
    scores = scores.view(shape)
    slope = None
    if options.softcap is not None:
        scores.div_(options.softcap).tanh_()
        slope = 1 - scores.square()
        scores.mul_(options.softcap)
    scores.sub_(part.lse[:, :, block.rows, None])
    if block.masked == scores.shape[3] and not block.windowed:
        return scores.exp_(), slope
    # A hidden score may exceed its row's lse by anything: kept from overflowing, it is 0 after the product.
    weights = scores.clamp_max_(LARGEST_EXPONENT[scores.dtype]).exp_()
    first = 0 if block.windowed else block.masked
    row = part.row[block.rows, None]
    column = part.tokens[:, None, block.columns][..., first:]
    seen = column <= row if options.causal else torch.ones_like(column <= row)
    if block.windowed:
        seen &= column > row - options.window
    weights[..., first:].mul_(seen[:, None].to(weights.dtype))
    return weights, slope


def _bmm_into(target: Tensor, a: Tensor, b: Tensor, memory: Tensor, add: bool = False) -> None:
    """``target (n, H, i, j) = a @ b``, or ``+=``, of ``(n H, i, l)`` and ``(n H, l, j)``; ``memory`` if needed."""
    flat = target.flatten(0, 1) if target.is_contiguous() else memory[: target.numel()].view(-1, *target.shape[2:])
    if target.is_contiguous() and add:
        flat.baddbmm_(a, b)
        return
    torch.bmm(a, b, out=flat)
    if not target.is_contiguous():
        flat = flat.view(target.shape)
        target.add_(flat) if add else target.copy_(flat)


def _is_empty(q: Tensor, plan: PlanTensors) -> bool:
    """No row, key token, step or word anywhere: the map is zero and so is its gradient."""
    return 0 in (*q.shape, *plan.steps.shape[:2], plan.tokens.shape[1], plan.num_words)
