"""Flash attention forward with the stepwise map in the same pass over q.

    q (B, Hq, M, D), k and v (B, Hkv, M, D), out (B, Hq, M, D), lse (B, Hq, M) float32 natural log
    S = scale q k^T (softcapped);  P = softmax over the visible keys and the sink;  out = P v

A program owns one tile of rows of one head. It streams key tiles past it with the online softmax; then lse is known
and q is still on the chip, so it makes the weights of the key tokens, ``P^T [BC, BM]``, sums the rows of each step, and
writes one float32 for each (step in the tile, key token). :mod:`map_forward` says how these are laid out and added up.

Key tiles every row sees wholly take the same loop body without a mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from molsaki_kernels._triton import configs
from molsaki_kernels._triton.map_forward import map_forward, new_maps, reduce_partials
from molsaki_kernels._triton.tiles import (
    LOG2E,
    RAGGED,
    capped,
    columns_in,
    dot,
    dot_precision,
    exp,
    key_range,
    load_rows,
    locate,
    score_factors,
    seen,
    step_of,
    step_sums,
    steps_in,
    store_rows,
)
from molsaki_kernels.spec import AttentionOptions, PlanTensors


@triton.jit
def attend(
    b_q, acc, top, total, p_k, p_v, stride_km, stride_vm, rows, lo, hi, length, factor, inner, window,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stream the keys ``[lo, hi)`` past the rows: ``acc [BM, BD]``, running maximum and sum ``[BM]``.

    The maximum is in log2 units and so is ``factor``, unless EXACT: then both are natural (see ``tiles.weights``).
    """
    EXACT: tl.constexpr = b_q.dtype == tl.float32
    p_k += lo.to(tl.int64) * stride_km
    p_v += lo.to(tl.int64) * stride_vm
    for n0 in tl.range(lo, hi, BN):
        columns = n0 + tl.arange(0, BN)
        b_k = load_rows(p_k, columns, length, D, BD, MASK)  # [BN, BD]
        t = capped(dot(b_q, tl.trans(b_k), None, PRECISION), inner, HAS_SOFTCAP)  # [BM, BN]
        if MASK:
            visible = seen(rows[:, None], columns[None, :], window, CAUSAL, HAS_WINDOW) & (columns < length)[None, :]
            t = tl.where(visible, t, float("-inf"))
        new_top = tl.maximum(top, tl.max(t, 1) * factor)
        shift = new_top
        if MASK:
            # A row that has seen no key yet: exp2(-inf - 0) is the zero it should be.
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = t * factor - shift[:, None]
        decay = top - shift
        p = exp(p) if EXACT else tl.exp2(p)
        decay = exp(decay) if EXACT else tl.exp2(decay)
        total = total * decay + tl.sum(p, 1)
        b_v = load_rows(p_v, columns, length, D, BD, MASK)  # [BN, BD]
        acc = dot(p.to(b_v.dtype), b_v, acc * decay[:, None], PRECISION)
        top = new_top
        p_k += tl.cast(stride_km, tl.int64) * BN
        p_v += tl.cast(stride_vm, tl.int64) * BN
    return acc, top, total


