"""Tables that the map's kernels read: computed from a plan by one small kernel and kept for all layers.

Every kernel of the map needs the step of each row and the ranges of steps and key tokens of its tile. These are the
same for all heads, layers and passes, and finding each one takes several dependent loads.

    step_of_row (B, M)              the step that contains each row, -1 if none does
    tile_table (tiles, 8)           of each tile of rows: sequence n, first row, start and length of the sequence,
                                    steps [lo, hi) with a row in the tile, key tokens [lo, hi) with all that are
                                    visible to a row of it, lo a multiple of 16; lo >= hi for none, a length of 0 for a
                                    tile past the end of its sequence
    word_table (N, W / BW, 2)       the smallest range of key tokens that holds each block of words
    block_table (N, C / BC, 2)      of each block of key tokens: the range of tiles of KEY_ROWS rows that have a row in
                                    a step which sees one of them
    key_table (N, 2, C')            the positions of the key tokens and their words; FAR and -1 for padding, past the
                                    end of the sequence and in the columns after C, so that a block of up to KEY_PADDING
                                    columns is read without a mask wherever it begins

All are int32.
"""

from __future__ import annotations

import dataclasses

import torch
import triton.language as tl
from torch import Tensor

from molsaki_kernels import _plan_cache
from molsaki_kernels._triton import configs
from molsaki_kernels._triton.decorators import jit, kernel
from molsaki_kernels._triton.integers import cdiv
from molsaki_kernels._triton.tiles import FAR, columns_in, load_columns, locate, step_of, steps_in
from molsaki_kernels._triton.variants import Variant, variant
from molsaki_kernels.spec import AttentionOptions, MapInputs, PlanTensors

TILE_FIELDS = tl.constexpr(8)
KEY_PADDING = tl.constexpr(128)


