"""Jit helpers that two kernels or more share: the position of a tile, its loads, scores, steps and key tokens.

A score tile is ``t`` and a weight is ``exp(t * factor - lse)``. Without a softcap ``t = q.k`` and ``factor = scale``;
with one ``t = tanh(q.k * inner)``, ``inner = scale / softcap`` and ``factor = softcap``. :func:`score_factors` computes
both numbers on the host.

Addresses are 64 bit: every index is widened before it is multiplied by a stride.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from molsaki_kernels._triton.decorators import jit
from molsaki_kernels._triton.integers import next_power_of_2
from molsaki_kernels.spec import AttentionOptions

# Float32 divisions and exponentials as exact as the interpreter's. On NVIDIA GPUs ``/`` and ``tl.exp2`` of float32 are
# approximations with errors of about two units in the last place, which would use up error budget in float32.
EXACT_MATH = tl.constexpr(os.environ.get("MOLSAKI_EXACT_MATH") == "1")
INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(math.log2(math.e))
LN2_HIGH = tl.constexpr(0.693359375)  # 9 bits: its product with a small whole number is exact
LN2_LOW = tl.constexpr(math.log(2) - 0.693359375)
FAR = tl.constexpr(2**30)  # the position of a key token that is padding or past the end of its sequence


def score_factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """``(factor, inner)`` of the module's docstring."""
    return (scale, 0.0) if softcap is None else (softcap, scale / softcap)


def score_flags(q: Tensor, options: AttentionOptions, cu_seqlens: Tensor | None) -> dict[str, Any]:
    """The compile-time arguments of every kernel that computes scores.

    Products of float32 inputs are full float32 unless PyTorch's own TF32 switch is on. The switch is read as
    ``fp32_precision``: reading ``allow_tf32`` raises once anybody has set the other.
    """
    tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return dict(
        D=q.shape[3],
        BD=next_power_of_2(q.shape[3]),
        CAUSAL=options.causal,
        HAS_WINDOW=options.window is not None,
        HAS_SOFTCAP=options.softcap is not None,
        PACKED=cu_seqlens is not None,
        PRECISION="tf32" if tf32 else "ieee",
    )


