"""The stepwise map from any attention: v gets one column per key word, and the map's gradient passes through them.

With E[j, w] = 1 where key token j is in word w, the attention of v' = [v, E] is O' = [O, O_E], and O_E[i, w] is the
mass that query i puts on word w. The map is a segmented sum of it, and the attention's own backward does the rest:

    A[s, w] = sum_{i in step s} O_E[i, w], the mean over heads            (MoLSAKI, arXiv 2604.15701, Eq. 2 and 3)
    dO'[i]  = [dO[i], dA[step(i)] / Hq],   0 for dA where query i is in no step
    dP'     = dO' v'^T = dO v^T + dA[step(i), word(j)] / Hq,   rowsum(dO' O') = rowsum(dO O) - dlse of the map

So there is no separate gradient of lse, no addition to dq and dk, and no second read of q. If an engine supports a v
wider than q and k (``takes_value_dim``), only v is widened; otherwise q and k are padded with zeros, which changes no
score. Words that do not fit beside v are computed by further calls whose v is E alone.

This module chooses the widths (:class:`Widths`), builds the columns (:class:`Columns`, once per plan) and implements
the segmented sum and its gradient. ``ops/attention.py`` combines them with an engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from molsaki_kernels._plan_cache import cached
from molsaki_kernels._triton.support import why_no_triton
from molsaki_kernels.attention.protocol import Engine, as_served
from molsaki_kernels.direct_call import runs_untraced
from molsaki_kernels.spec import AttentionInputs, AttentionRequest, PlanTensors
from molsaki_kernels.strides import empty_out, with_contiguous_head_dim

NAME = "widened"  # as a map engine
WIDEST = 256  # columns of v' at most, unless v alone has more: the most that flash attention takes
# Widths to try where the wanted one is refused. 248: sdpa and flash-attn 2 in float16; 128: flash-attn 4 after sm90.
NARROWER = (256, 248, 240, 192, 128, 96, 64)


@dataclasses.dataclass(frozen=True)
class Widths:
    """The columns of each call.

    Attributes:
        key_dim: of q and k, at least the head dimension; the rest is padding.
        groups: for each call the columns of v (all of v's in the first, 0 in further ones), the first word, the number
            of words, and the columns of v' (the rest is padding).
    """

    key_dim: int
    groups: tuple[tuple[int, int, int, int], ...]


def widths(engine: Engine, request: AttentionRequest, num_words: int) -> Widths:
    """Return the widths for an engine that serves ``request``: as few calls as :data:`WIDEST` allows."""
    D, Dv, W = request.head_dim, request.value_dim or request.head_dim, num_words
    for width in (_multiple(Dv + W, 8), _multiple(Dv + W, 16), *NARROWER):
        if width > WIDEST or width <= Dv:
            continue
        served = as_served(engine, dataclasses.replace(request, value_dim=None if width == D else width))
        if engine.why_not(served) is None:
            key_dim, width = served.head_dim, served.value_dim or served.head_dim
            break
    else:
        key_dim, width = D, Dv  # no free column
    first = min(W, width - Dv)
    groups = [(Dv, 0, first, width)]
    while first < W:
        count = min(W - first, width)
        groups.append((0, first, count, _last_width(engine, request, key_dim, count, width)))
        first += count
    return Widths(key_dim, tuple(groups))


def _last_width(engine: Engine, request: AttentionRequest, key_dim: int, count: int, width: int) -> int:
    """Return the columns of v' for ``count`` words alone, at most ``width``."""
    narrow = max(16, _multiple(count, 8))
    request = dataclasses.replace(request, head_dim=key_dim)
    return narrow if narrow < width and engine.takes_value_dim(request, narrow) else width


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of


@dataclasses.dataclass(frozen=True)
class Columns:
    """The further inputs of the calls, besides q, k and v; they depend only on the plan, the dtype and the widths.

    Attributes:
        pad: ``(1, 1, 1, key_dim - D)`` zeros. words: for each call ``(B, 1, M, columns)``, E and zeros.
        no_map: the plan for the engine, without steps and words.
    """

    pad: Tensor
    words: tuple[Tensor, ...]
    no_map: PlanTensors


def columns(inputs: AttentionInputs, plan: PlanTensors, chosen: Widths) -> Columns:
    """Return the columns for a call: the ones kept for this plan, unless the call is traced or captured."""
    q, cu_seqlens = inputs.q, inputs.cu_seqlens
    stream = 0
    if not runs_untraced(q, plan.tokens, cu_seqlens):
        return _columns(q, cu_seqlens, plan, chosen)
    if q.is_cuda:
        if torch.cuda.is_current_stream_capturing():  # a replay has to use the plan's values at that time
            return _columns(q, cu_seqlens, plan, chosen)
        stream = torch.cuda.current_stream(q.device).cuda_stream
    key = (NAME, q.shape[0], q.shape[2], q.shape[3], q.dtype, chosen, stream)

    def compute() -> Columns:
        with torch.inference_mode(False):  # a later call may need gradients
            return _columns(q, cu_seqlens, plan, chosen)

    return cached(plan, key, compute, cu_seqlens)


def _columns(q: Tensor, cu_seqlens: Tensor | None, plan: PlanTensors, chosen: Widths) -> Columns:
    B, M, D = q.shape[0], q.shape[2], q.shape[3]
    tokens, words = plan.tokens, plan.word_of_token
    if cu_seqlens is not None:
        tokens = (tokens + cu_seqlens[:-1, None]).view(1, -1)
        words = words.view(1, -1)
    # Padding tokens have word -1 and are written to an extra row, which is cut off.
    rows = torch.where(words >= 0, tokens, M)
    word_of_row = words.new_full((B, M + 1), -1).scatter_(1, rows, words)[:, :M, None]
    found = []
    for v_columns, first, count, width in chosen.groups:
        number = torch.arange(first, first + width - v_columns, device=q.device)
        hit = word_of_row == number
        if count < width - v_columns:  # the next group's words
            hit = hit & (number < first + count)
        found.append(hit[:, None].to(q.dtype))
    N = plan.tokens.shape[0]
    no_map = PlanTensors(plan.steps.new_empty(N, 0, 2), words.new_empty(N, 0), words.new_empty(N, 0), 0)
    return Columns(q.new_zeros(1, 1, 1, chosen.key_dim - D), tuple(found), no_map)


def calls(inputs: AttentionInputs, plan: PlanTensors, chosen: Widths) -> Iterator[tuple[AttentionInputs, PlanTensors]]:
    """Yield the inputs of each call and its plan without a map, differentiable in q, k and v."""
    extra = columns(inputs, plan, chosen)
    q, k, v = _appended(inputs.q, extra.pad), _appended(inputs.k, extra.pad), inputs.v
    for (v_columns, *_), words in zip(chosen.groups, extra.words, strict=True):
        if v_columns:
            wide = _appended(v, words)
        else:
            wide = words.expand(-1, v.shape[1], -1, -1).contiguous()
        yield dataclasses.replace(inputs, q=q, k=k, v=wide), extra.no_map


def _appended(x: Tensor, more: Tensor) -> Tensor:
    """Return ``x (B, H, M, D)`` with the columns of ``more`` after its own, in x's layout."""
    if more.shape[3] == 0:
        return x
    more = more.expand(*x.shape[:3], -1)
    if not x.is_contiguous() and x.transpose(1, 2).is_contiguous():
        return torch.cat([x.transpose(1, 2), more.transpose(1, 2)], 3).transpose(1, 2)
    return torch.cat([x, more], 3)


# Both directions of the segmented sum


def split(
    wide: Tensor,
    v_columns: int,
    num_words: int,
    cu_seqlens: Tensor | None,
    steps: Tensor,
    per_head: bool,
) -> tuple[Tensor, Tensor]:
    """Return out and the map of the output O' ``(B, Hq, M, columns)`` of one call.

    Args:
        v_columns: the columns of O, 0 where v' was E alone. num_words: the columns of O_E after them.
        steps: ``(N, S, 2)``, of a plan.

    Returns:
        O ``(B, Hq, M, v_columns)`` in the layout of ``wide``, and the map ``(N, [Hq,] S, num_words)`` in float32
        (float64 for float64), those columns of the plan's map that belong to these words.
    """
    out = empty_out(wide, wide[..., :v_columns]).copy_(wide[..., :v_columns])
    if _uses_kernels(wide):
        from molsaki_kernels._triton.widened_map import word_sums

        return out, word_sums(wide, v_columns, num_words, cu_seqlens, steps, per_head)
    dtype = torch.promote_types(wide.dtype, torch.float32)
    mass = wide[..., v_columns : v_columns + num_words]
    mass = mass.to(dtype) if per_head else mass.mean(1, dtype=dtype)  # (B, [Hq,] M, num_words)
    sums = []
    for rows, starts, stops in _segments(steps, cu_seqlens, wide):
        row = torch.arange(rows.stop - rows.start, device=wide.device)
        in_step = (row >= starts[..., None]) & (row < stops[..., None])  # (b, R, m)
        in_step = in_step[:, None] if per_head else in_step
        outside = ~in_step.any(-2)[..., None]  # a query in no step, whose masses may hold any value
        sums.append(in_step.to(dtype) @ mass[..., rows, :].masked_fill(outside, 0))
    if cu_seqlens is None:
        return out, sums[0]
    if per_head:  # (1, Hq, n S, num_words) each
        sums = [x[0].unflatten(1, (-1, steps.shape[1])).transpose(0, 1) for x in sums]
        return out, torch.cat(sums)
    return out, torch.cat([x[0].unflatten(0, (-1, steps.shape[1])) for x in sums])


def split_gradient(
    dout: Tensor | None,
    dmaps: Tensor | None,
    wide: Tensor,
    v_columns: int,
    cu_seqlens: Tensor | None,
    steps: Tensor,
    per_head: bool,
) -> Tensor:
    """Return dO' in the shape and layout of O' ``wide``, from the gradients of :func:`split`."""
    if dmaps is not None and _uses_kernels(wide):
        from molsaki_kernels._triton.widened_map import widened_dout

        dout = None if dout is None else with_contiguous_head_dim(dout)
        return widened_dout(dout, dmaps, wide, v_columns, cu_seqlens, steps, per_head)
    dwide = torch.empty_like(wide)
    if dout is None:
        dwide[..., :v_columns].zero_()
    else:
        dwide[..., :v_columns] = dout
    if dmaps is None:
        dwide[..., v_columns:].zero_()
        return dwide
    end = v_columns + dmaps.shape[-1]
    dwide[..., end:].zero_()
    dmaps = dmaps if per_head else (dmaps / wide.shape[1])[:, None]
    if cu_seqlens is not None:  # (1, [Hq,] N S, W)
        dmaps = dmaps.transpose(0, 1).flatten(1, 2)[None]
    nothing = dmaps.new_zeros(*dmaps.shape[:2], 1, dmaps.shape[3])
    per_row = torch.cat([dmaps, nothing], 2)  # the last row is that of a query in no step
    step = step_of_row(steps, cu_seqlens, wide)[:, None, :, None]
    dwide[..., v_columns:end] = per_row.take_along_dim(step, 2)
    return dwide


def _uses_kernels(wide: Tensor) -> bool:
    return wide.is_cuda and why_no_triton(wide.device, wide.dtype) is None


def step_of_row(steps: Tensor, cu_seqlens: Tensor | None, x: Tensor) -> Tensor:
    """Return ``(B, M)`` int64: the step of each query of ``x (B, H, M, D)``, or the number of steps if it is in none.

    Steps of packed sequences are numbered consecutively across sequences.
    """
    starts, stops = _flat_steps(steps, cu_seqlens)
    row = torch.arange(x.shape[2], device=x.device).expand(x.shape[0], -1).contiguous()
    # Steps ascend; the running maximum ensures this for empty steps and padding too.
    step = torch.searchsorted(stops.cummax(1).values, row, right=True)
    count = stops.shape[1]
    started = torch.cat([starts, starts.new_full((len(starts), 1), x.shape[2])], 1).gather(1, step) <= row
    return torch.where(started, step, count)


def _flat_steps(steps: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the first and the last row of each step and one more, each ``(B, S)``; packed ``(1, N S)``."""
    if cu_seqlens is not None:
        steps = (steps + cu_seqlens[:-1, None, None]).view(1, -1, 2)
    return steps[..., 0], steps[..., 1].contiguous()


def _segments(steps: Tensor, cu_seqlens: Tensor | None, x: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield rows and the starts and stops of the steps in them ``(b, R)``, counted from the first of these rows.

    Yields all rows at once, except for packed sequences on a CPU, whose bounds can be read at no cost: one by one.
    """
    if cu_seqlens is None or x.device.type != "cpu":
        starts, stops = _flat_steps(steps, cu_seqlens)
        yield slice(0, x.shape[2]), starts, stops
        return
    bounds = cu_seqlens.tolist()
    for n, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        yield slice(begin, end), steps[n : n + 1, :, 0], steps[n : n + 1, :, 1]
