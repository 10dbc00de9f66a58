"""The gradient of the stepwise map: dq, dk of the key tokens, dlse.

    g[i, c]   = dA[step(i), word(c)] / Hq        (dA[h, step(i), word(c)] for one map per head); 0 outside the steps
    dS[i, c]  = P[i, c] g[i, c]                  (times 1 - t^2 with a softcap, t the tanh)
    dlse[i]   = - sum_c P[i, c] g[i, c]          (B, Hq, M)
    dq[i]     = scale sum_c dS[i, c] k[token(c)]
    dk[token] = scale sum_{h, i} dS[i, c] q[i]   summed over the query heads h of the key head

:func:`map_dq_kernel`: a program owns one tile of rows of one head and loops over the key tokens visible to it.
:func:`map_dk_kernel`: a program owns one block of key tokens of one key head and loops over its split of the rows of
every head of the group. Few key tokens give few programs; therefore the rows are split, and each split writes its own
part of ``partial (splits, N, Hkv, C, D)`` float32.
:func:`map_dk_add_kernel`: sums the splits in order and adds the sum to dk in place. Tokens are unique, so no two
programs write the same row. If there is one split, :func:`map_dk_kernel` adds to dk itself.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from molsaki_kernels._triton import configs
from molsaki_kernels._triton.decorators import jit, kernel
from molsaki_kernels._triton.integers import cdiv, next_power_of_2
from molsaki_kernels._triton.tiles import (
    column_gradient,
    column_weights,
    columns_in,
    dot,
    gather_keys,
    load_columns,
    load_rows,
    locate,
    score_factors,
    score_flags,
    step_of,
    steps_in,
    store_rows,
)
from molsaki_kernels._triton.variants import Variant, cases, variant
from molsaki_kernels.spec import AttentionOptions, MapInputs, PlanTensors


@kernel
def map_dq_kernel(
    q,  # (B, Hq, M, D)
    k,  # (B, Hkv, M, D)
    lse,  # (B, Hq, M) float32
    dmaps,  # (N, S, W) or, PER_HEAD, (N, Hq, S, W) float32
    steps,  # (N, S, 2)
    tokens,  # (N, C)
    words,  # (N, C)
    dq,  # (B, Hq, M, D) or None: compute dlse only
    dlse,  # (B, Hq, M) float32
    step_of_row,  # (B, M) int32, for map_dk_kernel
    cu_seqlens,  # (N + 1,) or None
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_km, stride_dqb, stride_dqh, stride_dqm,
    scale, factor, inner, weight, window, M, N, S, C, W, heads, group_size,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PACKED: tl.constexpr,
    PER_HEAD: tl.constexpr, HAS_DQ: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_g = tl.program_id(0)
    i_h = tl.program_id(1)
    i_n, i_b, i_t, bos, length = locate(i_g, cu_seqlens, M, N, BM, PACKED)
    m0 = i_t * BM
    if m0 >= length:
        return
    rows = m0 + tl.arange(0, BM)
    d = tl.arange(0, BD)
    steps += i_n.to(tl.int64) * S * 2
    s_lo, s_hi = steps_in(steps, S, m0, tl.minimum(m0 + BM, length))
    step = step_of(steps, S, rows, s_lo, s_hi, BS)
    if i_h == 0:
        tl.store(step_of_row + i_b.to(tl.int64) * M + bos + rows, step, mask=rows < length)

    tokens += i_n.to(tl.int64) * C
    words += i_n.to(tl.int64) * C
    first = tl.maximum(m0 - window + 1, 0) if HAS_WINDOW else m0 * 0
    last = tl.minimum(m0 + BM, length) - 1 if CAUSAL else length - 1
    c_lo, c_hi = columns_in(tokens, words, C, first, last)
    if s_hi == 0:
        c_hi = c_lo
    if PER_HEAD:
        dmaps += (i_n.to(tl.int64) * heads + i_h) * S * W
    else:
        dmaps += i_n.to(tl.int64) * S * W

    b_dq = tl.zeros([BM, BD], tl.float32)
    p_lse = (i_b.to(tl.int64) * heads + i_h) * M + bos + rows
    offset = (bos + rows).to(tl.int64)[:, None]
    if c_hi <= c_lo:
        # No row of the tile is in a step, or no key token is visible: mostly padding. Nothing is read.
        tl.store(dlse + p_lse, tl.zeros([BM], tl.float32), mask=rows < length)
        if HAS_DQ and not ACCUMULATE:
            p_dq = dq + i_b.to(tl.int64) * stride_dqb + i_h.to(tl.int64) * stride_dqh + offset * stride_dqm + d[None, :]
            store_rows(p_dq, b_dq, rows, length, D, BD)
        return
    b_lse = tl.load(lse + p_lse, mask=rows < length, other=float("inf"))
    p_q = q + i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh + offset * stride_qm + d[None, :]
    p_k = k + i_b.to(tl.int64) * stride_kb + (i_h // group_size).to(tl.int64) * stride_kh + bos.to(tl.int64) * stride_km
    b_q = load_rows(p_q, rows, length, D, BD, True)
    b_dq, b_dlse = column_gradient(
        b_q, b_lse, b_dq, step, rows, length, c_lo, c_hi, p_k, stride_km, tokens, words, dmaps, W, weight,
        factor, inner, window, D, BD, BM, BC, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PRECISION,
    )  # fmt: skip
    tl.store(dlse + p_lse, b_dlse, mask=rows < length)
    if HAS_DQ:
        p_dq = dq + i_b.to(tl.int64) * stride_dqb + i_h.to(tl.int64) * stride_dqh + offset * stride_dqm + d[None, :]
        b_dq *= scale
        if ACCUMULATE:
            b_dq += load_rows(p_dq, rows, length, D, BD, True).to(tl.float32)
        store_rows(p_dq, b_dq, rows, length, D, BD)


@kernel
def map_dk_kernel(
    q,  # (B, Hq, M, D)
    k,  # (B, Hkv, M, D)
    lse,  # (B, Hq, M) float32
    dmaps,  # (N, S, W) or, PER_HEAD, (N, Hq, S, W) float32
    steps,  # (N, S, 2)
    tokens,  # (N, C)
    words,  # (N, C)
    step_of_row,  # (B, M) int32
    partial,  # (splits, N, Hkv, C, D) float32, without the scale; None if DIRECT
    dk,  # (B, Hkv, M, D), added to in place if DIRECT, else None
    cu_seqlens,  # (N + 1,) or None
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_km, stride_dkb, stride_dkh, stride_dkm,
    scale, factor, inner, weight, window, M, N, S, C, W, splits, heads, group_size,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PACKED: tl.constexpr,
    PER_HEAD: tl.constexpr, DIRECT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(C, BC)
    i_n = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    i_kv = tl.program_id(1)
    i_split = tl.program_id(2)
    i_b = i_n
    bos = i_n * 0
    length = bos + M
    if PACKED:
        i_b = i_n * 0
        bos = tl.load(cu_seqlens + i_n).to(tl.int32)
        length = tl.load(cu_seqlens + i_n + 1).to(tl.int32) - bos
    token, word = load_columns(tokens + i_n.to(tl.int64) * C, words + i_n.to(tl.int64) * C, c, C, length)

    # (tile, head) pairs with a row that is in a step and to which a key token of the block is visible, and this
    # program's share of them.
    steps += i_n.to(tl.int64) * S * 2
    s_lo, s_hi = steps_in(steps, S, 0, length)
    first = length
    last = bos * 0
    if s_hi > 0:
        first = tl.load(steps + 2 * s_lo).to(tl.int32)
        last = tl.minimum(tl.load(steps + 2 * s_hi - 1).to(tl.int32), length)
    if CAUSAL:
        first = tl.maximum(first, tl.min(tl.where(word >= 0, token, length), 0))
    if HAS_WINDOW:
        last = tl.minimum(last, tl.max(tl.where(word >= 0, token + window, 0), 0))
    lo = first // BM * group_size
    hi = tl.cdiv(last, BM) * group_size
    share = tl.cdiv(tl.maximum(hi - lo, 0), splits)
    lo += i_split * share
    hi = tl.minimum(lo + share, hi)

    d = tl.arange(0, BD)
    h0 = i_kv * group_size
    p_q = q + i_b.to(tl.int64) * stride_qb + bos.to(tl.int64) * stride_qm + d[None, :]
    p_k = k + i_b.to(tl.int64) * stride_kb + i_kv.to(tl.int64) * stride_kh + bos.to(tl.int64) * stride_km
    b_k = gather_keys(p_k, stride_km, token, word, D, BD)  # [BC, BD]
    p_step = step_of_row + i_b.to(tl.int64) * M + bos
    p_lse = lse + i_b.to(tl.int64) * heads * M + bos
    b_dk = tl.zeros([BC, BD], tl.float32)
    for i in tl.range(lo, hi):
        i_h = h0 + i % group_size
        rows = i // group_size * BM + tl.arange(0, BM)
        step = tl.load(p_step + rows, mask=rows < length, other=-1)
        b_lse = tl.load(p_lse + tl.cast(i_h, tl.int64) * M + rows, mask=rows < length, other=float("inf"))
        p_rows = p_q + tl.cast(i_h, tl.int64) * stride_qh + rows.to(tl.int64)[:, None] * stride_qm
        b_q = load_rows(p_rows, rows, length, D, BD, True)  # [BM, BD]
        p, t = column_weights(
            b_k, b_q, b_lse, token, word, rows, factor, inner, window, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PRECISION
        )  # [BC, BM]
        i_map = i_n.to(tl.int64) * heads + i_h if PER_HEAD else i_n.to(tl.int64)
        p_g = dmaps + (i_map * S + step)[None, :] * W + word[:, None]
        ds = p * tl.load(p_g, mask=(step >= 0)[None, :] & (word >= 0)[:, None], other=0.0) * weight
        if HAS_SOFTCAP:
            ds *= 1.0 - t * t
        b_dk = dot(ds.to(b_q.dtype), b_q, b_dk, PRECISION)
    if DIRECT:
        add_at_tokens(
            dk + i_b.to(tl.int64) * stride_dkb + i_kv.to(tl.int64) * stride_dkh, stride_dkm, bos, token, word, d,
            b_dk * scale, D,
        )  # fmt: skip
    else:
        i_row = ((i_split * N + i_n) * tl.num_programs(1) + i_kv).to(tl.int64) * C + c
        tl.store(partial + i_row[:, None] * D + d[None, :], b_dk, mask=(c < C)[:, None] & (d < D)[None, :])


@jit
def add_at_tokens(p_dk, stride_dkm, bos, token, word, d, b_dk, D: tl.constexpr):
    """Add ``b_dk [BC, BD]`` to the rows of the key tokens, in float32, and round once."""
    mask = (word >= 0)[:, None] & (d < D)[None, :]
    p_dk += (bos + token).to(tl.int64)[:, None] * stride_dkm + d[None, :]
    b_dk += tl.load(p_dk, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_dk, b_dk.to(p_dk.dtype.element_ty), mask=mask)


@kernel
def map_dk_add_kernel(
    partial,  # (splits, N, Hkv, C, D) float32
    tokens,  # (N, C)
    words,  # (N, C)
    dk,  # (B, Hkv, M, D), added to in place
    cu_seqlens,  # (N + 1,) or None
    stride_dkb, stride_dkh, stride_dkm,
    scale, M, N, C, splits,
    D: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(C, BC)
    i_n = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    i_kv = tl.program_id(1)
    i_b = i_n
    bos = i_n * 0
    length = bos + M
    if PACKED:
        i_b = i_n * 0
        bos = tl.load(cu_seqlens + i_n).to(tl.int32)
        length = tl.load(cu_seqlens + i_n + 1).to(tl.int32) - bos
    token, word = load_columns(tokens + i_n.to(tl.int64) * C, words + i_n.to(tl.int64) * C, c, C, length)

    d = tl.arange(0, BD)
    mask = (word >= 0)[:, None] & (d < D)[None, :]
    total = tl.zeros([BC, BD], tl.float32)
    for i_split in tl.range(0, splits):
        i_row = ((i_split * N + i_n) * tl.num_programs(1) + i_kv).to(tl.int64) * C + c
        total += tl.load(partial + i_row[:, None] * D + d[None, :], mask=mask, other=0.0)
    p_dk = dk + i_b.to(tl.int64) * stride_dkb + i_kv.to(tl.int64) * stride_dkh
    add_at_tokens(p_dk, stride_dkm, bos, token, word, d, total * scale, D)


def map_dlse(dmaps: Tensor, inputs: MapInputs, options: AttentionOptions, plan: PlanTensors) -> Tensor:
    """dlse ``(B, Hq, M)`` float32 alone, for engines that need it before their backward; see :func:`map_backward`."""
    dlse, _ = _row_gradients(dmaps, inputs, options, plan)
    return dlse


def map_backward(
    dmaps: Tensor,
    inputs: MapInputs,
    options: AttentionOptions,
    plan: PlanTensors,
    *,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dlse`` of the map alone; the effect of dlse on dq and dk is not included.

    Args:
        dmaps: ``(N, S, W)``, or ``(N, Hq, S, W)`` with ``options.per_head``.
        dq, dk: gradients shaped as q and k, to which the result is added in place: the sum is computed in float32 and
            rounded once. None: new tensors in the dtype and layout of q and k.
    """
    q, k, cu_seqlens = inputs.q, inputs.k, inputs.cu_seqlens
    add_dq = dq is not None
    dq = torch.empty_like(q) if dq is None else dq
    dk = torch.zeros_like(k) if dk is None else dk
    dlse, step_of_row = _row_gradients(dmaps, inputs, options, plan, dq, add_dq)
    partial = None
    if step_of_row is not None:
        partial = dk_partials(dmaps, inputs, options, plan, step_of_row, dk)
    if partial is not None:
        N, C = plan.tokens.shape
        D = q.shape[3]
        config = configs.map_dk_add(D)
        with torch.cuda.device(q.get_device()):
            map_dk_add_kernel[(N * cdiv(C, config.columns), k.shape[1])](
                partial, plan.tokens, plan.word_of_token, dk, cu_seqlens, *dk.stride()[:3],
                options.scale, k.shape[2], N, C, partial.shape[0],
                D=D, BD=next_power_of_2(D), BC=config.columns, PACKED=cu_seqlens is not None,
                num_warps=config.warps, num_stages=1,
            )  # fmt: skip
    return dq, dk, dlse


