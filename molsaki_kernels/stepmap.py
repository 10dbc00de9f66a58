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

import math

import torch
from torch import Tensor

from .call import Options, PlanTensors
from .layout import Block, Layout, layouts
from .scratch import scratch

# exp of more could be inf once summed over heads, and inf times a mask's 0 is not 0; exp of less is soon no normal
# number, which costs up to 30 times as long and adds nothing to a sum.
EXPONENT_LIMIT = {torch.float32: 80.0, torch.float64: 700.0}


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
    if _is_empty(q, plan):
        return maps
    for layout in layouts(plan, q.shape[1:], maps.dtype, options, cu_seqlens, per_head):
        part = _Part(layout, q, k, lse, options)
        columns = maps.new_zeros(len(layout), *heads, S, plan.tokens.shape[1])
        for block in layout.blocks():
            weights, _ = part.weights(block)
            in_step = block.in_step
            if per_head:
                in_step = in_step[:, None]
            else:
                weights = weights.sum(1)
            columns[..., block.steps, block.columns] += in_step @ weights
        words = layout.words[:, None] if per_head else layout.words
        torch.matmul(columns, words, out=maps[layout.sequences])
    return maps


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
    Hq, D = q.shape[1], q.shape[3]
    N, C = plan.tokens.shape
    dtype = _accumulator(q)
    per_head = dmaps.dim() == 4
    dmaps = dmaps.to(dtype)
    dq = scratch("map dq", tuple(q.shape), dtype, q.device)
    dlse = torch.zeros(lse.shape, dtype=dtype, device=q.device)
    dk = torch.zeros(N, Hq, C, D, dtype=dtype, device=q.device)
    if _is_empty(q, plan):
        dq.zero_()
        return dq, _over_groups(dk, k), dlse
    for layout in layouts(plan, q.shape[1:], dtype, options, cu_seqlens, per_head):
        part = _Part(layout, q, k, lse, options)
        words = layout.words.transpose(1, 2)
        dcolumns = dmaps[layout.sequences] @ (words[:, None] if per_head else words)  # (n, [Hq,] S, C)
        part_dq, part_dlse, part_dk = layout.of(dq), layout.of(dlse), dk[layout.sequences]
        memory = scratch("map product", (len(layout) * Hq * max(layout.block_rows, C) * D,), dtype, q.device)
        done = 0
        for block in layout.blocks():
            if done < block.rows.start:
                part_dq[:, :, done : block.rows.start] = 0
            done = block.rows.stop
            weights, slope = part.weights(block)
            upstream, in_step = dcolumns[..., block.steps, block.columns], block.in_step.transpose(1, 2)
            upstream = in_step[:, None] @ upstream if per_head else (in_step @ upstream)[:, None]
            dscores = weights.mul_(upstream)  # (n, Hq, m, c)
            torch.sum(dscores, -1, out=part_dlse[:, :, block.rows])
            if slope is not None:
                dscores.mul_(slope)
            dscores = dscores.flatten(0, 1)
            keys, queries = (t.flatten(0, 1) for t in (part.keys[:, :, block.columns], part.q_rows(block)))
            _bmm_into(part_dq[:, :, block.rows], dscores, keys, memory)
            _bmm_into(part_dk[:, :, block.columns], dscores.transpose(1, 2), queries, memory, add=True)
        if done < part_dq.shape[2]:
            part_dq[:, :, done:] = 0
    return dq, _over_groups(dk.mul_(options.scale), k), dlse.neg_()


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


class _Part:
    """A layout's rows of q, k and lse."""

    def __init__(self, layout: Layout, q: Tensor, k: Tensor, lse: Tensor, options: Options):
        q, k, lse = (layout.of(t) for t in (q, k, lse))
        dtype = layout.words.dtype
        # A row in no step must not be able to add even inf * 0, whatever its lse: padding may hold anything.
        lse = lse.to(dtype) if layout.outside is None else lse.to(dtype).masked_fill(layout.outside, 0)
        self.q, self.lse = q, lse[..., None]
        keys = layout.key_rows(k).transpose(1, 2).to(dtype)
        keys = torch.mul(keys, options.scale, out=torch.empty(keys.shape, dtype=dtype, device=q.device))
        groups = q.shape[1] // k.shape[1]
        self.keys = keys if groups == 1 else keys.repeat_interleave(groups, dim=1)  # (n, Hq, C, D), scaled
        size = len(layout) * q.shape[1] * layout.block_rows * layout.tokens.shape[1]
        self._tile = scratch("map tile", (size,), dtype, q.device)
        self._softcap = options.softcap

    def q_rows(self, block: Block) -> Tensor:
        """``(n, Hq, m, D)``: the block's queries in the accumulator's dtype."""
        return self.q[:, :, block.rows].to(self.keys.dtype)

    def weights(self, block: Block) -> tuple[Tensor, Tensor | None]:
        """The block's attention weights ``(n, Hq, m, c)``, valid until the next call, and, with a softcap, its tanh's
        slope. Those of a row in no step are finite, no more."""
        q, keys = self.q_rows(block), self.keys[:, :, block.columns]
        shape = (*q.shape[:3], keys.shape[2])
        scores = self._tile[: math.prod(shape)].view(-1, *shape[2:])
        torch.bmm(q.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), out=scores)
        scores = scores.view(shape)
        slope = None
        if self._softcap is not None:
            scores.div_(self._softcap).tanh_()
            slope = 1 - scores.square()
            scores.mul_(self._softcap)
        limit = EXPONENT_LIMIT[scores.dtype]
        weights = scores.sub_(self.lse[:, :, block.rows]).clamp_(-limit, limit).exp_()
        if block.seen is not None:
            weights[..., block.masked :].mul_(block.seen)
        return weights, slope


def _over_groups(dk: Tensor, k: Tensor) -> Tensor:
    """The gradient of each query head's keys ``(N, Hq, C, D)``, added up to ``(N, Hkv, C, D)``."""
    N, Hq, C, D = dk.shape
    Hkv = k.shape[1]
    return dk if Hq == Hkv else dk.view(N, Hkv, Hq // Hkv, C, D).sum(2)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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
