"""The gradient of the stepwise map: dq, dk of the key tokens, dlse.

    g[i, c]   = dA[step(i), word(c)] / Hq        (dA[h, step(i), word(c)] for one map per head); 0 outside the steps
    dS[i, c]  = P[i, c] g[i, c]                  (times 1 - t^2 with a softcap, t the tanh)
    dlse[i]   = - sum_c P[i, c] g[i, c]          (B, Hq, M)
    dq[i]     = scale sum_c dS[i, c] k[token(c)]
    dk[token] = scale sum_{h, i} dS[i, c] q[i]   summed over the query heads h of the key head

:func:`map_dlse_kernel`: dlse alone, and O' and dO' with it folded into them (:mod:`lse_gradient`), before the
attention's own backward. A program owns one tile of rows. It loops over its heads where one block holds all key tokens,
and over the blocks of key tokens of one head otherwise. The addresses in either loop are known ahead, so that loads
overlap the products of the iteration before.
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
from molsaki_kernels._triton.lse_gradient import fold_dlse_into_out, fold_rows
from molsaki_kernels._triton.lse_gradient import tile as fold_tile
from molsaki_kernels._triton.plan_tables import PlanTables, load_keys, load_tile, plan_tables, tiles_of_keys
from molsaki_kernels._triton.tiles import (
    FAR,
    column_weights,
    dot,
    gather_keys,
    load_columns,
    load_rows,
    one_hot,
    score_factors,
    score_flags,
    store_rows,
    two_parts,
    weighted_upstream,
)
from molsaki_kernels._triton.variants import Variant, cases, variant
from molsaki_kernels.spec import AttentionOptions, MapInputs, PlanTensors
from molsaki_kernels.strides import with_contiguous_head_dim

LARGE = 1 << 31  # numbers of a map, whose offsets do not fit in 32 bits


@jit
def upstream_of_steps(dmaps, s0, S, step, word, W, weight, g, BS: tl.constexpr, EXACT: tl.constexpr):
    """``g [BM, BC]`` plus the map's gradient of steps ``[s0, s0 + BS)`` in their rows, times ``weight``.

    The BS x BC numbers are read once and spread over the rows by a one-hot product, which costs far fewer loads and
    addresses than reading them for each row.
    """
    s = s0 + tl.arange(0, BS)
    inside = (s < S)[:, None]
    if EXACT:  # compiled: without this mask a kernel spills
        inside = inside & (word >= 0)[None, :]
    p = dmaps + ((s.to(tl.int64) * W)[:, None] + tl.maximum(word, 0)[None, :])
    b_g = tl.load(p, mask=inside, other=0.0) * weight  # [BS, BC]
    e = one_hot(step - s0, BS, EXACT)  # [BM, BS]
    if EXACT:
        return dot(e, b_g, g, "ieee")
    else:
        high, low = two_parts(b_g)
        g = dot(e, high, g, "ieee")
        return dot(e, low, g, "ieee")


@jit
def stream_key_tokens(
    q, lse, dq, step, m0, p_k, stride_km, key_table, i_n, s_lo, s_hi, c_lo, c_hi, dmaps, S, C, W,
    weight, factor, inner, window,
    BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, HAS_DQ: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head: ``dlse [BM] = -sum_j P g`` and, with HAS_DQ, ``dq [BM, BD]`` plus its part of the key tokens, unscaled.

    Steps and key tokens are one flat loop. A tile with more than BS steps computes its weights again for the next BS.
    """
    EXACT: tl.constexpr = q.dtype == tl.float32
    dlse = tl.zeros([BM], tl.float32)
    rows = m0 + tl.arange(0, BM)
    end = m0 + BM if CAUSAL else FAR  # no row of the tile sees a key from there on
    blocks = tl.cdiv(tl.maximum(c_hi - c_lo, 0), BC)
    c0 = c_lo
    s0 = s_lo
    for _ in tl.range(0, blocks * tl.cdiv(tl.maximum(s_hi - s_lo, 0), BS)):
        token, word = load_keys(key_table, i_n, C, c0, BC)
        b_k = gather_keys(p_k, stride_km, token, D, BD, end)  # [BC, BD]
        g = tl.zeros([BM, BC], tl.float32)
        g = upstream_of_steps(dmaps, s0, S, step, word, W, weight, g, BS, EXACT)
        ds, t = weighted_upstream(
            q, b_k, lse, g, step, token, rows, factor, inner, window, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PRECISION
        )
        dlse -= tl.sum(ds, 1)
        if HAS_DQ:
            if HAS_SOFTCAP:
                ds *= 1.0 - t * t
            dq = dot(ds.to(b_k.dtype), b_k, dq, PRECISION)
        # The next block of key tokens, or the first one with the next steps; a division would take more instructions.
        c0 += BC
        s0 += tl.where(c0 < c_hi, 0, BS)
        c0 = tl.where(c0 < c_hi, c0, c_lo)
    return dq, dlse