@kernel
def plan_tables_kernel(
    steps,  # (N, S, 2)
    tokens,  # (N, C)
    words,  # (N, C)
    step_of_row,  # (B, M)
    tile_table,  # (tiles, 8)
    word_table,  # (N, W / BW, 2)
    block_table,  # (N, C / BC, 2)
    key_table,  # (N, 2, C')
    cu_seqlens,  # (N + 1,) or None
    window, M, N, S, C, W,
    BM: tl.constexpr, BS: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, KEY_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The first programs own a tile of rows each, the others a block of words and a block of key tokens."""
    tiles = M // BM + N if PACKED else N * tl.cdiv(M, BM)
    i = tl.program_id(0)
    if i < tiles:
        i_n, i_b, i_t, bos, length = locate(i, cu_seqlens, M, N, BM, PACKED)
        m0 = i_t * BM
        steps += i_n.to(tl.int64) * S * 2
        tokens += i_n.to(tl.int64) * C
        words += i_n.to(tl.int64) * C
        stop = tl.minimum(m0 + BM, length)
        s_lo, s_hi = steps_in(steps, S, m0, stop)
        rows = m0 + tl.arange(0, BM)
        step = step_of(steps, S, rows, s_lo, s_hi, BS)
        tl.store(step_of_row + i_b.to(tl.int64) * M + bos + rows, step, mask=rows < length)
        first = tl.maximum(m0 - window + 1, 0) if HAS_WINDOW else m0 * 0
        last = stop - 1 if CAUSAL else length - 1
        c_lo, c_hi = columns_in(tokens, words, C, first, last)
        c_lo = c_lo // 16 * 16
        c_hi = tl.where(s_hi > s_lo, c_hi, 0)
        p = tile_table + i.to(tl.int64) * TILE_FIELDS
        tl.store(p, i_n)
        tl.store(p + 1, m0)
        tl.store(p + 2, bos)
        tl.store(p + 3, tl.where(m0 < length, length, 0))
        tl.store(p + 4, s_lo)
        tl.store(p + 5, tl.where(m0 < length, s_hi, 0))
        tl.store(p + 6, c_lo)
        tl.store(p + 7, tl.where(m0 < length, c_hi, 0))
    else:
        word_blocks = tl.cdiv(W, BW)
        blocks = tl.cdiv(C, BC)
        most = tl.maximum(word_blocks, blocks)
        i_n = (i - tiles) // most
        block = (i - tiles) % most
        steps += i_n.to(tl.int64) * S * 2
        tokens += i_n.to(tl.int64) * C
        words += i_n.to(tl.int64) * C
        if block < word_blocks:
            lo, hi = tokens_of_words(words, C, block * BW, block * BW + BW)
            p = word_table + (i_n.to(tl.int64) * word_blocks + block) * 2
            tl.store(p, lo)
            tl.store(p + 1, hi)
        if block < blocks:
            length = M + i_n * 0
            if PACKED:
                length = tl.load(cu_seqlens + i_n + 1).to(tl.int32) - tl.load(cu_seqlens + i_n).to(tl.int32)
            c = block * BC + tl.arange(0, BC)
            token, word = load_columns(tokens, words, c, C, length)
            width = table_width(C)
            key_table += i_n.to(tl.int64) * 2 * width
            tl.store(key_table + c, token, mask=c < C)
            tl.store(key_table + width + c, word, mask=c < C)
            if block == blocks - 1:
                after = C + tl.arange(0, 2 * KEY_PADDING)
                tl.store(key_table + after, after * 0 + FAR, mask=after < width)
                tl.store(key_table + width + after, after * 0 - 1, mask=after < width)
            lo, hi = tiles_of_keys(steps, S, token, word, length, window, KEY_ROWS, CAUSAL, HAS_WINDOW)
            p = block_table + (i_n.to(tl.int64) * blocks + block) * 2
            tl.store(p, lo)
            tl.store(p + 1, hi)


@jit
def tiles_of_keys(
    steps, S, token, word, length, window, ROWS: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr
):
    """The tiles ``[lo, hi)`` of ROWS rows of one sequence with a row in a step that sees one of the key tokens."""
    s_lo, s_hi = steps_in(steps, S, 0, length)
    first = length
    last = length * 0
    if s_hi > 0:
        first = tl.load(steps + 2 * s_lo).to(tl.int32)
        last = tl.minimum(tl.load(steps + 2 * s_hi - 1).to(tl.int32), length)
    if CAUSAL:
        first = tl.maximum(first, tl.minimum(tl.min(token, 0), length))
    if HAS_WINDOW:
        last = tl.minimum(last, tl.max(tl.where(word >= 0, token + window, 0), 0))
    last = tl.where(tl.max(word, 0) >= 0, last, 0)
    lo = first // ROWS
    return lo, tl.maximum(tl.cdiv(last, ROWS), lo)


@jit
def tokens_of_words(words, C, w_lo, w_hi):
    """The smallest range ``[lo, hi)`` of key tokens that holds every token of words ``[w_lo, w_hi)``."""
    lo = w_lo * 0 + C
    hi = w_lo * 0
    for c0 in tl.range(0, C, 128, num_stages=1):
        c = c0 + tl.arange(0, 128)
        word = tl.load(words + c, mask=c < C, other=-1).to(tl.int32)
        hit = (word >= w_lo) & (word < w_hi)
        lo = tl.minimum(lo, tl.min(tl.where(hit, c, C), 0))
        hi = tl.maximum(hi, tl.max(tl.where(hit, c + 1, 0), 0))
    return lo, hi


@jit
def table_width(C):
    """C' of the key table, a multiple of 16: loads of four neighbours at once need aligned rows."""
    return tl.cdiv(C, 16) * 16 + KEY_PADDING


@jit
def load_keys(key_table, i_n, C, c0, BC: tl.constexpr):
    """Position and word of key tokens ``[c0, c0 + BC)`` of sequence ``i_n``; FAR and -1 for columns after C."""
    width = table_width(C)
    p = key_table + (i_n.to(tl.int64) * 2 * width + c0)  # one address, from which the others have fixed distances
    c = tl.arange(0, BC)
    return tl.load(p + c), tl.load(p + width + c)


@jit
def load_tile(tile_table, i_g, M, ROWS: tl.constexpr, PACKED: tl.constexpr):
    """Tile ``i_g`` -> sequence, first row, start and length of the sequence, steps [lo, hi), key tokens [lo, hi)."""
    p = tile_table + i_g.to(tl.int64) * TILE_FIELDS
    if PACKED:
        i_n = tl.load(p)
        m0 = tl.multiple_of(tl.load(p + 1), ROWS)
        bos = tl.load(p + 2)
        length = tl.load(p + 3)
    else:
        tiles = tl.cdiv(M, ROWS)
        i_n = i_g // tiles
        m0 = i_g % tiles * ROWS
        bos = i_n * 0
        length = bos + M
    c_lo = tl.multiple_of(tl.load(p + 6), 16)
    return i_n, m0, bos, length, tl.load(p + 4), tl.load(p + 5), c_lo, tl.load(p + 7)


@dataclasses.dataclass(frozen=True)
class PlanTables:
    """The tables of the module's docstring."""

    step_of_row: Tensor
    tile_table: Tensor
    word_table: Tensor
    block_table: Tensor
    key_table: Tensor


def plan_tables(inputs: MapInputs, options: AttentionOptions, plan: PlanTensors, rows: int) -> PlanTables:
    """The tables for tiles of ``rows`` rows; the same ones for every layer that uses an unchanged plan."""
    q, cu_seqlens = inputs.q, inputs.cu_seqlens
    B, _, M, D = q.shape
    C, W = plan.tokens.shape[1], plan.num_words
    words = configs.map_reduce(1, C).words
    keys = configs.map_dk(configs.arch_of(q), q.dtype, D, C)
    key = ("triton", B, M, rows, words, keys.rows, keys.columns, options.causal, options.window)

    def compute() -> PlanTables:
        N, S = plan.steps.shape[:2]
        tiles = configs.num_tiles(M, N, cu_seqlens is not None, rows)
        word_blocks, blocks = cdiv(W, words), cdiv(C, keys.columns)
        new = plan.tokens.new_empty
        tables = PlanTables(
            step_of_row=new((B, M), dtype=torch.int32),
            tile_table=new((tiles, TILE_FIELDS.value), dtype=torch.int32),
            word_table=new((N, word_blocks, 2), dtype=torch.int32),
            block_table=new((N, blocks, 2), dtype=torch.int32),
            key_table=new((N, 2, cdiv(C, 16) * 16 + KEY_PADDING.value), dtype=torch.int32),
        )
        with torch.cuda.device(q.get_device()):
            plan_tables_kernel[(tiles + N * max(word_blocks, blocks),)](
                plan.steps, plan.tokens, plan.word_of_token, tables.step_of_row, tables.tile_table, tables.word_table,
                tables.block_table, tables.key_table, cu_seqlens, options.window or 0, M, N, S, C, W,
                BM=rows, BS=configs.STEP_BLOCK, BW=words, BC=keys.columns, KEY_ROWS=keys.rows,
                CAUSAL=options.causal, HAS_WINDOW=options.window is not None, PACKED=cu_seqlens is not None,
                num_warps=4, num_stages=1,
            )  # fmt: skip
        return tables

    return _plan_cache.cached_on_device(plan, cu_seqlens, key, compute)


def variants(arch: str) -> list[Variant]:
    """The variants that :mod:`molsaki_kernels.aot` compiles."""
    found = []
    for name, window, packed in (("", False, False), ("-window", True, False), ("-packed", False, True)):
        rows = configs.map_dq(arch, torch.bfloat16, 128, 256).rows
        keys = configs.map_dk(arch, torch.bfloat16, 128, 256)
        flags = dict(BM=rows, BS=configs.STEP_BLOCK, BW=64, BC=keys.columns, KEY_ROWS=keys.rows)
        flags |= dict(CAUSAL=True, HAS_WINDOW=window, PACKED=packed)
        absent = () if packed else ("cu_seqlens",)
        found.append(variant(f"plan_tables{name}", plan_tables_kernel, torch.float32, flags, absent=absent))
    return found
