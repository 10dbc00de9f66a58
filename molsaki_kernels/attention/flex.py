"""PyTorch's FlexAttention, which hands out lse and takes its gradient: no fold, and its backward is autograd's own.

Unlike the other engines' this forward is differentiable and stays outside of the custom operator: flex's backward can
be had through autograd only (the higher-order operator behind it wants traced graphs and changes between releases), and
a second forward to re-enter autograd would cost a third of the whole. So `attention.py` composes flex with
``stepwise_map``, ``torch.compile`` sees through both, and autograd adds their dq and dk up, which is one more pass over
each than the other engines need.

A key is hidden by a mask that flex evaluates in the blocks that ``BlockMask`` calls partial; which blocks are empty,
partial or full follows from the mask's geometry, without a look at every pair. Gradients and lse exist compiled and on
CUDA only; uncompiled, flex materialises all weights.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from molsaki_kernels._triton.support import INSTALLED
from molsaki_kernels.attention.sinks import with_sinks
from molsaki_kernels.spec import AttentionOptions, AttentionRequest

if TYPE_CHECKING:  # at run time where it is used: it takes a second to import
    from torch.nn.attention.flex_attention import BlockMask

NAME = "flex"
BLOCK = 128  # rows and columns of a block, flex's own default
RECOMPILATIONS = 64  # of flex for other dtypes, head counts and masks; past torch's default of 8 a call would fail

_packed_masks = WeakTensorKeyDictionary()  # cu_seqlens -> (its version, {(length, causal, window): mask})


def available() -> str | None:
    """Why this machine cannot run compiled FlexAttention, or None."""
    if not INSTALLED:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "no GPU: FlexAttention's lse and backward are compiled for CUDA only"
    return None


def why_not(call: AttentionRequest) -> str | None:
    """Why this engine cannot do ``call``, or None."""
    if call.device.type != "cuda":
        return f"FlexAttention's lse and backward are for CUDA only, not for {call.device.type} tensors"
    if call.dtype == torch.float64:
        return "compiled FlexAttention takes bfloat16, float16 and float32, not torch.float64"
    if call.head_dim < 16:
        return f"compiled FlexAttention takes head_dim 16 and more, not {call.head_dim}"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, cu_seqlens: Tensor | None, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """out ``(B, Hq, M, D)`` in q's dtype and lse ``(B, Hq, M)`` float32, both differentiable in q, k, v and sinks."""
    if q.numel() == 0:
        return q.clone(), q.sum(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    # Uncompiled in a caller that is being compiled as a whole.
    attend = flex_attention if torch.compiler.is_compiling() else compiled()
    out, auxiliary = attend(
        q,
        k,
        v,
        score_mod=None if options.softcap is None else _capped(options.softcap, q),
        block_mask=_mask(q, cu_seqlens, options),
        scale=options.scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    return (out, auxiliary.lse) if sinks is None else with_sinks(out, auxiliary.lse, sinks)


@functools.cache
def compiled():
    """``flex_attention``, compiled; an error where it could not be, never the one that materialises."""
    from torch.nn.attention.flex_attention import flex_attention

    # A softcap that changes must not become a symbol: no score_mod can hold one.
    settings = torch._dynamo.config.patch(recompile_limit=RECOMPILATIONS, specialize_float=True)
    return settings(torch.compile(flex_attention, fullgraph=True))


def _capped(softcap: float | Tensor, q: Tensor):
    if torch.compiler.is_compiling():  # where it may be a symbol already
        softcap = torch.full((), softcap, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)

    def score_mod(score, batch, head, row, column):
        return softcap * torch.tanh(score / softcap)

    return score_mod


def _mask(q: Tensor, cu_seqlens: Tensor | None, options: AttentionOptions) -> BlockMask | None:
    """The call's block mask, kept for the geometries used last; with packed sequences, as long as cu_seqlens lives."""
    M, causal, window = q.shape[2], options.causal, options.window
    if torch.compiler.is_compiling():
        return _make_mask(M, causal, window, q.device, cu_seqlens)
    if cu_seqlens is None:
        return kept_mask(M, causal, window, q.device)
    if q.is_cuda and torch.cuda.is_current_stream_capturing():  # a replay has to follow what cu_seqlens holds then
        return _make_mask(M, causal, window, q.device, cu_seqlens)
    version = -1 if cu_seqlens.is_inference() else cu_seqlens._version
    known_version, masks = _packed_masks.get(cu_seqlens, (None, None))
    if known_version != version:
        masks = {}
        _packed_masks[cu_seqlens] = (version, masks)
    key = (M, causal, window)
    if key not in masks:
        with torch.inference_mode(False):  # flex's backward saves the mask's tensors
            masks[key] = _make_mask(M, causal, window, q.device, cu_seqlens)
    return masks[key]


@functools.lru_cache(maxsize=16)
def kept_mask(M: int, causal: bool, window: int | None, device: torch.device) -> BlockMask | None:
    """The block mask of a geometry, made once; None if every key is visible."""
    with torch.inference_mode(False):
        return _make_mask(M, causal, window, device, None)


def _make_mask(
    M: int, causal: bool, window: int | None, device: torch.device, cu_seqlens: Tensor | None
) -> BlockMask | None:
    """Blocks with no visible pair are skipped, those with all pairs visible are not masked. No device is waited for."""
    from torch.nn.attention.flex_attention import BlockMask

    if not causal and window is None and cu_seqlens is None:
        return None
    first = torch.arange(-(-M // BLOCK), device=device) * BLOCK
    last = (first + BLOCK).clamp(max=M) - 1
    nearest, farthest = first[:, None] - last, last[:, None] - first  # row - column, between these in a block
    whole = first + BLOCK <= M
    full = whole[:, None] & whole
    some = torch.ones_like(full)
    if causal:
        some, full = some & (farthest >= 0), full & (nearest >= 0)
    if window is not None:
        some, full = some & (nearest < window), full & (farthest < window)
    sequence = None
    if cu_seqlens is not None:
        row = torch.arange(M, device=device, dtype=torch.int32)
        sequence = torch.searchsorted(cu_seqlens, row, right=True, out_int32=True)
        a, b = sequence[first], sequence[last]  # ascending, so a block's sequences are those from a to b
        some = some & (a[:, None] <= b) & (a <= b[:, None])
        full = full & (a[:, None] == b) & (a == b[:, None])
    return BlockMask.from_kv_blocks(
        *_listed(some & ~full), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=_visible(causal, window, sequence),
        seq_lengths=(M, M),
    )  # fmt: skip


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are set, and which, first: ``(1, 1, n)`` and ``(1, 1, n, n)``."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


def _visible(causal: bool, window: int | None, sequence: Tensor | None):
    def mask_mod(batch, head, row, column):
        seen = column <= row if causal else column >= 0
        if window is not None:
            seen = seen & (column > row - window)
        if sequence is not None:
            seen = seen & (sequence[row] == sequence[column])
        return seen

    return mask_mod
