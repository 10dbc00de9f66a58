"""The stepwise map in plain PyTorch, forward and backward (backend "torch").

With P[i, j] = exp(s[i, j] - lse[i]) on the key columns j (s the scaled, softcapped, masked score; Eq. 2 and 3):

    A[s, w]  = sum_{i in step s} sum_{j in word w} P[i, j]                     (N, S, W), the mean over heads
    dS[i, j] = P[i, j] dA[step(i), word(j)]                                     key columns only
    dq[i]    = scale sum_j dS[i, j] k[j]         dk[j] = scale sum_i dS[i, j] q[i]
    dlse[i]  = - sum_j dS[i, j]

(softcap multiplies dS by 1 - tanh^2 before dq and dk.) The rows are walked in blocks small enough to stay in cache;
a block's columns are cut to those that one of its rows can see. Nothing of size M x C reaches memory. Tiles are
laid out (columns, rows): the products are thin in the columns, and a vector of rows is the wider one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molsaki_kernels._workspace import scratch
from molsaki_kernels.attention_map.torch_blocks import Block, Layout, layouts
from molsaki_kernels.spec import AttentionOptions, PlanTensors

LARGEST_KEPT = 4 << 20  # numbers of dS kept from the first half of the gradient to the second (16 MiB in float32)
# exp of more could be inf once summed over heads, and inf times a mask's 0 is not 0; exp of less is soon no normal
# number, which costs up to 30 times as long and adds nothing to a sum.
EXPONENT_LIMIT = {torch.float32: 80.0, torch.float64: 700.0}


def forward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    plan: PlanTensors,
    options: AttentionOptions,
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
    if plan.is_empty(q):
        return maps
    for layout in layouts(plan, q.shape[1:], maps.dtype, options, cu_seqlens, per_head):
        part = _Part(layout, q, k, lse, options)
        columns = maps.new_zeros(len(layout), *heads, S, plan.tokens.shape[1])
        for block in layout.blocks():
            weights, _ = part.weights(block, part.tile(block))
            in_step = block.in_step
            if per_head:
                in_step = in_step[:, None]
            else:
                weights = weights.sum(1)
            columns[..., block.steps, block.columns] += in_step @ weights.transpose(-1, -2)
        words = layout.words[:, None] if per_head else layout.words
        torch.matmul(columns, words, out=maps[layout.sequences])
    return maps


class Gradient:
    """The map's gradient, in two halves: ``dlse`` and dk of the key tokens at once, dq when :meth:`add_to` is called.

    In between, the attention's own backward takes dlse. dS is kept for the second half where it is small, else made
    again.

    Args:
        dmaps: ``(N, S, W)``, or ``(N, Hq, S, W)`` for per-head maps. The rest as in :func:`forward`.

    Attributes:
        dlse: ``(B, Hq, M)`` float32 (float64 for float64 inputs).
    """

    def __init__(
        self,
        dmaps: Tensor,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        plan: PlanTensors,
        options: AttentionOptions,
        cu_seqlens: Tensor | None = None,
    ):
        self._plan, self._cu_seqlens = plan, cu_seqlens
        (N, C), (Hq, D), Hkv, dtype = plan.tokens.shape, q.shape[1::2], k.shape[1], _accumulator(q)
        self.dlse = torch.zeros(lse.shape, dtype=dtype, device=q.device)
        dk = scratch("map dk", (N, Hq, C, D), dtype, q.device).zero_()
        self._walk: list[tuple[_Part, Tensor, list[Tensor] | None]] = []  # with dS of each block, if it is kept
        if not plan.is_empty(q):
            per_head = dmaps.dim() == 4
            dmaps = dmaps.to(dtype)
            covering = layouts(plan, q.shape[1:], dtype, options, cu_seqlens, per_head)
            size = Hq * sum(layout.elements for layout in covering)
            memory = scratch("map dS", (size,), dtype, q.device) if size <= LARGEST_KEPT else None
            for layout in covering:
                words = layout.words.transpose(1, 2)
                dcolumns = dmaps[layout.sequences] @ (words[:, None] if per_head else words)  # (n, [Hq,] S, C)
                part, kept = _Part(layout, q, k, lse, options), []
                dlse, part_dk = layout.of(self.dlse), dk[layout.sequences]
                for block in layout.blocks():
                    tile = part.tile(block) if memory is None else memory[: part.size(block)]
                    dscores, slope = part.dscores(block, dcolumns, tile)
                    torch.sum(dscores, -2, out=dlse[:, :, block.rows])
                    dscores = dscores if slope is None else dscores.mul_(slope)
                    part.add_dk(block, dscores, part_dk)
                    if memory is not None:
                        kept.append(dscores)
                        memory = memory[part.size(block) :]
                self._walk.append((part, dcolumns, None if memory is None else kept))
        self.dlse.neg_()
        dk.mul_(options.scale)
        self._dk = dk if Hq == Hkv else dk.view(N, Hkv, Hq // Hkv, C, D).sum(2)

    def add_to(self, dq: Tensor, dk: Tensor) -> None:
        """Add to dq ``(B, Hq, M, D)`` and dk ``(B, Hkv, M, D)`` in place."""
        for part, dcolumns, kept in self._walk:
            part_dq = part.layout.of(dq)
            for i, block in enumerate(part.layout.blocks()):
                if kept is not None:
                    dscores = kept[i]
                else:
                    dscores, slope = part.dscores(block, dcolumns, part.tile(block))
                    dscores = dscores if slope is None else dscores.mul_(slope)
                part.add_dq(block, dscores, part_dq)
        _add_at_tokens(dk, self._dk, self._plan, self._cu_seqlens)


def _add_at_tokens(dk: Tensor, dk_tokens: Tensor, plan: PlanTensors, cu_seqlens: Tensor | None) -> None:
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


class _Part:
    """A layout's rows of q, k and lse."""

    def __init__(self, layout: Layout, q: Tensor, k: Tensor, lse: Tensor, options: AttentionOptions):
        self.layout, self._softcap = layout, options.softcap
        q, k, lse = (layout.of(t) for t in (q, k, lse))
        dtype = layout.words.dtype
        # A row in no step must not be able to add even inf * 0, whatever its lse: padding may hold anything.
        lse = lse.to(dtype) if layout.outside is None else lse.to(dtype).masked_fill(layout.outside, 0)
        self.q, self.lse = q, lse[:, :, None]
        keys = layout.key_rows(k).to(dtype).mul_(options.scale)
        groups = q.shape[1] // k.shape[1]
        self.keys = keys if groups == 1 else keys.repeat_interleave(groups, dim=1)  # (n, Hq, C, D), scaled

    def q_rows(self, block: Block) -> Tensor:
        """``(n, Hq, m, D)``: the block's queries in the accumulator's dtype."""
        return self.q[:, :, block.rows].to(self.keys.dtype)

    def size(self, block: Block) -> int:
        """How many weights a block has."""
        return self.q.shape[1] * block.elements

    def tile(self, block: Block) -> Tensor:
        """Memory for a block's weights, valid until the next block's."""
        largest = self.q.shape[1] * len(self.layout) * self.layout.block_rows * self.layout.tokens.shape[1]
        return scratch("map tile", (largest,), self.keys.dtype, self.keys.device)[: self.size(block)]

    def weights(self, block: Block, tile: Tensor) -> tuple[Tensor, Tensor | None]:
        """The block's attention weights ``(n, Hq, c, m)`` in ``tile``'s memory and, with a softcap, its tanh's slope.
        The weights of a row in no step are finite, no more."""
        q, keys = self.q_rows(block), self.keys[:, :, block.columns]
        scores = torch.bmm(
            keys.flatten(0, 1),
            q.flatten(0, 1).transpose(1, 2),
            out=tile.view(-1, keys.shape[2], q.shape[2]),
        )
        scores = scores.view(*q.shape[:2], keys.shape[2], q.shape[2])
        slope = None
        if self._softcap is not None:
            scores.div_(self._softcap).tanh_()
            slope = 1 - scores.square()
            scores.mul_(self._softcap)
        limit = EXPONENT_LIMIT[scores.dtype]
        weights = scores.sub_(self.lse[..., block.rows]).clamp_(-limit, limit).exp_()
        if block.seen is not None:
            weights[..., block.masked :, :].mul_(block.seen)
        return weights, slope

    def dscores(self, block: Block, dcolumns: Tensor, tile: Tensor) -> tuple[Tensor, Tensor | None]:
        """The block's ``dS`` before the softcap's slope, ``(n, Hq, c, m)`` in ``tile``'s memory, and that slope.
        ``dcolumns``: ``(n, [Hq,] S, C)``."""
        weights, slope = self.weights(block, tile)
        upstream, in_step = dcolumns[..., block.steps, block.columns].transpose(-1, -2), block.in_step
        upstream = upstream @ in_step[:, None] if dcolumns.dim() == 4 else (upstream @ in_step)[:, None]
        return weights.mul_(upstream), slope

    def add_dq(self, block: Block, dscores: Tensor, dq: Tensor) -> None:
        """Add the block's rows to dq ``(n, Hq, M, D)``."""
        rows = self._product(dscores.flatten(0, 1).transpose(1, 2), self.keys[:, :, block.columns].flatten(0, 1))
        target = dq[:, :, block.rows]
        target += rows.view(target.shape)

    def add_dk(self, block: Block, dscores: Tensor, dk: Tensor) -> None:
        """Add the block's columns, without the scale, to dk ``(n, Hq, C, D)``."""
        dscores, queries = dscores.flatten(0, 1), self.q_rows(block).flatten(0, 1)
        target = dk[:, :, block.columns]
        if target.is_contiguous():
            target.flatten(0, 1).baddbmm_(dscores, queries)
        else:
            target += self._product(dscores, queries).view(target.shape)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """``(b, i, l) @ (b, l, j)``, valid until the next call."""
        shape = (a.shape[0], a.shape[1], b.shape[2])
        return torch.bmm(a, b, out=scratch("map product", shape, a.dtype, a.device))


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
