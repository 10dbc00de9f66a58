"""Flash attention backward with the stepwise map's gradient in the same passes.

    D[i]      = sum_d dO[i, d] O[i, d]                           (B, Hq, M)
    g[i, j]   = dA[step(i), word(j)] / Hq on key columns, else 0
    dlse[i]   = - sum_j P[i, j] g[i, j]  + the incoming dlse[i]
    delta[i]  = D[i] - dlse[i]
    dS[i, j]  = P[i, j] (dP[i, j] - delta[i] + g[i, j]),         dP = dO v^T
    dq        = scale dS k,   dk = scale dS^T q,   dv = P^T dO
    dsink[h]  = - sum_i exp(sink - lse_i) delta_i

No two programs write to the same address, and there are no atomics:

1. :func:`flash_dq_kernel`: a program owns a tile of rows of one head. It loops over the key tokens first, which gives
   their part of dq and dlse, hence delta, and then over the keys. It stores delta and the step of each row for the
   other kernels.
2. :func:`map_backward.map_dk_kernel`: the key tokens' part of dk, one part per split of the rows.
3. :func:`flash_dkv_kernel`: a program owns a tile of keys of one key head and loops over the rows of every query head
   of its group. At the end it adds the splits of step 2 at the key tokens that lie in its tile.
"""

from __future__ import annotations

import torch
import triton.language as tl

from molsaki_kernels._triton import configs
from molsaki_kernels._triton.decorators import jit, kernel
from molsaki_kernels._triton.map_backward import dk_partials
from molsaki_kernels._triton.tiles import (
    capped,
    column_gradient,
    columns_in,
    dot,
    is_visible,
    key_range,
    load_columns,
    load_rows,
    locate,
    query_range,
    score_factors,
    score_flags,
    step_of,
    steps_in,
    store_rows,
    weights,
)
from molsaki_kernels._triton.variants import Variant, cases
from molsaki_kernels.spec import (
    AttentionInputs,
    AttentionOptions,
    AttentionOutputs,
    InputGradients,
    MapInputs,
    OutputGradients,
    PlanTensors,
)


