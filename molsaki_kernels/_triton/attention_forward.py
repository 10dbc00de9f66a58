"""Flash attention forward with the stepwise map in the same pass over q.

    q (B, Hq, M, D), k and v (B, Hkv, M, D), out (B, Hq, M, D), lse (B, Hq, M) float32 natural log
    S = scale q k^T (softcapped);  P = softmax over the visible keys and the sink;  out = P v

A program owns one tile of rows of one head and loops over the key tiles with the online softmax. Then lse is known and
q is still on the chip, so the program computes the weights of the key tokens, ``P^T [BC, BM]``, sums them over the rows
of each step, and writes one float32 per (step in the tile, key token). :mod:`map_forward` describes the layout of these
partial sums and adds them up.

Key tiles that are visible to every row take the same loop body without a mask.
"""

from __future__ import annotations

import torch
import triton.language as tl

from molsaki_kernels._triton import configs
from molsaki_kernels._triton.decorators import jit, kernel
from molsaki_kernels._triton.map_forward import map_forward, new_maps, reduce_partials
from molsaki_kernels._triton.tiles import (
    LOG2E,
    capped,
    columns_in,
    divide,
    dot,
    exp,
    is_visible,
    key_range,
    load_rows,
    locate,
    score_factors,
    score_flags,
    step_of,
    step_sums,
    steps_in,
    store_rows,
)
from molsaki_kernels._triton.variants import Variant, cases
from molsaki_kernels.spec import AttentionInputs, AttentionOptions, AttentionOutputs, MapInputs, PlanTensors