@kernel
def map_dlse_kernel(
    q,  # (B, Hq, M, D)
    k,  # (B, Hkv, M, D)
    lse,  # (B, Hq, M) float32
    dmaps,  # (N, S, W) or, PER_HEAD, (N, Hq, S, W) float32
    step_of_row,  # (B, M), this and the next two as in plan_tables
    tile_table,  # (tiles, 8)
    key_table,  # (N, 2, C')
    dlse,  # (B, Hq, M) float32; with ADD_DLSE, the map's is added to it
    out,  # (B, Hq, M, D), or None: dlse is not folded
    dout,  # (B, Hq, M, D) or None
    folded_out,  # (B, Hq, M, D) or None
    folded_dout,  # (B, Hq, M, D) or None
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_km, stride_ob, stride_oh, stride_om,
    stride_dob, stride_doh, stride_dom, stride_fb, stride_fh, stride_fm,
    factor, inner, weight, window, M, S, C, W, heads, group_size, heads_per_program,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, FOLD_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PACKED: tl.constexpr,
    PER_HEAD: tl.constexpr, ONE_BLOCK: tl.constexpr, ADD_DLSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ONE_BLOCK: one map for all heads and C <= BC. What does not depend on the head is loaded once, and the loop over
    the program's heads loads q and the keys of the next one ahead. Otherwise a program has one head; a loop of two
    levels would keep twice the registers."""
    # With CAUSAL the last tiles see the most key tokens. They start first, so that short ones run at the end.
    i_g = tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    i_n, m0, bos, length, s_lo, s_hi, c_lo, c_hi = load_tile(tile_table, i_g, M, BM, PACKED)
    if m0 >= length:
        return
    i_b = (i_n * 0 if PACKED else i_n).to(tl.int64)
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    rows = m0 + tl.arange(0, BM)
    d = tl.arange(0, BD)
    h_lo = tl.program_id(1) * heads_per_program
    h_hi = tl.minimum(h_lo + heads_per_program, heads)
    # Where no row of the tile is in a step, or no key token is visible (mostly padding), q is not read.
    read = tl.where(c_lo < c_hi, length, 0)
    step = tl.load(step_of_row + i_b * M + bos + rows, mask=rows < length, other=-1)
    p_q = q + i_b * stride_qb + (bos + rows).to(tl.int64)[:, None] * stride_qm + d[None, :]
    p_k = k + i_b * stride_kb + bos.to(tl.int64) * stride_km
    p_row = i_b * heads * M + bos + rows
    dmaps += i_n.to(tl.int64) * (heads if PER_HEAD else 1) * S * W
    if ONE_BLOCK:
        token, word = load_keys(key_table, i_n, C, c_lo, BC)
        g = tl.zeros([BM, BC], tl.float32)
        for s0 in tl.range(s_lo, tl.where(c_lo < c_hi, s_hi, s_lo), BS, num_stages=1):
            g = upstream_of_steps(dmaps, s0, S, step, word, W, weight, g, BS, EXACT)
        end = m0 + BM if CAUSAL else FAR  # no row of the tile sees a key from there on
        for head in tl.range(h_lo, h_hi):
            i_h = tl.cast(head, tl.int64)
            b_q = load_rows(p_q + i_h * stride_qh, rows, read, D, BD, True)  # [BM, BD]
            b_k = gather_keys(p_k + tl.cast(head // group_size, tl.int64) * stride_kh, stride_km, token, D, BD, end)
            b_lse = tl.load(lse + p_row + i_h * M, mask=rows < read, other=float("inf"))
            ds, _t = weighted_upstream(
                b_q, b_k, b_lse, g, step, token, rows, factor, inner, window,
                CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PRECISION,
            )  # fmt: skip
            store_dlse(dlse + p_row + i_h * M, -tl.sum(ds, 1), rows, length, ADD_DLSE)
    else:
        i_h = h_lo.to(tl.int64)
        b_q = load_rows(p_q + i_h * stride_qh, rows, read, D, BD, True)  # [BM, BD]
        b_lse = tl.load(lse + p_row + i_h * M, mask=rows < read, other=float("inf"))
        _dq, b_dlse = stream_key_tokens(
            b_q, b_lse, tl.zeros([BM, BD], tl.float32), step, m0, p_k + (h_lo // group_size).to(tl.int64) * stride_kh,
            stride_km, key_table, i_n, s_lo, s_hi, c_lo, c_hi, dmaps + i_h * S * W if PER_HEAD else dmaps, S, C, W,
            weight, factor, inner, window, BM, D, BD, BC, BS, False, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
        store_dlse(dlse + p_row + i_h * M, b_dlse, rows, length, ADD_DLSE)
    if out is not None:
        # In smaller tiles, whose O and dO fit the registers; dlse is read back from memory.
        tl.debug_barrier()
        parts: tl.constexpr = BM // FOLD_ROWS
        for i in tl.range(0, (h_hi - h_lo) * parts, num_stages=1):
            i_fh = tl.cast(h_lo + i // parts, tl.int64)
            some = m0 + i % parts * FOLD_ROWS + tl.arange(0, FOLD_ROWS)
            p_dlse = dlse + (i_b * heads + i_fh) * M + bos + some
            some_dlse = tl.load(p_dlse, mask=some < length, other=0.0)
            at = (bos + some).to(tl.int64)[:, None]
            p_o = out + i_b * stride_ob + i_fh * stride_oh + at * stride_om + d[None, :]
            p_do = dout + i_b * stride_dob + i_fh * stride_doh + at * stride_dom + d[None, :]
            b_o = load_rows(p_o, some, length, D, BD, True)
            b_do = load_rows(p_do, some, length, D, BD, True)
            f_o, f_do = fold_rows(b_o, b_do, some_dlse[:, None], D, BD)
            p_f = i_b * stride_fb + i_fh * stride_fh + at * stride_fm + d[None, :]
            store_rows(folded_out + p_f, f_o, some, length, D, BD)
            store_rows(folded_dout + p_f, f_do, some, length, D, BD)


@jit
def store_dlse(p, dlse, rows, length, ADD: tl.constexpr):
    if ADD:
        dlse += tl.load(p, mask=rows < length, other=0.0)
    tl.store(p, dlse, mask=rows < length)


@kernel
def map_dq_kernel(
    q,  # (B, Hq, M, D)
    k,  # (B, Hkv, M, D)
    lse,  # (B, Hq, M) float32
    dmaps,  # (N, S, W) or, PER_HEAD, (N, Hq, S, W) float32
    step_of_row,  # (B, M), this and the next two as in plan_tables
    tile_table,  # (tiles, 8)
    key_table,  # (N, 2, C')
    dq,  # (B, Hq, M, D)
    dlse,  # (B, Hq, M) float32, or None: it is known
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_km, stride_dqb, stride_dqh, stride_dqm,
    scale, factor, inner, weight, window, M, S, C, W, group_size,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PACKED: tl.constexpr,
    PER_HEAD: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_g = tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    i_n, m0, bos, length, s_lo, s_hi, c_lo, c_hi = load_tile(tile_table, i_g, M, BM, PACKED)
    if m0 >= length:
        return
    if ACCUMULATE:  # noqa: SIM102  # a compile-time condition around one of run time
        if c_lo >= c_hi:
            return
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    i_b, i_h = (i_n * 0 if PACKED else i_n).to(tl.int64), head.to(tl.int64)
    rows = m0 + tl.arange(0, BM)
    d = tl.arange(0, BD)
    read = tl.where(c_lo < c_hi, length, 0)
    step = tl.load(step_of_row + i_b * M + bos + rows, mask=rows < length, other=-1)
    offset = (bos + rows).to(tl.int64)[:, None]
    p_q = q + i_b * stride_qb + i_h * stride_qh + offset * stride_qm + d[None, :]
    p_k = k + i_b * stride_kb + (head // group_size).to(tl.int64) * stride_kh + bos.to(tl.int64) * stride_km
    p_row = (i_b * heads + i_h) * M + bos + rows
    dmaps += (i_n.to(tl.int64) * heads + i_h if PER_HEAD else i_n.to(tl.int64)) * S * W
    b_q = load_rows(p_q, rows, read, D, BD, True)  # [BM, BD]
    b_lse = tl.load(lse + p_row, mask=rows < read, other=float("inf"))
    b_dq, b_dlse = stream_key_tokens(
        b_q, b_lse, tl.zeros([BM, BD], tl.float32), step, m0, p_k, stride_km, key_table, i_n, s_lo, s_hi, c_lo, c_hi,
        dmaps, S, C, W, weight, factor, inner, window, BM, D, BD, BC, BS, True,
        CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PRECISION,
    )  # fmt: skip
    if dlse is not None:
        store_dlse(dlse + p_row, b_dlse, rows, length, False)
    p_dq = dq + i_b * stride_dqb + i_h * stride_dqh + offset * stride_dqm + d[None, :]
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
    block_table,  # (N, C / BC, 2), this and the next as in plan_tables; None: they are computed from the plan
    key_table,  # (N, 2, C') or None
    partial,  # (splits, N, Hkv, C, D) float32, without the scale; None if DIRECT
    dk,  # (B, Hkv, M, D), added to in place if DIRECT, else None
    cu_seqlens,  # (N + 1,) or None
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_km, stride_dkb, stride_dkh, stride_dkm,
    scale, factor, inner, weight, window, M, N, S, C, W, splits, heads, group_size,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PACKED: tl.constexpr,
    PER_HEAD: tl.constexpr, LARGE_MAP: tl.constexpr, EQUAL_SHARES: tl.constexpr, DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(C, BC)
    i_n = tl.program_id(0) // blocks
    c0 = tl.program_id(0) % blocks * BC
    c = c0 + tl.arange(0, BC)
    i_kv = tl.program_id(1)
    i_split = tl.program_id(2)
    i_b = i_n
    bos = i_n * 0
    length = bos + M
    if PACKED:
        i_b = i_n * 0
        bos = tl.load(cu_seqlens + i_n).to(tl.int32)
        length = tl.load(cu_seqlens + i_n + 1).to(tl.int32) - bos
    # (tile, head) pairs with a row that is in a step and to which a key token of the block is visible, and this
    # program's share of them.
    if block_table is None:
        token, word = load_columns(tokens + i_n.to(tl.int64) * C, words + i_n.to(tl.int64) * C, c, C, length)
        steps += i_n.to(tl.int64) * S * 2
        lo, hi = tiles_of_keys(steps, S, token, word, length, window, BM, CAUSAL, HAS_WINDOW)
        most = hi - lo
        if EQUAL_SHARES:
            first, first_word = load_columns(
                tokens + i_n.to(tl.int64) * C, words + i_n.to(tl.int64) * C, tl.arange(0, BC), C, length
            )
            first_lo, first_hi = tiles_of_keys(steps, S, first, first_word, length, window, BM, CAUSAL, HAS_WINDOW)
            most = tl.maximum(most, first_hi - first_lo)
    else:
        token, word = load_keys(key_table, i_n, C, c0, BC)
        p_tiles = block_table + tl.program_id(0).to(tl.int64) * 2
        lo = tl.load(p_tiles)
        hi = tl.load(p_tiles + 1)
        most = hi - lo
        if EQUAL_SHARES:
            p_first = block_table + i_n.to(tl.int64) * blocks * 2
            most = tl.maximum(most, tl.load(p_first + 1) - tl.load(p_first))
    lo *= group_size
    hi *= group_size
    # With causality the first block of key tokens has the most rows. With shares of its size, the others use fewer.
    share = tl.cdiv(tl.maximum(most, 0) * group_size, splits)
    lo += i_split * share
    hi = tl.minimum(lo + share, hi)

    d = tl.arange(0, BD)
    h0 = i_kv * group_size
    p_q = q + i_b.to(tl.int64) * stride_qb + bos.to(tl.int64) * stride_qm
    p_k = k + i_b.to(tl.int64) * stride_kb + i_kv.to(tl.int64) * stride_kh + bos.to(tl.int64) * stride_km
    b_k = gather_keys(p_k, stride_km, token, D, BD)  # [BC, BD]
    p_step = step_of_row + i_b.to(tl.int64) * M + bos
    p_lse = lse + i_b.to(tl.int64) * heads * M + bos
    b_dk = tl.zeros([BC, BD], tl.float32)
    r = tl.arange(0, BM)
    at = r.to(tl.int64)[:, None] * stride_qm + d[None, :]
    head = lo % group_size
    m0 = lo // group_size * BM
    for _ in tl.range(lo, hi):
        i_h = h0 + head
        rows = m0 + r
        step = tl.load(p_step + rows, mask=rows < length, other=-1)
        b_lse = tl.load(p_lse + tl.cast(i_h, tl.int64) * M + rows, mask=rows < length, other=float("inf"))
        p_rows = p_q + tl.cast(i_h, tl.int64) * stride_qh + m0.to(tl.int64) * stride_qm
        b_q = load_rows(p_rows + at, rows, length, D, BD, True)  # [BM, BD]
        p, t = column_weights(
            b_k, b_q, b_lse, token, rows, factor, inner, window, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PRECISION
        )  # [BC, BM]
        i_map = i_n.to(tl.int64) * heads + i_h if PER_HEAD else i_n.to(tl.int64)
        offset = (step.to(tl.int64) if LARGE_MAP else step) * W  # 32 bits take two fifths of the instructions
        p_g = dmaps + i_map * S * W + offset[None, :] + tl.maximum(word, 0)[:, None]
        ds = p * tl.load(p_g, mask=(step >= 0)[None, :], other=0.0)
        if b_q.dtype == tl.float16:  # whose range is small: before it is rounded
            ds *= weight
        if HAS_SOFTCAP:
            ds *= 1.0 - t * t
        b_dk = dot(ds.to(b_q.dtype), b_q, b_dk, PRECISION)
        head += 1
        m0 += tl.where(head == group_size, BM, 0)
        head = tl.where(head == group_size, 0, head)
    if b_k.dtype != tl.float16:
        b_dk *= weight
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


def map_dlse(
    dmaps: Tensor,
    inputs: MapInputs,
    options: AttentionOptions,
    plan: PlanTensors,
    *,
    dlse: Tensor | None = None,
    out: Tensor | None = None,
    dout: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The map's dlse ``(B, Hq, M)`` float32 alone, for engines that need it before their backward, and O' and dO'.

    Args:
        dlse: ``(B, Hq, M)``, to which the map's is added, in a new tensor.
        out, dout: ``(B, Hq, M, Dv)`` in bfloat16 or float32, into which dlse is folded (see :mod:`lse_gradient`), in
            the same pass if they are as wide as q; both results have the layout of ``out``, or are contiguous if its
            last dimension is not.
    """
    q, k = inputs.q, inputs.k
    if out is not None and dout is not None and out.shape[3] != q.shape[3]:  # the kernel has one width
        dlse = map_dlse(dmaps, inputs, options, plan, dlse=dlse)[0]
        return dlse, *fold_dlse_into_out(out, dout, dlse)
    add = dlse is not None
    if dlse is None:
        dlse = q.new_empty(q.shape[:3], dtype=torch.float32)
    else:
        dlse = dlse.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    if plan.is_empty(q):
        dlse = dlse if add else dlse.zero_()
        return dlse, *((None, None) if out is None or dout is None else fold_dlse_into_out(out, dout, dlse))
    folded_out = folded_dout = None
    if out is not None and dout is not None:
        # out has the layout of q; the gradient of a sum is one number, expanded.
        out, dout = with_contiguous_head_dim(out), with_contiguous_head_dim(dout)
        folded_out, folded_dout = torch.empty_like(out), torch.empty_like(out, dtype=dout.dtype)
    Hq, M, D = q.shape[1:]
    S, C, W = plan.steps.shape[1], plan.tokens.shape[1], plan.num_words
    arch = configs.arch_of(q)
    config = configs.map_dlse(arch, q.dtype, D, C)
    tables = plan_tables(inputs, options, plan, config.rows)
    tiles = tables.tile_table.shape[0]
    one_block = min(config.columns, configs.ONE_BLOCK) >= C and not options.per_head
    heads_per_program = 1
    if one_block:
        heads_per_program = configs.heads_per_program(arch, Hq, tiles, config.resident)
    strides = [(q if x is None else x).stride()[:3] for x in (out, dout, folded_out)]
    factor, inner = score_factors(options.scale, options.softcap)
    with torch.cuda.device(q.get_device()):
        map_dlse_kernel[(tiles, cdiv(Hq, heads_per_program))](
            q, k, inputs.lse.contiguous(), dmaps.float().contiguous(), tables.step_of_row, tables.tile_table,
            tables.key_table, dlse, out, dout, folded_out, folded_dout,
            *q.stride()[:3], *k.stride()[:3], *strides[0], *strides[1], *strides[2],
            factor, inner, 1.0 if options.per_head else 1.0 / Hq, options.window or 0,
            M, S, C, W, Hq, Hq // k.shape[1], heads_per_program,
            BM=config.rows, BC=config.columns, BS=configs.STEP_BLOCK, FOLD_ROWS=min(fold_tile(D)[0], config.rows),
            **score_flags(q, options, inputs.cu_seqlens),
            PER_HEAD=options.per_head, ONE_BLOCK=one_block, ADD_DLSE=add,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return dlse, folded_out, folded_dout


def map_backward(
    dmaps: Tensor, inputs: MapInputs, options: AttentionOptions, plan: PlanTensors
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dlse`` of the map alone; the effect of dlse on dq and dk is not included.

    dq and dk have the dtypes and layouts of q and k. dmaps is ``(N, S, W)``, or ``(N, Hq, S, W)`` with
    ``options.per_head``.
    """
    q = inputs.q
    dq, dk = torch.empty_like(q), torch.zeros_like(inputs.k)
    dlse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if plan.is_empty(q):
        return dq.zero_(), dk, dlse.zero_()
    _gradients(dmaps, inputs, options, plan, dq, dk, dlse)
    return dq, dk, dlse


def add_map_gradients(
    dmaps: Tensor, inputs: MapInputs, options: AttentionOptions, plan: PlanTensors, dq: Tensor, dk: Tensor
) -> None:
    """Add to dq and dk in place: each sum is computed in float32 and rounded once."""
    if plan.is_empty(inputs.q):
        return
    # An engine may return them in the layout of q and k, which is any.
    to_dq, to_dk = with_contiguous_head_dim(dq), with_contiguous_head_dim(dk)
    _gradients(dmaps, inputs, options, plan, to_dq, to_dk, None)
    for x, to_x in ((dq, to_dq), (dk, to_dk)):
        if to_x is not x:
            x.copy_(to_x)


def _gradients(
    dmaps: Tensor,
    inputs: MapInputs,
    options: AttentionOptions,
    plan: PlanTensors,
    dq: Tensor,
    dk: Tensor,
    dlse: Tensor | None,
) -> None:
    """Add to dk, and write dq and dlse or, without dlse, add to dq."""
    q, k, cu_seqlens = inputs.q, inputs.k, inputs.cu_seqlens
    Hq, M, D = q.shape[1:]
    S, C, W = plan.steps.shape[1], plan.tokens.shape[1], plan.num_words
    config = configs.map_dq(configs.arch_of(q), q.dtype, D, C)
    tables = plan_tables(inputs, options, plan, config.rows)
    factor, inner = score_factors(options.scale, options.softcap)
    with torch.cuda.device(q.get_device()):
        map_dq_kernel[(tables.tile_table.shape[0], Hq)](
            q, k, inputs.lse.contiguous(), dmaps.float().contiguous(), tables.step_of_row, tables.tile_table,
            tables.key_table, dq, dlse,
            *q.stride()[:3], *k.stride()[:3], *dq.stride()[:3],
            options.scale, factor, inner, 1.0 if options.per_head else 1.0 / Hq, options.window or 0,
            M, S, C, W, Hq // k.shape[1],
            BM=config.rows, BC=config.columns, BS=configs.STEP_BLOCK, **score_flags(q, options, cu_seqlens),
            PER_HEAD=options.per_head, ACCUMULATE=dlse is None, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    add_dk(dmaps, inputs, options, plan, tables.step_of_row, dk, tables=tables)


def add_dk(
    dmaps: Tensor,
    inputs: MapInputs,
    options: AttentionOptions,
    plan: PlanTensors,
    step_of_row: Tensor,
    dk: Tensor,
    *,
    tables: PlanTables | None = None,
) -> None:
    """Add the key tokens' part to dk ``(B, Hkv, M, D)`` in place."""
    partial = dk_partials(dmaps, inputs, options, plan, step_of_row, tables=tables, dk=dk)
    if partial is None:
        return
    N, C = plan.tokens.shape
    D = inputs.q.shape[3]
    config = configs.map_dk_add(D)
    with torch.cuda.device(dk.get_device()):
        map_dk_add_kernel[(N * cdiv(C, config.columns), dk.shape[1])](
            partial, plan.tokens, plan.word_of_token, dk, inputs.cu_seqlens, *dk.stride()[:3],
            options.scale, dk.shape[2], N, C, partial.shape[0],
            D=D, BD=next_power_of_2(D), BC=config.columns, PACKED=inputs.cu_seqlens is not None,
            num_warps=config.warps, num_stages=1,
        )  # fmt: skip


def dk_partials(
    dmaps: Tensor,
    inputs: MapInputs,
    options: AttentionOptions,
    plan: PlanTensors,
    step_of_row: Tensor,
    *,
    tables: PlanTables | None = None,
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
    items = cdiv(M if cu_seqlens is None else cdiv(M, N), config.rows) * (Hq // Hkv)  # of a packed sequence: the mean
    equal_shares = options.causal and options.window is None and cu_seqlens is None
    splits = configs.row_splits(arch, blocks, N * Hkv, items, C * N * Hkv * D * 4, config.resident, equal_shares)
    target = dk if splits == 1 else None
    partial = q.new_empty((splits, N, Hkv, C, D), dtype=torch.float32) if target is None else None
    factor, inner = score_factors(options.scale, options.softcap)
    with torch.cuda.device(q.get_device()):
        map_dk_kernel[(N * blocks, Hkv, splits)](
            q, k, inputs.lse.contiguous(), dmaps.float().contiguous(), plan.steps, plan.tokens, plan.word_of_token,
            step_of_row, *((None, None) if tables is None else (tables.block_table, tables.key_table)), partial, target,
            cu_seqlens,
            *q.stride()[:3], *k.stride()[:3], *(k if target is None else target).stride()[:3],
            options.scale, factor, inner, 1.0 if options.per_head else 1.0 / Hq, options.window or 0,
            M, N, S, C, W, splits, Hq, Hq // Hkv,
            BM=config.rows, BC=config.columns, **score_flags(q, options, cu_seqlens),
            PER_HEAD=options.per_head, LARGE_MAP=S * W >= LARGE, EQUAL_SHARES=equal_shares,
            DIRECT=target is not None, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return partial


def variants(arch: str) -> list[Variant]:
    """The variants that :mod:`molsaki_kernels.aot` compiles."""
    found = []
    for case in cases():
        if not case.has_map or case.sinks:
            continue
        name, D = case.name, case.head_dim
        for kind, accumulate, one_block in (("dq", False, False), ("dq_add", True, False), ("dq_add_one", True, True)):
            tile = configs.map_dq(arch, case.dtype, D, 16 if one_block else 256)
            flags = dict(BM=tile.rows, BC=tile.columns, BS=configs.STEP_BLOCK, PER_HEAD=case.per_head)
            wgmma = tile.rows >= 64
            absent: tuple[str, ...] = ("dlse",) if accumulate else ()
            if kind == "dq" or not case.feature:
                kind_flags = flags | dict(ACCUMULATE=accumulate)
                found.append(
                    case.variant(
                        f"map_{kind}-{name}", map_dq_kernel, tile, kind_flags, absent=absent, wants_wgmma=wgmma
                    )
                )
        for kind, fold, one_block in (
            ("dlse", False, False),
            ("dlse_one", False, True),
            ("fold", True, False),
            ("fold_one", True, True),
        ):
            if (case.feature and kind != "fold") or (fold and case.dtype == torch.float16):
                continue
            tile = configs.map_dlse(arch, case.dtype, D, 16 if one_block else 256)
            flags = dict(BM=tile.rows, BC=tile.columns, BS=configs.STEP_BLOCK, PER_HEAD=case.per_head, ADD_DLSE=False)
            flags |= dict(FOLD_ROWS=min(fold_tile(D)[0], tile.rows), ONE_BLOCK=one_block)
            absent = () if fold else ("out", "dout", "folded_out", "folded_dout")
            wgmma = tile.rows >= 64
            found.append(
                case.variant(f"map_{kind}-{name}", map_dlse_kernel, tile, flags, absent=absent, wants_wgmma=wgmma)
            )
        tile = configs.map_dk(arch, case.dtype, D, 256)
        flags = dict(BM=tile.rows, BC=tile.columns, PER_HEAD=case.per_head, LARGE_MAP=False, DIRECT=False)
        flags |= dict(EQUAL_SHARES=case.causal and not case.window and not case.packed)
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