@jit
def stream_keys(
    b_q, b_do, lse, delta, dq, p_k, p_v, stride_km, stride_vm, rows, lo, hi, length, factor, inner, window,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dq [BM, BD]`` plus the part of the keys ``[lo, hi)``, without the scale."""
    p_k += lo.to(tl.int64) * stride_km
    p_v += lo.to(tl.int64) * stride_vm
    for n0 in tl.range(lo, hi, BN):
        columns = n0 + tl.arange(0, BN)
        b_k = load_rows(p_k, columns, length, D, BD, MASK)  # [BN, BD]
        b_v = load_rows(p_v, columns, length, D, BD, MASK)
        t = capped(dot(b_q, tl.trans(b_k), None, PRECISION), inner, HAS_SOFTCAP)  # [BM, BN]
        visible = None
        if MASK:
            visible = is_visible(rows[:, None], columns[None, :], window, CAUSAL, HAS_WINDOW)
            visible = visible & (columns < length)[None, :]
        p = weights(t, lse[:, None], factor, visible, b_q.dtype == tl.float32)
        ds = p * (dot(b_do, tl.trans(b_v), None, PRECISION) - delta[:, None])  # [BM, BN]
        if HAS_SOFTCAP:
            ds *= 1.0 - t * t
        dq = dot(ds.to(b_k.dtype), b_k, dq, PRECISION)
        p_k += tl.cast(stride_km, tl.int64) * BN
        p_v += tl.cast(stride_vm, tl.int64) * BN
    return dq


@kernel
def flash_dq_kernel(
    q,  # (B, Hq, M, D)
    k,  # (B, Hkv, M, D)
    v,  # (B, Hkv, M, D)
    out,  # (B, Hq, M, D)
    dout,  # (B, Hq, M, D)
    lse,  # (B, Hq, M) float32
    dlse,  # (B, Hq, M) float32 or None, added to the map's dlse
    delta,  # (B, Hq, M) float32
    dq,  # (B, Hq, M, D)
    sinks,  # (Hq,) or None
    dsinks,  # (Hq, tiles) float64 or None
    cu_seqlens,  # (N + 1,) or None
    dmaps,  # (N, S, W) or, PER_HEAD, (N, Hq, S, W) float32, or None
    steps,  # (N, S, 2) or None
    tokens,  # (N, C) or None
    words,  # (N, C) or None
    step_of_row,  # (B, M) int32 or None
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_km, stride_vb, stride_vh, stride_vm,
    stride_ob, stride_oh, stride_om, stride_dob, stride_doh, stride_dom, stride_dqb, stride_dqh, stride_dqm,
    scale, factor, inner, weight, window, M, N, S, C, W, group_size,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    PACKED: tl.constexpr, HAS_MAP: tl.constexpr, PER_HEAD: tl.constexpr, HAS_DLSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    i_g = tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    i_h = tl.program_id(1)
    heads = tl.num_programs(1)
    i_kv = i_h // group_size
    i_n, i_b, i_t, bos, length = locate(i_g, cu_seqlens, M, N, BM, PACKED)
    m0 = i_t * BM
    if m0 >= length:
        return

    rows = m0 + tl.arange(0, BM)
    d = tl.arange(0, BD)
    offset = (bos + rows).to(tl.int64)[:, None]
    p_q = q + i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh + offset * stride_qm + d[None, :]
    p_o = out + i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh + offset * stride_om + d[None, :]
    p_do = dout + i_b.to(tl.int64) * stride_dob + i_h.to(tl.int64) * stride_doh + offset * stride_dom + d[None, :]
    p_k = k + i_b.to(tl.int64) * stride_kb + i_kv.to(tl.int64) * stride_kh + bos.to(tl.int64) * stride_km
    p_v = v + i_b.to(tl.int64) * stride_vb + i_kv.to(tl.int64) * stride_vh + bos.to(tl.int64) * stride_vm
    p_row = (i_b.to(tl.int64) * heads + i_h) * M + bos + rows
    b_do = load_rows(p_do, rows, length, D, BD, True)
    # dsinks is a sum over all rows of terms of both signs. For float32 inputs it and its terms are computed in float64;
    # otherwise its relative error would exceed that of the terms.
    WIDE: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float32 else tl.float32
    b_delta = tl.sum(b_do.to(WIDE) * load_rows(p_o, rows, length, D, BD, True).to(WIDE), 1)  # [BM]
    b_q = load_rows(p_q, rows, length, D, BD, True)
    b_lse = tl.load(lse + p_row, mask=rows < length, other=float("inf"))
    b_dq = tl.zeros([BM, BD], tl.float32)

    if HAS_DLSE:
        b_delta -= tl.load(dlse + p_row, mask=rows < length, other=0.0)
    if HAS_MAP:
        steps += i_n.to(tl.int64) * S * 2
        tokens += i_n.to(tl.int64) * C
        words += i_n.to(tl.int64) * C
        s_lo, s_hi = steps_in(steps, S, m0, tl.minimum(m0 + BM, length))
        step = step_of(steps, S, rows, s_lo, s_hi, BS)
        if i_h == 0:
            tl.store(step_of_row + i_b.to(tl.int64) * M + bos + rows, step, mask=rows < length)
        first = tl.maximum(m0 - window + 1, 0) if HAS_WINDOW else m0 * 0
        last = tl.minimum(m0 + BM, length) - 1 if CAUSAL else length - 1
        c_lo, c_hi = columns_in(tokens, words, C, first, last)
        if s_hi == 0:
            c_hi = c_lo
        i_map = i_n.to(tl.int64) * heads + i_h if PER_HEAD else i_n.to(tl.int64)
        b_dq, b_dlse = column_gradient(
            b_q, b_lse, b_dq, step, rows, length, c_lo, c_hi, p_k, stride_km, tokens, words, dmaps + i_map * S * W, W,
            weight, factor, inner, window, D, BD, BM, BC, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
        b_delta -= b_dlse
    if HAS_SINKS:
        sink_weight = tl.exp(tl.load(sinks + i_h).to(WIDE) - b_lse.to(WIDE))  # [BM]
        tl.store(dsinks + i_h.to(tl.int64) * tl.num_programs(0) + i_g, -tl.sum(sink_weight * b_delta, 0))
    b_delta = b_delta.to(tl.float32)
    tl.store(delta + p_row, b_delta, mask=rows < length)

    lo, a, b, hi = key_range(m0, length, window, BM, BN, CAUSAL, HAS_WINDOW)
    keys = tl.arange(0, BN).to(tl.int64)[:, None]
    p_k += keys * stride_km + d[None, :]
    p_v += keys * stride_vm + d[None, :]
    if HAS_WINDOW:
        b_dq = stream_keys(
            b_q, b_do, b_lse, b_delta, b_dq, p_k, p_v, stride_km, stride_vm, rows, lo, a, length, factor, inner, window,
            D, BD, BN, True, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
    b_dq = stream_keys(
        b_q, b_do, b_lse, b_delta, b_dq, p_k, p_v, stride_km, stride_vm, rows, a, b, length, factor, inner, window,
        D, BD, BN, False, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PRECISION,
    )  # fmt: skip
    b_dq = stream_keys(
        b_q, b_do, b_lse, b_delta, b_dq, p_k, p_v, stride_km, stride_vm, rows, b, hi, length, factor, inner, window,
        D, BD, BN, True, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PRECISION,
    )  # fmt: skip
    p_dq = dq + i_b.to(tl.int64) * stride_dqb + i_h.to(tl.int64) * stride_dqh + offset * stride_dqm + d[None, :]
    store_rows(p_dq, b_dq * scale, rows, length, D, BD)


@jit
def stream_queries(
    k, v, dk, dv, q, dout, lse, delta, stride_km, stride_vm, stride_qh, stride_qm, stride_doh, stride_dom,
    n0, lo, hi, length, M, group_size, factor, inner, window,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dk`` (without the scale) and ``dv [BN, BD]`` plus the part of the rows ``[lo, hi)`` of the group's heads.

    The pointers are to the sequence's first row in the group's first head. Heads and tiles are one flat loop. k and v
    are read here, not in the caller, where they would occupy 64 registers per thread between the calls.
    """
    columns = n0 + tl.arange(0, BN)
    d = tl.arange(0, BD)
    k += columns.to(tl.int64)[:, None] * stride_km + d[None, :]
    v += columns.to(tl.int64)[:, None] * stride_vm + d[None, :]
    b_k = load_rows(k, columns, length, D, BD, True)  # [BN, BD]
    b_v = load_rows(v, columns, length, D, BD, True)
    q += tl.arange(0, BM).to(tl.int64)[:, None] * stride_qm + d[None, :]
    dout += tl.arange(0, BM).to(tl.int64)[:, None] * stride_dom + d[None, :]
    tiles = tl.cdiv(tl.maximum(hi - lo, 0), BM)
    for i in tl.range(0, tiles * group_size):
        i_h = tl.cast(i // tl.maximum(tiles, 1), tl.int64)
        m0 = lo + i % tl.maximum(tiles, 1) * BM
        rows = m0 + tl.arange(0, BM)
        b_q = load_rows(q + i_h * stride_qh + tl.cast(m0, tl.int64) * stride_qm, rows, length, D, BD, MASK)  # [BM, BD]
        b_do = load_rows(dout + i_h * stride_doh + tl.cast(m0, tl.int64) * stride_dom, rows, length, D, BD, MASK)
        i_row = i_h * M + rows
        if MASK:
            b_lse = tl.load(lse + i_row, mask=rows < length, other=float("inf"))
            b_delta = tl.load(delta + i_row, mask=rows < length, other=0.0)
        else:
            b_lse = tl.load(lse + i_row)
            b_delta = tl.load(delta + i_row)
        t = capped(dot(b_k, tl.trans(b_q), None, PRECISION), inner, HAS_SOFTCAP)  # [BN, BM]
        visible = None
        if MASK:
            visible = is_visible(rows[None, :], columns[:, None], window, CAUSAL, HAS_WINDOW)
        p = weights(t, b_lse[None, :], factor, visible, b_q.dtype == tl.float32)
        dv = dot(p.to(b_do.dtype), b_do, dv, PRECISION)
        ds = p * (dot(b_v, tl.trans(b_do), None, PRECISION) - b_delta[None, :])  # [BN, BM]
        if HAS_SOFTCAP:
            ds *= 1.0 - t * t
        dk = dot(ds.to(b_q.dtype), b_q, dk, PRECISION)
    return dk, dv


@kernel
def flash_dkv_kernel(
    q,  # (B, Hq, M, D)
    k,  # (B, Hkv, M, D)
    v,  # (B, Hkv, M, D)
    dout,  # (B, Hq, M, D)
    lse,  # (B, Hq, M) float32
    delta,  # (B, Hq, M) float32
    dk,  # (B, Hkv, M, D)
    dv,  # (B, Hkv, M, D)
    cu_seqlens,  # (N + 1,) or None
    tokens,  # (N, C) or None
    words,  # (N, C) or None
    partial,  # (splits, N, Hkv, C, D) float32 or None
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_km, stride_vb, stride_vh, stride_vm,
    stride_dob, stride_doh, stride_dom, stride_dkb, stride_dkh, stride_dkm, stride_dvb, stride_dvh, stride_dvm,
    scale, factor, inner, window, M, N, C, splits, group_size,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PACKED: tl.constexpr,
    HAS_MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_kv = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    heads = kv_heads * group_size
    i_n, i_b, i_t, bos, length = locate(tl.program_id(0), cu_seqlens, M, N, BN, PACKED)
    n0 = i_t * BN
    if n0 >= length:
        return

    h0 = i_kv * group_size
    p_q = q + i_b.to(tl.int64) * stride_qb + h0.to(tl.int64) * stride_qh + bos.to(tl.int64) * stride_qm
    p_do = dout + i_b.to(tl.int64) * stride_dob + h0.to(tl.int64) * stride_doh + bos.to(tl.int64) * stride_dom
    p_k = k + i_b.to(tl.int64) * stride_kb + i_kv.to(tl.int64) * stride_kh + bos.to(tl.int64) * stride_km
    p_v = v + i_b.to(tl.int64) * stride_vb + i_kv.to(tl.int64) * stride_vh + bos.to(tl.int64) * stride_vm
    i_row = (i_b.to(tl.int64) * heads + h0) * M + bos
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    lo, a, b, hi = query_range(n0, length, window, BM, BN, CAUSAL, HAS_WINDOW)
    if CAUSAL:
        b_dk, b_dv = stream_queries(
            p_k, p_v, b_dk, b_dv, p_q, p_do, lse + i_row, delta + i_row, stride_km, stride_vm, stride_qh, stride_qm,
            stride_doh, stride_dom, n0, lo, a, length, M, group_size, factor, inner, window,
            D, BD, BM, BN, True, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
    b_dk, b_dv = stream_queries(
        p_k, p_v, b_dk, b_dv, p_q, p_do, lse + i_row, delta + i_row, stride_km, stride_vm, stride_qh, stride_qm,
        stride_doh, stride_dom, n0, a, b, length, M, group_size, factor, inner, window,
        D, BD, BM, BN, False, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PRECISION,
    )  # fmt: skip
    b_dk, b_dv = stream_queries(
        p_k, p_v, b_dk, b_dv, p_q, p_do, lse + i_row, delta + i_row, stride_km, stride_vm, stride_qh, stride_qm,
        stride_doh, stride_dom, n0, b, hi, length, M, group_size, factor, inner, window,
        D, BD, BM, BN, True, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PRECISION,
    )  # fmt: skip

    columns = n0 + tl.arange(0, BN)
    d = tl.arange(0, BD)
    offset = (bos + columns).to(tl.int64)[:, None]
    p_dv = dv + i_b.to(tl.int64) * stride_dvb + i_kv.to(tl.int64) * stride_dvh + offset * stride_dvm + d[None, :]
    store_rows(p_dv, b_dv, columns, length, D, BD)
    if HAS_MAP:
        tokens += i_n.to(tl.int64) * C
        words += i_n.to(tl.int64) * C
        c_lo, c_hi = columns_in(tokens, words, C, n0, tl.minimum(n0 + BN, length) - 1)
        i_c = columns * 0 - 1  # [BN], the index of each column among the key tokens
        for c0 in tl.range(c_lo, c_hi, BC, num_stages=1):
            c = c0 + tl.arange(0, BC)
            token, word = load_columns(tokens, words, c, c_hi, length)
            here = (columns[:, None] == token[None, :]) & (word >= 0)[None, :]  # [BN, BC]
            i_c = tl.maximum(i_c, tl.max(tl.where(here, c[None, :], -1), 1))
        if c_hi > 0:
            for i_split in tl.range(0, splits, num_stages=1):
                i_split_row = ((i_split * N + i_n) * kv_heads + i_kv).to(tl.int64) * C + i_c
                mask = (i_c >= 0)[:, None] & (d < D)[None, :]
                b_dk += tl.load(partial + i_split_row[:, None] * D + d[None, :], mask=mask, other=0.0)
    p_dk = dk + i_b.to(tl.int64) * stride_dkb + i_kv.to(tl.int64) * stride_dkh + offset * stride_dkm + d[None, :]
    store_rows(p_dk, b_dk * scale, columns, length, D, BD)


def attention_backward(
    gradients: OutputGradients,
    inputs: AttentionInputs,
    outputs: AttentionOutputs,
    options: AttentionOptions,
    plan: PlanTensors,
) -> InputGradients:
    """The gradients of q, k, v in their dtypes and layouts, and of the sinks (None without sinks).

    Args:
        gradients: of out, lse and the map, any strides; None is zero.
        outputs: of :func:`attention_forward`; the map is not needed.
    """
    q, k, v, cu_seqlens = inputs.q, inputs.k, inputs.v, inputs.cu_seqlens
    B, Hq, M, D = q.shape
    Hkv = k.shape[1]
    N, S = plan.steps.shape[:2]
    C, W = plan.tokens.shape[1], plan.num_words
    sinks = None if inputs.sinks is None else inputs.sinks.contiguous()
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if 0 in (N, M):
        return InputGradients(dq, dk, dv, None if sinks is None else torch.zeros_like(sinks))
    out, lse = outputs.out, outputs.lse.contiguous()
    dout = q.new_zeros(D).expand(q.shape) if gradients.dout is None else gradients.dout
    if dout.stride(3) != 1:  # as the gradient of out.sum() is, for example
        dout = dout.contiguous()
    dlse = None if gradients.dlse is None else gradients.dlse.float().contiguous()
    has_map = gradients.dmaps is not None and not plan.is_empty(q)
    dmaps = gradients.dmaps.float().contiguous() if gradients.dmaps is not None and has_map else None
    plan_tensors = (plan.steps, plan.tokens, plan.word_of_token) if has_map else (None, None, None)
    per_head = has_map and options.per_head
    arch = configs.arch_of(q)
    delta = torch.empty_like(lse)
    step_of_row = q.new_empty((B, M), dtype=torch.int32) if has_map else None
    factor, inner = score_factors(options.scale, options.softcap)
    flags = {**score_flags(q, options, cu_seqlens), "HAS_MAP": has_map}
    window = options.window or 0

    config = configs.flash_dq(arch, q.dtype, D)
    tiles = configs.num_tiles(M, N, cu_seqlens is not None, config.rows)
    dsinks_of_tiles = None if sinks is None else q.new_zeros((Hq, tiles), dtype=torch.float64)
    with torch.cuda.device(q.get_device()):
        flash_dq_kernel[(tiles, Hq)](
            q, k, v, out, dout, lse, dlse, delta, dq, sinks, dsinks_of_tiles, cu_seqlens, dmaps, *plan_tensors,
            step_of_row,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *dout.stride()[:3], *dq.stride()[:3],
            options.scale, factor, inner, 1.0 if per_head else 1.0 / Hq, window, M, N, S, C, W, Hq // Hkv,
            BM=config.rows, BN=config.columns, BC=config.key_columns, BS=configs.STEP_BLOCK,
            HAS_SINKS=sinks is not None, PER_HEAD=per_head, HAS_DLSE=dlse is not None, **flags,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    partial = None
    if dmaps is not None and step_of_row is not None:
        partial = dk_partials(dmaps, MapInputs(q, k, lse, cu_seqlens), options, plan, step_of_row)
    config = configs.flash_dkv(arch, q.dtype, D)
    with torch.cuda.device(q.get_device()):
        flash_dkv_kernel[(configs.num_tiles(M, N, cu_seqlens is not None, config.rows), Hkv)](
            q, k, v, dout, lse, delta, dk, dv, cu_seqlens, *plan_tensors[1:], partial,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
            options.scale, factor, inner, window, M, N, C, 0 if partial is None else partial.shape[0], Hq // Hkv,
            BM=config.columns, BN=config.rows, BC=config.key_columns, **flags,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    if sinks is None or dsinks_of_tiles is None:
        return InputGradients(dq, dk, dv)
    return InputGradients(dq, dk, dv, dsinks_of_tiles.sum(1).to(sinks.dtype))


def variants(arch: str) -> list[Variant]:
    """The variants that :mod:`molsaki_kernels.aot` compiles."""
    found = []
    for case in cases():
        tile = configs.flash_dq(arch, case.dtype, case.head_dim)
        flags = dict(BM=tile.rows, BN=tile.columns, BC=tile.key_columns, BS=configs.STEP_BLOCK)
        flags |= dict(HAS_SINKS=case.sinks, HAS_MAP=case.has_map, PER_HEAD=case.per_head, HAS_DLSE=False)
        found.append(case.variant(f"flash_dq-{case.name}", flash_dq_kernel, tile, flags, absent=("dlse",)))
        if not (case.sinks or case.per_head):
            tile = configs.flash_dkv(arch, case.dtype, case.head_dim)
            flags = dict(BM=tile.columns, BN=tile.rows, BC=tile.key_columns, HAS_MAP=case.has_map)
            found.append(case.variant(f"flash_dkv-{case.name}", flash_dkv_kernel, tile, flags))
    return found