@jit
def locate(i_g, cu_seqlens, M, N, ROWS: tl.constexpr, PACKED: tl.constexpr):
    """Tile ``i_g`` of the whole batch -> sequence, batch index, tile within the sequence, first row, length.

    Packed sequence n owns the tiles from ``cu_seqlens[n] // ROWS + n`` on. These are never fewer than it needs, so a
    grid of ``total // ROWS + N`` tiles covers any lengths, and the host need not know them. Tiles past the end of
    their sequence do nothing.
    """
    if PACKED:
        before = i_g * 0
        for n0 in tl.range(0, N, 128, num_stages=1):
            n = n0 + tl.arange(0, 128)
            first = tl.load(cu_seqlens + n, mask=n < N, other=0) // ROWS + n
            before += tl.sum(((n < N) & (first <= i_g)).to(tl.int32), 0)
        i_n = before - 1
        bos = tl.load(cu_seqlens + i_n).to(tl.int32)
        length = tl.load(cu_seqlens + i_n + 1).to(tl.int32) - bos
        i_t = i_g - (bos // ROWS + i_n)
        i_b = i_n * 0
    else:
        tiles = tl.cdiv(M, ROWS)
        i_n = i_g // tiles
        i_t = i_g % tiles
        bos = i_n * 0
        length = bos + M
        i_b = i_n
    return i_n, i_b, i_t, bos, length


@jit
def first_tile(i_n, bos, M, ROWS: tl.constexpr, PACKED: tl.constexpr):
    """Sequence ``i_n``'s first tile in the whole batch, the inverse of :func:`locate`."""
    if PACKED:
        return bos // ROWS + i_n
    else:
        return i_n * tl.cdiv(M, ROWS)


@jit
def load_rows(p, rows, length, D: tl.constexpr, BD: tl.constexpr, CHECK: tl.constexpr):
    """A ``[len(rows), BD]`` tile; dimensions from D on, and with CHECK rows from ``length`` on, are zeros."""
    d = tl.arange(0, BD)
    if CHECK:
        if D == BD:
            return tl.load(p, mask=(rows < length)[:, None], other=0.0)
        else:
            return tl.load(p, mask=(rows < length)[:, None] & (d < D)[None, :], other=0.0)
    else:
        if D == BD:
            return tl.load(p)
        else:
            return tl.load(p, mask=(d < D)[None, :], other=0.0)


@jit
def store_rows(p, x, rows, length, D: tl.constexpr, BD: tl.constexpr):
    """Store ``x [len(rows), BD]`` in the dtype of ``p``, without rows from ``length`` on and dimensions from D on."""
    d = tl.arange(0, BD)
    tl.store(p, x.to(p.dtype.element_ty), mask=(rows < length)[:, None] & (d < D)[None, :])


@jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in float32. NumPy has no bfloat16, so the interpreter multiplies in float32."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@jit
def divide(a, b):
    """``a / b``, correctly rounded with EXACT_MATH."""
    if EXACT_MATH:
        return tl.math.div_rn(a, b)
    else:
        return a / b


@jit
def tanh(x):
    """Accurate to float32 rounding (Cephes): an odd polynomial near zero, where ``1 - 2 / (exp(2x) + 1)`` cancels."""
    z = x * x
    near = -5.70498872745e-3 * z + 2.06390887954e-2
    near = near * z - 5.37397155531e-2
    near = near * z + 1.33314422036e-1
    near = near * z - 3.33332819422e-1
    near = near * z * x + x
    far = 1.0 - divide(2.0, tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, far)


@jit
def capped(s, inner, HAS_SOFTCAP: tl.constexpr):
    """The score tile ``t`` of the products ``s = q.k``."""
    if HAS_SOFTCAP:
        return tanh(s * inner)
    else:
        return s


@jit
def exp(x):
    """Accurate to float32 rounding for x <= 88; ``exp2(x log2(e))`` has the rounding error of the product."""
    x = tl.maximum(x, -150.0)
    n = tl.floor(x * LOG2E + 0.5)
    fraction = tl.exp2((x - n * LN2_HIGH - n * LN2_LOW) * LOG2E)
    if EXACT_MATH:
        # 2^n by its exponent bits, 0 where it is no normal float32: one approximation fewer.
        bits = tl.where(n < -126.0, 0, (n.to(tl.int32) + 127) << 23)
        return fraction * bits.to(tl.float32, bitcast=True)
    else:
        return tl.exp2(n) * fraction


@jit
def weights(t, lse, factor, visible, EXACT: tl.constexpr):
    """``exp(t * factor - lse)``, 0 where not ``visible`` (None: all keys are visible); lse broadcasts.

    One multiply-add and one exp2, unless EXACT (float32 inputs).
    """
    x = t * factor - lse if EXACT else t * (factor * LOG2E) - lse * LOG2E
    if visible is not None:
        x = tl.where(visible, x, float("-inf"))
    return exp(x) if EXACT else tl.exp2(x)


@jit
def is_visible(rows, columns, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Return whether keys ``columns`` are visible to queries ``rows`` of the same sequence; the arguments broadcast."""
    visible = (rows == rows) & (columns == columns)
    if CAUSAL:
        visible = columns <= rows
    if HAS_WINDOW:
        visible = visible & (columns > rows - window)
    return visible


@jit
def is_key_token_visible(rows, token, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """:func:`is_visible` for key tokens; padding (position FAR) is not visible, which costs no test with CAUSAL."""
    if CAUSAL:
        return is_visible(rows, token, window, CAUSAL, HAS_WINDOW)
    else:
        return is_visible(rows, token, window, CAUSAL, HAS_WINDOW) & (token < FAR)


@jit
def key_range(m0, length, window, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Keys visible to rows ``[m0, m0 + BM)``: all in ``[a, b)``, some in ``[lo, a)`` and ``[b, hi)`` (needs a mask)."""
    lo = m0 * 0
    hi = length
    full = length
    a = m0 * 0
    if CAUSAL:
        hi = tl.minimum(length, m0 + BM)
        full = tl.minimum(length, m0 + 1)
    if HAS_WINDOW:
        lo = tl.maximum(m0 - window + 1, 0) // BN * BN
        a = tl.minimum(tl.cdiv(tl.maximum(m0 + BM - window, 0), BN), tl.cdiv(hi, BN)) * BN
    b = tl.maximum(a, full // BN * BN)
    return lo, a, b, hi


@jit
def query_range(n0, length, window, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Queries that keys ``[n0, n0 + BN)`` are visible to: all in ``[a, b)``, some in ``[lo, a)`` and ``[b, hi)``."""
    lo = n0 * 0
    hi = length
    full = length
    a = n0 * 0
    if HAS_WINDOW:
        hi = tl.minimum(length, n0 + BN - 1 + window)
        full = tl.minimum(length, n0 + window)
    if CAUSAL:
        lo = n0 // BM * BM
        a = tl.minimum(tl.cdiv(n0 + BN - 1, BM), tl.cdiv(hi, BM)) * BM
    b = tl.maximum(a, full // BM * BM)
    return lo, a, b, hi


@jit
def load_steps(steps, s, S):
    """``[start, stop)`` of steps ``s`` of one sequence; (0, 0) from S on."""
    start = tl.load(steps + 2 * s, mask=s < S, other=0).to(tl.int32)
    stop = tl.load(steps + 2 * s + 1, mask=s < S, other=0).to(tl.int32)
    return start, stop


@jit
def steps_in(steps, S, first, stop):
    """The steps ``[lo, hi)`` that contain a row of ``[first, stop)``; ``hi = 0`` if none does."""
    lo = first * 0 + S
    hi = first * 0
    for s0 in tl.range(0, S, 128, num_stages=1):
        s = s0 + tl.arange(0, 128)
        s_start, s_stop = load_steps(steps, s, S)
        hit = (s_stop > first) & (s_start < stop) & (s_stop > s_start)
        lo = tl.minimum(lo, tl.min(tl.where(hit, s, S), 0))
        hi = tl.maximum(hi, tl.max(tl.where(hit, s + 1, 0), 0))
    return lo, hi


@jit
def step_of(steps, S, rows, s_lo, s_hi, BS: tl.constexpr):
    """The step that contains each row, -1 if none does: int32, shaped as ``rows``."""
    step = rows * 0 - 1
    for s0 in tl.range(s_lo, s_hi, BS, num_stages=1):
        s = s0 + tl.arange(0, BS)
        start, stop = load_steps(steps, s, S)
        inside = (rows[:, None] >= start[None, :]) & (rows[:, None] < stop[None, :])  # [BM, BS]
        step = tl.maximum(step, tl.max(tl.where(inside, s[None, :], -1), 1))
    return step


@jit
def columns_in(tokens, words, C, first, last):
    """The key tokens ``[lo, hi)`` with a position in ``[first, last]``; positions ascend. ``hi = 0`` for none."""
    lo = first * 0 + C
    hi = first * 0
    for c0 in tl.range(0, C, 128, num_stages=1):
        c = c0 + tl.arange(0, 128)
        token = tl.load(tokens + c, mask=c < C, other=0).to(tl.int32)
        word = tl.load(words + c, mask=c < C, other=-1).to(tl.int32)
        hit = (word >= 0) & (token >= first) & (token <= last)
        lo = tl.minimum(lo, tl.min(tl.where(hit, c, C), 0))
        hi = tl.maximum(hi, tl.max(tl.where(hit, c + 1, 0), 0))
    return lo, hi


@jit
def load_columns(tokens, words, c, c_hi, length):
    """Position and word of key tokens ``c``; FAR and -1 for padding, past ``c_hi`` and past the sequence."""
    word = tl.load(words + c, mask=c < c_hi, other=-1).to(tl.int32)
    token = tl.load(tokens + c, mask=c < c_hi, other=0).to(tl.int32)
    inside = (word >= 0) & (token < length)
    return tl.where(inside, token, FAR), tl.where(inside, word, -1)


@jit
def gather_keys(p_k, stride_km, token, D: tl.constexpr, BD: tl.constexpr, end=FAR):
    """The key vectors of the key tokens: ``[BC, BD]``, zeros for padding and from position ``end`` on."""
    d = tl.arange(0, BD)
    p = p_k + token.to(tl.int64)[:, None] * stride_km + d[None, :]
    return tl.load(p, mask=(token < end)[:, None] & (d < D)[None, :], other=0.0)


@jit
def one_hot(index, BS: tl.constexpr, EXACT: tl.constexpr):
    """``[len(index), BS]``, row i one at ``index[i]``; zeros where that is outside ``[0, BS)``."""
    e = (index[:, None] == tl.arange(0, BS)[None, :]).to(tl.float32)
    if EXACT:
        return e
    else:
        return e.to(tl.bfloat16)


@jit
def two_parts(x):
    """Two bfloat16 numbers whose sum is the float32 x to 16 bits.

    The first is x cut off after 8 bits, not rounded: a conversion and its inverse take more instructions.
    """
    high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), (x - high).to(tl.bfloat16)


@jit
def dot_one_hot(x, e, acc):
    """``acc + x @ e`` for float32 x and one-hot e. For a bfloat16 e, x is split into two bfloat16 parts (16 bits)."""
    if e.dtype == tl.float32:
        return dot(x, e, acc, "ieee")
    else:
        high, low = two_parts(x)
        acc = dot(high, e, acc, "ieee")
        return dot(low, e, acc, "ieee")


@jit
def column_weights(
    k, q, lse, token, rows, factor, inner, window,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Transposed weights of the key tokens ``[BC, BM]`` and their score tile.

    Rows past the end have ``lse = inf``, so their weights are 0.
    """
    t = capped(dot(k, tl.trans(q), None, PRECISION), inner, HAS_SOFTCAP)  # [BC, BM]
    visible = is_key_token_visible(rows[None, :], token[:, None], window, CAUSAL, HAS_WINDOW)  # [BC, BM]
    return weights(t, lse[None, :], factor, visible, q.dtype == tl.float32), t


@jit
def step_sums(
    q, lse, step, rows, length, s_lo, s_hi, c_lo, c_hi, p_k, stride_km, tokens, words, partial, C,
    factor, inner, window,
    D: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head's map of one tile of rows: ``partial[s, c] = sum of P[i, token c]`` over the tile's rows i of step s.

    q ``[BM, BD]`` is in registers. ``partial`` points to the tile's slot of step 0 and has C floats per slot.
    """
    EXACT: tl.constexpr = q.dtype == tl.float32
    for c0 in tl.range(c_lo, c_hi, BC, num_stages=1):
        c = c0 + tl.arange(0, BC)
        token, word = load_columns(tokens, words, c, c_hi, length)
        k = gather_keys(p_k, stride_km, token, D, BD)
        p, _ = column_weights(k, q, lse, token, rows, factor, inner, window, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PRECISION)
        for s0 in tl.range(s_lo, s_hi, BS, num_stages=1):
            sums = dot_one_hot(p, one_hot(step - s0, BS, EXACT), tl.zeros([BC, BS], tl.float32))  # [BC, BS]
            s = s0 + tl.arange(0, BS)
            p_partial = partial + s.to(tl.int64)[None, :] * C + c[:, None]
            tl.store(p_partial, sums, mask=(c < c_hi)[:, None] & (s < s_hi)[None, :])


@jit
def load_upstream(dmaps, step, word, W, weight):
    """``g [BM, BC]``, the map's gradient of each row's step and key token's word times ``weight``; 0 outside both."""
    inside = (step >= 0)[:, None] & (word >= 0)[None, :]
    return tl.load(dmaps + step.to(tl.int64)[:, None] * W + word[None, :], mask=inside, other=0.0) * weight


@jit
def weighted_upstream(
    q, k, lse, g, step, token, rows, factor, inner, window,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``P g [BM, BC]`` and the score tile. A row in no step has weights of 0, whatever its q and lse are."""
    t = capped(dot(q, tl.trans(k), None, PRECISION), inner, HAS_SOFTCAP)  # [BM, BC]
    if CAUSAL:  # a row of -1 sees no key, which costs no test in the loop over key tokens
        rows = tl.where(step >= 0, rows, -1)
    visible = is_key_token_visible(rows[:, None], token[None, :], window, CAUSAL, HAS_WINDOW)
    if not CAUSAL:
        visible = visible & (step >= 0)[:, None]
    return weights(t, lse[:, None], factor, visible, q.dtype == tl.float32) * g, t


@jit
def column_gradient(
    q, lse, dq, step, rows, length, c_lo, c_hi, p_k, stride_km, tokens, words, dmaps, W, weight, factor, inner, window,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dq [BM, BD]`` plus the key tokens' part of it, without the scale, and ``dlse [BM] = -sum_j P g``."""
    dlse = tl.zeros([BM], tl.float32)
    for c0 in tl.range(c_lo, c_hi, BC, num_stages=1):
        c = c0 + tl.arange(0, BC)
        token, word = load_columns(tokens, words, c, c_hi, length)
        k = gather_keys(p_k, stride_km, token, D, BD)  # [BC, BD]
        g = load_upstream(dmaps, step, word, W, weight)
        ds, t = weighted_upstream(
            q, k, lse, g, step, token, rows, factor, inner, window, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PRECISION
        )
        dlse -= tl.sum(ds, 1)
        if HAS_SOFTCAP:
            ds *= 1.0 - t * t
        dq = dot(ds.to(k.dtype), k, dq, PRECISION)
    return dq, dlse