@triton.jit(do_not_specialize=RAGGED)
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
    # Under causality the last tiles have the most keys: they go first, so that the short ones fill the end.
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
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    if HAS_SINKS:
        top = tl.zeros([BM], tl.float32) + tl.load(sinks + i_h).to(tl.float32) * unit
        total += 1.0
    lo, a, b, hi = key_range(m0, length, window, BM, BN, CAUSAL, HAS_WINDOW)
    p_kt = p_k + keys * stride_km + d[None, :]
    p_vt = p_v + keys * stride_vm + d[None, :]
    if HAS_WINDOW:
        acc, top, total = attend(
            b_q, acc, top, total, p_kt, p_vt, stride_km, stride_vm, rows, lo, a, length, factor * unit, inner, window,
            D, BD, BN, True, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
    acc, top, total = attend(
        b_q, acc, top, total, p_kt, p_vt, stride_km, stride_vm, rows, a, b, length, factor * unit, inner, window,
        D, BD, BN, False, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PRECISION,
    )  # fmt: skip
    acc, top, total = attend(
        b_q, acc, top, total, p_kt, p_vt, stride_km, stride_vm, rows, b, hi, length, factor * unit, inner, window,
        D, BD, BN, True, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PRECISION,
    )  # fmt: skip

    # Rows past the end have no weights, and take no part in the sums of the steps.
    if q.dtype.element_ty == tl.float32:  # rounded once: every weight of the backward pass is off by what lse is off
        b_lse = (top.to(tl.float64) + tl.log(total.to(tl.float64))).to(tl.float32)
    else:
        b_lse = top / unit + tl.log(total)
    b_lse = tl.where(rows < length, b_lse, float("inf"))
    p_out = out + i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh + offset * stride_om + d[None, :]
    store_rows(p_out, acc / total[:, None], rows, length, D, BD)
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


def flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PlanTensors | None,
    options: AttentionOptions,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    per_head: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``out (B, Hq, M, D)`` laid out as q, ``lse (B, Hq, M)`` float32, map_forward's map (None without a plan).

    Args:
        q, k, v: any strides with a contiguous last dimension; packed ``(1, H, total, D)`` with ``cu_seqlens (N + 1,)``.
        options: ``options.scale`` must be positive.
        sinks: ``(Hq,)``.
    """
    if options.scale <= 0:
        raise ValueError(f"scale: the triton engine expects a positive number, got {options.scale}")
    B, Hq, M, D = q.shape
    sinks = None if sinks is None else sinks.contiguous()
    out = torch.empty_like(q)
    lse = q.new_empty((B, Hq, M), dtype=torch.float32)
    packed = cu_seqlens is not None
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    if 0 in (N, M):
        return out, lse, None if plan is None else new_maps(q, plan, per_head).zero_()
    S, C = (0, 0) if plan is None else (plan.steps.shape[1], plan.tokens.shape[1])
    config = configs.flash_forward(configs.arch_of(q), q.dtype, D, options.softcap is not None)
    tiles = configs.num_tiles(M, N, packed, config.rows)
    slots = tiles + N * S
    # The shares of all heads are in memory at once; where they would not be small beside q, the map reads q again.
    empty = plan is None or 0 in (S, C, plan.num_words)
    fused = not empty and Hq * slots * C * 4 <= q.numel() * q.element_size()
    partial = q.new_empty((Hq, slots, C), dtype=torch.float32) if fused else None
    factor, inner = score_factors(options.scale, options.softcap)
    with torch.cuda.device_of(q):
        flash_forward_kernel[(tiles, Hq)](
            q, k, v, out, lse, sinks, cu_seqlens,
            *((plan.steps, plan.tokens, plan.word_of_token) if fused else (None, None, None)), partial,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            factor, inner, options.window or 0, M, N, S, C, slots, Hq // k.shape[1],
            D=D, BD=triton.next_power_of_2(D), BM=config.rows, BN=config.columns,
            BC=config.key_columns, BS=configs.STEP_BLOCK,
            CAUSAL=options.causal, HAS_WINDOW=options.window is not None, HAS_SOFTCAP=options.softcap is not None,
            HAS_SINKS=sinks is not None, PACKED=packed, HAS_MAP=fused, PRECISION=dot_precision(q.dtype),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    if plan is None:
        return out, lse, None
    if fused:
        return out, lse, reduce_partials(partial, q, plan, options, cu_seqlens, per_head, config.rows)
    return out, lse, map_forward(q, k, lse, plan, options, cu_seqlens, per_head)


def variants(arch: str) -> list[configs.Variant]:
    """What :mod:`molsaki_kernels.aot` compiles."""
    found = []
    for name, dtype, D, on in configs.cases():
        if on["per_head"]:
            continue
        tile = configs.flash_forward(arch, dtype, D, on["softcap"])
        absent = (() if on["packed"] else ("cu_seqlens",)) + (() if on["sinks"] else ("sinks",))
        absent += () if on["map"] else ("steps", "tokens", "words", "partial")
        found.append(
            configs.variant(
                f"flash_forward-{name}", flash_forward_kernel, dtype, tile, dtype != torch.float32, absent,
                D=D, BD=triton.next_power_of_2(D), BM=tile.rows, BN=tile.columns,
                BC=tile.key_columns, BS=configs.STEP_BLOCK, CAUSAL=on["causal"], HAS_WINDOW=on["window"],
                HAS_SOFTCAP=on["softcap"], HAS_SINKS=on["sinks"], PACKED=on["packed"], HAS_MAP=on["map"],
                PRECISION="ieee",
            )
        )  # fmt: skip
    return found