def _row_gradients(
    dmaps: Tensor,
    inputs: MapInputs,
    options: AttentionOptions,
    plan: PlanTensors,
    dq: Tensor | None = None,
    accumulate: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """dlse and ``step_of_row``, which is None for an empty plan; writes dq, or adds to it with ``accumulate``."""
    q, k, cu_seqlens = inputs.q, inputs.k, inputs.cu_seqlens
    B, Hq, M, D = q.shape
    if plan.is_empty(q):
        if dq is not None and not accumulate:
            dq.zero_()
        return q.new_zeros((B, Hq, M), dtype=torch.float32), None
    N, S = plan.steps.shape[:2]
    C, W = plan.tokens.shape[1], plan.num_words
    config = configs.map_dq(configs.arch_of(q), q.dtype, D)
    dlse = q.new_empty((B, Hq, M), dtype=torch.float32)
    step_of_row = q.new_empty((B, M), dtype=torch.int32)
    factor, inner = score_factors(options.scale, options.softcap)
    with torch.cuda.device(q.get_device()):
        map_dq_kernel[(configs.num_tiles(M, N, cu_seqlens is not None, config.rows), Hq)](
            q, k, inputs.lse.contiguous(), dmaps.float().contiguous(), plan.steps, plan.tokens, plan.word_of_token,
            dq, dlse, step_of_row, cu_seqlens,
            *q.stride()[:3], *k.stride()[:3], *(q if dq is None else dq).stride()[:3],
            options.scale, factor, inner, 1.0 if options.per_head else 1.0 / Hq, options.window or 0,
            M, N, S, C, W, Hq, Hq // k.shape[1],
            BM=config.rows, BC=config.columns, BS=configs.STEP_BLOCK, **score_flags(q, options, cu_seqlens),
            PER_HEAD=options.per_head, HAS_DQ=dq is not None, ACCUMULATE=accumulate,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return dlse, step_of_row


def dk_partials(
    dmaps: Tensor,
    inputs: MapInputs,
    options: AttentionOptions,
    plan: PlanTensors,
    step_of_row: Tensor,
    dk: Tensor | None = None,
) -> Tensor | None:
    """dk of the key tokens without the scale, one part per split of the rows: ``(splits, N, Hkv, C, D)`` float32.

    With one split and ``dk``, the result is added to ``dk`` instead and None is returned.
    """
    q, k, cu_seqlens = inputs.q, inputs.k, inputs.cu_seqlens
    Hq, M, D = q.shape[1:]
    Hkv = k.shape[1]
    N, S = plan.steps.shape[:2]
    C, W = plan.tokens.shape[1], plan.num_words
    arch = configs.arch_of(q)
    config = configs.map_dk(arch, q.dtype, D, C)
    blocks = cdiv(C, config.columns)
    splits = configs.row_splits(arch, N * blocks * Hkv, cdiv(M, config.rows) * (Hq // Hkv))
    target = dk if splits == 1 else None
    partial = q.new_empty((splits, N, Hkv, C, D), dtype=torch.float32) if target is None else None
    factor, inner = score_factors(options.scale, options.softcap)
    with torch.cuda.device(q.get_device()):
        map_dk_kernel[(N * blocks, Hkv, splits)](
            q, k, inputs.lse.contiguous(), dmaps.float().contiguous(), plan.steps, plan.tokens, plan.word_of_token,
            step_of_row, partial, target, cu_seqlens,
            *q.stride()[:3], *k.stride()[:3], *(k if target is None else target).stride()[:3],
            options.scale, factor, inner, 1.0 if options.per_head else 1.0 / Hq, options.window or 0,
            M, N, S, C, W, splits, Hq, Hq // Hkv,
            BM=config.rows, BC=config.columns, **score_flags(q, options, cu_seqlens),
            PER_HEAD=options.per_head, DIRECT=target is not None, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return partial


def variants(arch: str) -> list[Variant]:
    """The variants that :mod:`molsaki_kernels.aot` compiles."""
    found = []
    for case in cases():
        if not case.has_map or case.sinks:
            continue
        name, D = case.name, case.head_dim
        tile = configs.map_dq(arch, case.dtype, D)
        flags = dict(BM=tile.rows, BC=tile.columns, BS=configs.STEP_BLOCK, PER_HEAD=case.per_head)
        for kind, has_dq, accumulate in (("dq", True, False), ("dq_add", True, True), ("dlse", False, False)):
            if kind == "dq" or not case.feature:
                kind_flags = flags | dict(HAS_DQ=has_dq, ACCUMULATE=accumulate)
                absent = () if has_dq else ("dq",)
                wgmma = tile.rows >= 64
                found.append(
                    case.variant(
                        f"map_{kind}-{name}", map_dq_kernel, tile, kind_flags, absent=absent, wants_wgmma=wgmma
                    )
                )
        tile = configs.map_dk(arch, case.dtype, D, 256)
        flags = dict(BM=tile.rows, BC=tile.columns, PER_HEAD=case.per_head, DIRECT=False)
        found.append(case.variant(f"map_dk-{name}", map_dk_kernel, tile, flags, absent=("dk",)))
        if not case.feature:
            flags |= dict(DIRECT=True)
            found.append(case.variant(f"map_dk_direct-{name}", map_dk_kernel, tile, flags, absent=("partial",)))
        if not case.feature or name == "bf16-d128-packed":
            tile = configs.map_dk_add(D)
            flags = dict(BC=tile.columns, D=D, BD=next_power_of_2(D), PACKED=case.packed)
            none = () if case.packed else ("cu_seqlens",)
            found.append(variant(f"map_dk_add-{name}", map_dk_add_kernel, case.dtype, flags, absent=none))
    return found
