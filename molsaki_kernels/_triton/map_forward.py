"""The stepwise map from q, k and lse (Eq. 2 and 3), without writing attention weights to memory.

    q (B, Hq, M, D), k (B, Hkv, M, D), lse (B, Hq, M) natural log
    P[i, c]    = exp(scale q_i.k_token(c) - lse_i)                       0 where token c is hidden from row i
    A[s, w]    = sum over heads h, rows i of step s, key tokens c of word w of P[h, i, c], divided by Hq

Stage 1, :func:`map_partials_kernel`: a program owns one tile of rows and one block of key tokens. It loops over the
heads of its group and keeps the sums per step in registers. A one-hot product on the tensor cores sums the rows of a
tile into their steps: ``P^T [BC, BM] @ E [BM, BS]``. The program writes one number per (step in the tile, key token):

    partial (groups, slots, C) float32,   slot = tile + n S + s

Steps are ascending and disjoint, so ``tile + s`` grows along the (tile, step) pairs that share a row: no two pairs
share a slot, and ``tiles + N S`` slots are enough.

Stage 2, :func:`map_reduce_kernel`: a program owns one step and one block of words. It sums over the step's tiles and
the groups, then over the tokens of each word. Both stages add in a fixed order.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from molsaki_kernels._triton import configs
from molsaki_kernels._triton.decorators import jit, kernel
from molsaki_kernels._triton.integers import cdiv
from molsaki_kernels._triton.plan_tables import PlanTables, load_keys, load_tile, plan_tables, tokens_of_words
from molsaki_kernels._triton.plan_tables import variants as plan_table_variants
from molsaki_kernels._triton.tiles import (
    column_weights,
    dot_one_hot,
    first_tile,
    gather_keys,
    load_columns,
    load_rows,
    one_hot,
    score_factors,
    score_flags,
)
from molsaki_kernels._triton.variants import Variant, cases, variant
from molsaki_kernels.spec import AttentionOptions, MapInputs, PlanTensors


@kernel
def map_partials_kernel(
    q,  # (B, Hq, M, D)
    k,  # (B, Hkv, M, D)
    lse,  # (B, Hq, M) float32
    step_of_row,  # (B, M), this and the next two as in plan_tables
    tile_table,  # (tiles, 8)
    key_table,  # (N, 2, C')
    partial,  # (groups, num_slots, C) float32
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_km,
    factor, inner, window, M, S, C, num_slots, heads, group_size, heads_per_program,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(C, BC)
    # With CAUSAL the last tiles see the most key tokens. They start first, so that short ones run at the end.
    i = tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    i_g = i // blocks
    i_c = i % blocks
    i_group = tl.program_id(1)
    i_n, m0, bos, length, s_lo, s_hi, c_lo, c_hi = load_tile(tile_table, i_g, M, BM, PACKED)
    # Stage 2 reads the key tokens that are visible to some row of the tile.
    if (i_c * BC >= c_hi) | (i_c * BC + BC <= c_lo):
        return
    i_b = i_n * 0 if PACKED else i_n

    c = i_c * BC + tl.arange(0, BC)
    token, _word = load_keys(key_table, i_n, C, i_c * BC, BC)
    rows = m0 + tl.arange(0, BM)
    d = tl.arange(0, BD)
    step = tl.load(step_of_row + i_b.to(tl.int64) * M + bos + rows, mask=rows < length, other=-1)
    h_lo = i_group * heads_per_program
    h_hi = tl.minimum(h_lo + heads_per_program, heads)
    p_q = q + i_b.to(tl.int64) * stride_qb + (bos + rows).to(tl.int64)[:, None] * stride_qm + d[None, :]
    p_k = k + i_b.to(tl.int64) * stride_kb + bos.to(tl.int64) * stride_km
    p_lse = lse + (i_b.to(tl.int64) * heads * M + bos + m0)
    partial += (i_group.to(tl.int64) * num_slots + i_g + i_n.to(tl.int64) * S) * C
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32

    for s0 in tl.range(s_lo, s_hi, BS, num_stages=1):
        e = one_hot(step - s0, BS, EXACT)  # [BM, BS]
        sums = tl.zeros([BC, BS], tl.float32)
        # The key head and the head's number in its group; a division in the loop would take more instructions.
        i_kv = (h_lo // group_size).to(tl.int64)
        i_of_group = h_lo % group_size
        for i_h in tl.range(h_lo, h_hi):
            b_q = load_rows(p_q + tl.cast(i_h, tl.int64) * stride_qh, rows, length, D, BD, True)  # [BM, BD]
            b_k = gather_keys(p_k + i_kv * stride_kh, stride_km, token, D, BD)
            b_lse = tl.load(
                p_lse + tl.cast(i_h, tl.int64) * M + tl.arange(0, BM), mask=rows < length, other=float("inf")
            )
            p, _ = column_weights(
                b_k, b_q, b_lse, token, rows, factor, inner, window, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PRECISION
            )
            sums = dot_one_hot(p, e, sums)
            i_of_group += 1
            i_kv += tl.where(i_of_group == group_size, 1, 0)
            i_of_group = tl.where(i_of_group == group_size, 0, i_of_group)
        s = s0 + tl.arange(0, BS)
        p_partial = partial + s.to(tl.int64)[None, :] * C + c[:, None]
        tl.store(p_partial, sums, mask=(c < C)[:, None] & (s < s_hi)[None, :])


@kernel
def map_reduce_kernel(
    partial,  # (groups, num_slots, C) float32
    steps,  # (N, S, 2)
    tokens,  # (N, C)
    words,  # (N, C)
    word_table,  # (N, W / BW, 2), as in plan_tables, or None
    maps,  # (N, heads_out, S, W) float32
    cu_seqlens,  # (N + 1,) or None
    weight, window, M, S, C, W, groups, num_slots,
    ROWS: tl.constexpr, BG: tl.constexpr, BC: tl.constexpr, BW: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Program (n, s, block of words), head: the sum of ``groups`` slices of partial, from ``head * groups`` on."""
    blocks = tl.cdiv(W, BW)
    i_ns = tl.program_id(0) // blocks
    w0 = tl.program_id(0) % blocks * BW
    i_n = i_ns // S
    i_s = i_ns % S
    i_h = tl.program_id(1)
    bos = i_n * 0
    length = bos + M
    if PACKED:
        bos = tl.load(cu_seqlens + i_n).to(tl.int32)
        length = tl.load(cu_seqlens + i_n + 1).to(tl.int32) - bos
    start, stop = load_steps_scalar(steps + i_ns.to(tl.int64) * 2)
    stop = tl.minimum(stop, length)
    t_lo = start // ROWS
    t_hi = tl.where(stop > start, (stop - 1) // ROWS + 1, t_lo)
    tokens += i_n.to(tl.int64) * C
    words += i_n.to(tl.int64) * C
    if word_table is None:
        c_lo, c_hi = tokens_of_words(words, C, w0, w0 + BW)
    else:
        p_range = word_table + (i_n.to(tl.int64) * blocks + w0 // BW) * 2
        c_lo = tl.load(p_range)
        c_hi = tl.load(p_range + 1)

    w = w0 + tl.arange(0, BW)
    i_g = tl.arange(0, BG)
    first = (i_h * groups).to(tl.int64) * num_slots + first_tile(i_n, bos, M, ROWS, PACKED) + i_ns
    total = tl.zeros([BW], tl.float32)
    for c0 in tl.range(c_lo, c_hi, BC, num_stages=1):
        c = c0 + tl.arange(0, BC)
        token, word = load_columns(tokens, words, c, c_hi, length)
        sums = tl.zeros([BC], tl.float32)
        for i_t in tl.range(t_lo, t_hi, num_stages=1):
            written = word >= 0
            if CAUSAL:
                written = written & (token <= i_t * ROWS + ROWS - 1)
            if HAS_WINDOW:
                written = written & (token > i_t * ROWS - window)
            for g0 in tl.range(0, groups, BG, num_stages=1):
                slot = first + (i_g + g0).to(tl.int64) * num_slots + i_t
                mask = (g0 + i_g < groups)[:, None] & written[None, :]
                sums += tl.sum(tl.load(partial + slot[:, None] * C + c[None, :], mask=mask, other=0.0), 0)  # [BG, BC]
        total += tl.sum(tl.where(word[None, :] == w[:, None], sums[None, :], 0.0), 1)  # [BW, BC]
    p_maps = maps + ((i_n * tl.num_programs(1) + i_h).to(tl.int64) * S + i_s) * W + w
    tl.store(p_maps, total * weight, mask=w < W)


@jit
def load_steps_scalar(p):
    """``start, stop`` of the one step at p."""
    return tl.load(p).to(tl.int32), tl.load(p + 1).to(tl.int32)


def map_forward(inputs: MapInputs, options: AttentionOptions, plan: PlanTensors) -> Tensor:
    """The map ``(N, S, W)`` float32, or ``(N, Hq, S, W)`` with ``options.per_head``."""
    q, k, cu_seqlens = inputs.q, inputs.k, inputs.cu_seqlens
    if plan.is_empty(q):
        return new_maps(q, options, plan).zero_()
    Hq, M, D = q.shape[1:]
    N, S = plan.steps.shape[:2]
    C = plan.tokens.shape[1]
    arch = configs.arch_of(q)
    config = configs.map_forward(arch, q.dtype, D, C)
    tables = plan_tables(inputs, options, plan, config.rows)
    tiles = configs.num_tiles(M, N, cu_seqlens is not None, config.rows)
    blocks = cdiv(C, config.columns)
    programs = tiles * (blocks + 1) / 2 if options.causal else tiles * blocks  # that see a key token
    heads_per_program = 1 if options.per_head else configs.heads_per_program(arch, Hq, programs, config.resident)
    groups = cdiv(Hq, heads_per_program)
    partial = q.new_empty((groups, tiles + N * S, C), dtype=torch.float32)
    factor, inner = score_factors(options.scale, options.softcap)
    with torch.cuda.device(q.get_device()):
        map_partials_kernel[(tiles * blocks, groups)](
            q, k, inputs.lse.contiguous(), tables.step_of_row, tables.tile_table, tables.key_table, partial,
            *q.stride()[:3], *k.stride()[:3],
            factor, inner, options.window or 0, M, S, C, tiles + N * S, Hq, Hq // k.shape[1], heads_per_program,
            BM=config.rows, BC=config.columns, BS=configs.STEP_BLOCK, **score_flags(q, options, cu_seqlens),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return reduce_partials(partial, inputs, options, plan, config.rows, tables)


def new_maps(q: Tensor, options: AttentionOptions, plan: PlanTensors) -> Tensor:
    """An uninitialised map."""
    heads = (q.shape[1],) if options.per_head else ()
    N, S = plan.steps.shape[:2]
    return q.new_empty((N, *heads, S, plan.num_words), dtype=torch.float32)


def reduce_partials(
    partial: Tensor,
    inputs: MapInputs,
    options: AttentionOptions,
    plan: PlanTensors,
    rows: int,
    tables: PlanTables | None = None,
) -> Tensor:
    """Stage 2: the map from ``partial (groups, slots, C)``, which was computed with tiles of ``rows`` rows."""
    Hq, M = inputs.q.shape[1:3]
    N, S = plan.steps.shape[:2]
    C, W = plan.tokens.shape[1], plan.num_words
    maps = new_maps(inputs.q, options, plan)
    groups = 1 if options.per_head else partial.shape[0]
    config = configs.map_reduce(groups, C)
    with torch.cuda.device(partial.get_device()):
        map_reduce_kernel[(N * S * cdiv(W, config.words), Hq if options.per_head else 1)](
            partial, plan.steps, plan.tokens, plan.word_of_token, None if tables is None else tables.word_table,
            maps, inputs.cu_seqlens,
            1.0 if options.per_head else 1.0 / Hq, options.window or 0, M, S, C, W, groups, partial.shape[1],
            ROWS=rows, BG=config.groups, BC=config.columns, BW=config.words,
            CAUSAL=options.causal, HAS_WINDOW=options.window is not None, PACKED=inputs.cu_seqlens is not None,
            num_warps=config.warps, num_stages=1,
        )  # fmt: skip
    return maps


def variants(arch: str) -> list[Variant]:
    """The variants that :mod:`molsaki_kernels.aot` compiles, those of the plan's tables too."""
    found = plan_table_variants(arch)
    for case in cases():
        if not case.has_map or case.sinks or case.per_head:
            continue
        for key_tokens in (64, 256) if case.name in ("bf16-d64", "bf16-d128") else (256,):
            tile = configs.map_forward(arch, case.dtype, case.head_dim, key_tokens)
            sizes = dict(BM=tile.rows, BC=tile.columns, BS=configs.STEP_BLOCK)
            found.append(case.variant(f"map_partials-{case.name}-c{key_tokens}", map_partials_kernel, tile, sizes))
    for kind, packed, window in (("", False, False), ("-packed", True, False), ("-window", False, True)):
        for groups, key_tokens in ((1, 32), (32, 256)):
            reduce = configs.map_reduce(groups, key_tokens)
            flags = dict(ROWS=64, BG=reduce.groups, BC=reduce.columns, BW=reduce.words)
            flags |= dict(CAUSAL=True, HAS_WINDOW=window, PACKED=packed)
            name, absent = f"map_reduce{kind}-g{groups}-c{key_tokens}", () if packed else ("cu_seqlens",)
            found.append(variant(name, map_reduce_kernel, torch.float32, flags, absent=absent, warps=reduce.warps))
    return found