@jit
def attend(
    b_q, acc, row_max, row_sum, p_k, p_v, stride_km, stride_vm, rows, lo, hi, length, factor, inner, window,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax over the keys ``[lo, hi)``: ``acc [BM, BD]``, and running maximum and sum ``[BM]``.

    The maximum and ``factor`` are in log2 units, unless EXACT: then both are natural (see ``tiles.weights``).
    """
    EXACT: tl.constexpr = b_q.dtype == tl.float32
    p_k += lo.to(tl.int64) * stride_km
    p_v += lo.to(tl.int64) * stride_vm
    for n0 in tl.range(lo, hi, BN):
        columns = n0 + tl.arange(0, BN)
        b_k = load_rows(p_k, columns, length, D, BD, MASK)  # [BN, BD]
        t = capped(dot(b_q, tl.trans(b_k), None, PRECISION), inner, HAS_SOFTCAP)  # [BM, BN]
        if MASK:
            visible = is_visible(rows[:, None], columns[None, :], window, CAUSAL, HAS_WINDOW)
            visible = visible & (columns < length)[None, :]
            t = tl.where(visible, t, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(t, 1) * factor)
        shift = new_max
        if MASK:
            # For a row without a visible key so far, exp2(-inf - 0) is 0, as it should be.
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = t * factor - shift[:, None]
        decay = row_max - shift
        p = exp(p) if EXACT else tl.exp2(p)
        decay = exp(decay) if EXACT else tl.exp2(decay)
        row_sum = row_sum * decay + tl.sum(p, 1)
        b_v = load_rows(p_v, columns, length, D, BD, MASK)  # [BN, BD]
        acc = dot(p.to(b_v.dtype), b_v, acc * decay[:, None], PRECISION)
        row_max = new_max
        p_k += tl.cast(stride_km, tl.int64) * BN
        p_v += tl.cast(stride_vm, tl.int64) * BN
    return acc, row_max, row_sum


@kernel
def flash_forward_kernel(
    q,  # (B, Hq, M, D)
    k,  # (B, Hkv, M, D)
    v,  # (B, Hkv, M, D)
    out,  # (B, Hq, M, D)
    lse,  # (B, Hq, M) float32
    sinks,  # (Hq,) or None
    cu_seqlens,  # (N + 1,) or None
    steps,  # (N, S, 2) or None
    tokens,  # (N, C) or None
    words,  # (N, C) or None
    partial,  # (Hq, num_slots, C) float32 or None
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_km, stride_vb, stride_vh, stride_vm,
    stride_ob, stride_oh, stride_om,
    factor, inner, window, M, N, S, C, num_slots, group_size,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    PACKED: tl.constexpr, HAS_MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # With CAUSAL the last tiles have the most keys. They start first, so that short ones run at the end.
    i_g = tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    i_h = tl.program_id(1)
    i_kv = i_h // group_size
    i_n, i_b, i_t, bos, length = locate(i_g, cu_seqlens, M, N, BM, PACKED)
    m0 = i_t * BM
    if m0 >= length:
        return

    rows = m0 + tl.arange(0, BM)
    d = tl.arange(0, BD)
    keys = tl.arange(0, BN).to(tl.int64)[:, None]
    offset = (bos + rows).to(tl.int64)[:, None]
    p_q = q + i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh + offset * stride_qm + d[None, :]
    p_k = k + i_b.to(tl.int64) * stride_kb + i_kv.to(tl.int64) * stride_kh + bos.to(tl.int64) * stride_km
    p_v = v + i_b.to(tl.int64) * stride_vb + i_kv.to(tl.int64) * stride_vh + bos.to(tl.int64) * stride_vm
    b_q = load_rows(p_q, rows, length, D, BD, True)

    unit = 1.0 if q.dtype.element_ty == tl.float32 else LOG2E
    acc = tl.zeros([BM, BD], tl.float32)
    row_max = tl.full([BM], float("-inf"), tl.float32)
    row_sum = tl.zeros([BM], tl.float32)
    if HAS_SINKS:
        row_max = tl.zeros([BM], tl.float32) + tl.load(sinks + i_h).to(tl.float32) * unit
        row_sum += 1.0
    lo, a, b, hi = key_range(m0, length, window, BM, BN, CAUSAL, HAS_WINDOW)
    p_kt = p_k + keys * stride_km + d[None, :]
    p_vt = p_v + keys * stride_vm + d[None, :]
    if HAS_WINDOW:
        acc, row_max, row_sum = attend(
            b_q, acc, row_max, row_sum, p_kt, p_vt, stride_km, stride_vm, rows, lo, a, length, factor * unit, inner,
            window, D, BD, BN, True, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
    acc, row_max, row_sum = attend(
        b_q, acc, row_max, row_sum, p_kt, p_vt, stride_km, stride_vm, rows, a, b, length, factor * unit, inner, window,
        D, BD, BN, False, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PRECISION,
    )  # fmt: skip
    acc, row_max, row_sum = attend(
        b_q, acc, row_max, row_sum, p_kt, p_vt, stride_km, stride_vm, rows, b, hi, length, factor * unit, inner, window,
        D, BD, BN, True, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PRECISION,
    )  # fmt: skip

    # Rows past the end get lse = inf, so that their weights in the sums per step are 0.
    if q.dtype.element_ty == tl.float32:  # rounded once, since an error of lse is an error of every backward weight
        b_lse = (row_max.to(tl.float64) + tl.log(row_sum.to(tl.float64))).to(tl.float32)
    else:
        b_lse = row_max / unit + tl.log(row_sum)
    b_lse = tl.where(rows < length, b_lse, float("inf"))
    p_out = out + i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh + offset * stride_om + d[None, :]
    store_rows(p_out, divide(acc, row_sum[:, None]), rows, length, D, BD)
    p_lse = lse + (i_b.to(tl.int64) * tl.num_programs(1) + i_h) * M + bos + rows
    tl.store(p_lse, b_lse, mask=rows < length)

    if HAS_MAP:
        steps += i_n.to(tl.int64) * S * 2
        tokens += i_n.to(tl.int64) * C
        words += i_n.to(tl.int64) * C
        s_lo, s_hi = steps_in(steps, S, m0, tl.minimum(m0 + BM, length))
        if s_hi > 0:
            step = step_of(steps, S, rows, s_lo, s_hi, BS)
            first = tl.maximum(m0 - window + 1, 0) if HAS_WINDOW else m0 * 0
            last = tl.minimum(m0 + BM, length) - 1 if CAUSAL else length - 1
            c_lo, c_hi = columns_in(tokens, words, C, first, last)
            slot = i_h.to(tl.int64) * num_slots + i_g + i_n.to(tl.int64) * S
            step_sums(
                b_q, b_lse, step, rows, length, s_lo, s_hi, c_lo, c_hi, p_k, stride_km, tokens, words,
                partial + slot * C, C, factor, inner, window,
                D, BD, BC, BS, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PRECISION,
            )  # fmt: skip


def attention_forward(inputs: AttentionInputs, options: AttentionOptions, plan: PlanTensors) -> AttentionOutputs:
    """out ``(B, Hq, M, D)`` laid out as q, lse ``(B, Hq, M)`` float32 and the map ``(N, [Hq,] S, W)`` float32.

    Raises:
        ValueError: ``options.scale`` is not positive.
    """
    if options.scale <= 0:
        raise ValueError(f"scale: the triton engine expects a positive number, got {options.scale}")
    q, k, v, cu_seqlens = inputs.q, inputs.k, inputs.v, inputs.cu_seqlens
    B, Hq, M, D = q.shape
    sinks = None if inputs.sinks is None else inputs.sinks.contiguous()
    out = torch.empty_like(q)
    lse = q.new_empty((B, Hq, M), dtype=torch.float32)
    N, S = plan.steps.shape[:2]
    C = plan.tokens.shape[1]
    if 0 in (N, M):
        return AttentionOutputs(out, lse, new_maps(q, options, plan).zero_())
    config = configs.flash_forward(configs.arch_of(q), q.dtype, D, options.softcap is not None)
    tiles = configs.num_tiles(M, N, cu_seqlens is not None, config.rows)
    slots = tiles + N * S
    # The partial sums of all heads are in memory at once. Unless they are small compared to q, the map reads q again.
    fused = not plan.is_empty(q) and Hq * slots * C * 4 <= q.numel() * q.element_size()
    partial = q.new_empty((Hq, slots, C), dtype=torch.float32) if fused else None
    plan_tensors = (plan.steps, plan.tokens, plan.word_of_token) if fused else (None, None, None)
    factor, inner = score_factors(options.scale, options.softcap)
    with torch.cuda.device(q.get_device()):
        flash_forward_kernel[(tiles, Hq)](
            q, k, v, out, lse, sinks, cu_seqlens, *plan_tensors, partial,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            factor, inner, options.window or 0, M, N, S, C, slots, Hq // k.shape[1],
            BM=config.rows, BN=config.columns, BC=config.key_columns, BS=configs.STEP_BLOCK,
            HAS_SINKS=sinks is not None, HAS_MAP=fused, **score_flags(q, options, cu_seqlens),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    map_inputs = MapInputs(q, k, lse, cu_seqlens)
    if partial is None:
        return AttentionOutputs(out, lse, map_forward(map_inputs, options, plan))
    return AttentionOutputs(out, lse, reduce_partials(partial, map_inputs, options, plan, config.rows))


def variants(arch: str) -> list[Variant]:
    """The variants that :mod:`molsaki_kernels.aot` compiles."""
    found = []
    for case in cases():
        if not case.per_head:
            tile = configs.flash_forward(arch, case.dtype, case.head_dim, case.softcap)
            flags = dict(BM=tile.rows, BN=tile.columns, BC=tile.key_columns, BS=configs.STEP_BLOCK)
            flags |= dict(HAS_SINKS=case.sinks, HAS_MAP=case.has_map)
            found.append(case.variant(f"flash_forward-{case.name}", flash_forward_kernel, tile, flags))
    return found
