"""The stepwise map in PyTorch operations, forward and backward: every option and dtype, any device.

With P[i, j] = exp(s[i, j] - lse[i]) on the key columns j (s is the scaled, softcapped, masked score; Eq. 2 and 3):

    A[s, w]  = sum_{i in step s} sum_{j in word w} P[i, j]                     (N, S, W), the mean over heads
    dS[i, j] = P[i, j] dA[step(i), word(j)]                                    key columns only
    dq[i]    = scale sum_j dS[i, j] k[j]         dk[j] = scale sum_i dS[i, j] q[i]
    dlse[i]  = - sum_j dS[i, j]

(A softcap multiplies dS by 1 - tanh^2 before dq and dk.) Queries are processed in blocks small enough to stay in cache.
The columns of a block are restricted to those that one of its queries sees, so nothing of size M x C is allocated.
Tiles have the layout (columns, queries), because there are few columns and vectors along the queries are longer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molsaki_kernels._workspace import workspace
from molsaki_kernels.attention_map.protocol import MapGradient, both_phases
from molsaki_kernels.attention_map.torch_blocks import Block, BlockedSequences, blocked_sequences
from molsaki_kernels.spec import AttentionOptions, MapInputs, PlanTensors

NAME = "torch"
LARGEST_KEPT = 4 << 20  # elements of dS kept from the first phase of the gradient to the second (16 MiB in float32)
# Larger exponents could overflow to inf once summed over heads, and inf times a mask's 0 is NaN. Smaller ones soon give
# subnormal numbers, which take up to 30 times as long and add nothing to a sum.
EXPONENT_LIMIT = {torch.float32: 80.0, torch.float64: 700.0}


def why_not(q: Tensor, options: AttentionOptions) -> str | None:
    """Return None: every map can be computed."""
    return None


def forward(inputs: MapInputs, options: AttentionOptions, plan: PlanTensors) -> Tensor:
    """Compute the map, ``(N, S, W)`` or per head ``(N, Hq, S, W)``, float32 (float64 for float64 inputs)."""
    q = inputs.q
    N, S = plan.steps.shape[:2]
    heads = (q.shape[1],) if options.per_head else ()
    maps = torch.zeros(N, *heads, S, plan.num_words, dtype=_accumulator(q), device=q.device)
    if plan.is_empty(q):
        return maps
    for blocked in blocked_sequences(inputs, options, plan, maps.dtype):
        part = _Part(blocked, inputs, options)
        columns = maps.new_zeros(len(blocked), *heads, S, plan.tokens.shape[1])
        for block in blocked.blocks():
            weights, _ = part.weights(block, part.tile(block))
            in_step = block.in_step
            if options.per_head:
                in_step = in_step[:, None]
            else:
                weights = weights.sum(1)
            columns[..., block.steps, block.columns] += in_step @ weights.transpose(-1, -2)
        words = blocked.words[:, None] if options.per_head else blocked.words
        torch.matmul(columns, words, out=maps[blocked.sequences])
    return maps


class Gradient(MapGradient):
    """The map's gradient in two phases: dlse and dk of the key tokens first, dq in :meth:`add_to`.

    dS is kept for the second phase where it is small, and recomputed otherwise.

    Args:
        dmaps: ``(N, S, W)``, or ``(N, Hq, S, W)`` for per-head maps.

    Attributes:
        dlse: ``(B, Hq, M)`` float32 (float64 for float64 inputs).
    """

    def __init__(self, dmaps: Tensor, inputs: MapInputs, options: AttentionOptions, plan: PlanTensors):
        q = inputs.q
        self._plan, self._cu_seqlens = plan, inputs.cu_seqlens
        (N, C), (Hq, D), Hkv, dtype = plan.tokens.shape, q.shape[1::2], inputs.k.shape[1], _accumulator(q)
        self.dlse = torch.zeros(inputs.lse.shape, dtype=dtype, device=q.device)
        dk = workspace("map dk", (N, Hq, C, D), dtype, q.device).zero_()
        self._walk: list[tuple[_Part, Tensor, list[Tensor] | None]] = []  # with dS of each block, if it is kept
        if not plan.is_empty(q):
            dmaps = dmaps.to(dtype)
            covering = blocked_sequences(inputs, options, plan, dtype)
            size = Hq * sum(blocked.elements for blocked in covering)
            memory = workspace("map dS", (size,), dtype, q.device) if size <= LARGEST_KEPT else None
            for blocked in covering:
                words = blocked.words.transpose(1, 2)
                dcolumns = dmaps[blocked.sequences] @ (words[:, None] if options.per_head else words)  # (n, [Hq,] S, C)
                part, kept = _Part(blocked, inputs, options), []
                dlse, part_dk = blocked.view(self.dlse), dk[blocked.sequences]
                for block in blocked.blocks():
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
            part_dq = part.blocked.view(dq)
            for i, block in enumerate(part.blocked.blocks()):
                if kept is not None:
                    dscores = kept[i]
                else:
                    dscores, slope = part.dscores(block, dcolumns, part.tile(block))
                    dscores = dscores if slope is None else dscores.mul_(slope)
                part.add_dq(block, dscores, part_dq)
        _add_at_tokens(dk, self._dk, self._plan, self._cu_seqlens)


def backward(
    dmaps: Tensor, inputs: MapInputs, options: AttentionOptions, plan: PlanTensors
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dq, dk and dlse."""
    return both_phases(Gradient(dmaps, inputs, options, plan), inputs)


def _add_at_tokens(dk: Tensor, dk_tokens: Tensor, plan: PlanTensors, cu_seqlens: Tensor | None) -> None:
    """Add the key tokens' gradient ``(N, Hkv, C, D)`` into ``dk (B, Hkv, M, D)`` in place.

    Deterministic, because a token is in one word and padding adds zeros.
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
    """The queries, key tokens and lse of some sequences."""

    def __init__(self, blocked: BlockedSequences, inputs: MapInputs, options: AttentionOptions):
        self.blocked, self._softcap = blocked, options.softcap
        q, k, lse = (blocked.view(t) for t in (inputs.q, inputs.k, inputs.lse))
        dtype = blocked.words.dtype
        # A query in no step must add nothing, not even inf * 0: it may be padding, whose q and lse can hold any value.
        lse = lse.to(dtype) if blocked.outside is None else lse.to(dtype).masked_fill(blocked.outside, 0)
        self.q, self.lse = q, lse[:, :, None]
        keys = blocked.key_tokens(k).to(dtype).masked_fill_(blocked.no_token, 0).mul_(options.scale)
        groups = q.shape[1] // k.shape[1]
        self.keys = keys if groups == 1 else keys.repeat_interleave(groups, dim=1)  # (n, Hq, C, D), scaled

    def queries(self, block: Block) -> Tensor:
        """``(n, Hq, m, D)``: the block's queries in the accumulator's dtype."""
        q, outside = self.q[:, :, block.rows].to(self.keys.dtype), self.blocked.outside
        return q if outside is None else q.masked_fill(outside[..., block.rows, None], 0)

    def size(self, block: Block) -> int:
        """The number of weights of a block."""
        return self.q.shape[1] * block.elements

    def tile(self, block: Block) -> Tensor:
        """Memory for a block's weights, valid until the next block's."""
        largest = self.q.shape[1] * len(self.blocked) * self.blocked.block_rows * self.blocked.tokens.shape[1]
        return workspace("map tile", (largest,), self.keys.dtype, self.keys.device)[: self.size(block)]

    def weights(self, block: Block, tile: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the block's attention weights ``(n, Hq, c, m)`` in ``tile``'s memory and, with a softcap, the slope
        of its tanh. The weights of a query in no step are finite but otherwise undefined."""
        q, keys = self.queries(block), self.keys[:, :, block.columns]
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
        if block.hidden is not None:
            weights[..., block.masked :, :].masked_fill_(block.hidden, 0)
        return weights, slope

    def dscores(self, block: Block, dcolumns: Tensor, tile: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the block's ``dS`` before the softcap's slope, ``(n, Hq, c, m)`` in ``tile``'s memory, and the slope.

        Args:
            dcolumns: ``(n, [Hq,] S, C)``.
        """
        weights, slope = self.weights(block, tile)
        upstream, in_step = dcolumns[..., block.steps, block.columns].transpose(-1, -2), block.in_step
        upstream = upstream @ in_step[:, None] if dcolumns.dim() == 4 else (upstream @ in_step)[:, None]
        return weights.mul_(upstream), slope

    def add_dq(self, block: Block, dscores: Tensor, dq: Tensor) -> None:
        """Add the block's part to dq ``(n, Hq, M, D)``."""
        rows = self._product(dscores.flatten(0, 1).transpose(1, 2), self.keys[:, :, block.columns].flatten(0, 1))
        target = dq[:, :, block.rows]
        target += rows.view(target.shape)

    def add_dk(self, block: Block, dscores: Tensor, dk: Tensor) -> None:
        """Add the block's part, without the scale, to dk ``(n, Hq, C, D)``."""
        dscores, queries = dscores.flatten(0, 1), self.queries(block).flatten(0, 1)
        target = dk[:, :, block.columns]
        if target.is_contiguous():
            target.flatten(0, 1).baddbmm_(dscores, queries)
        else:
            target += self._product(dscores, queries).view(target.shape)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """``(b, i, l) @ (b, l, j)``, valid until the next call."""
        shape = (a.shape[0], a.shape[1], b.shape[2])
        return torch.bmm(a, b, out=workspace("map product", shape, a.dtype, a.device))


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
