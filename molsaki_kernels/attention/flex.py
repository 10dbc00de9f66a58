"""Engine "flex": PyTorch's FlexAttention, which returns lse and takes its gradient.

Unlike the other engines' this forward is differentiable and stays outside the custom operator: flex's backward is
reachable through autograd only (the higher-order operator behind it takes traced graphs and changes between releases),
and a second forward inside the operator would cost a third of the whole. So flex is composed with the map's operator,
``torch.compile`` traces through both, and autograd adds their dq and dk, which is one more pass over each than the
other engines need.

A mask function hides keys within the blocks that ``BlockMask`` calls partial; which blocks are empty, partial or full
follows from the geometry, without looking at every pair. Gradients and lse exist compiled and on CUDA only; uncompiled,
flex materialises all weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from molsaki_kernels._capability import why_too_old
from molsaki_kernels._triton.support import INSTALLED
from molsaki_kernels.attention.sinks import apply_sinks
from molsaki_kernels.spec import (
    AttentionInputs,
    AttentionOptions,
    AttentionOutputs,
    AttentionRequest,
    InputGradients,
    OutputGradients,
    PlanTensors,
)

if TYPE_CHECKING:  # imported where it is used: the import takes a second
    from torch.nn.attention.flex_attention import BlockMask

NAME = "flex"
COMPUTES_MAP = False
DIFFERENTIABLE = True
BLOCK = 128  # rows and columns of a block, flex's own default
RECOMPILATIONS = 64  # of flex for other dtypes, head counts and masks; beyond torch's default of 8 a call would fail

_packed_masks = WeakTensorKeyDictionary()  # cu_seqlens -> (its version, {(length, causal, window): mask})


def available() -> str | None:
    """Return the reason why this machine cannot run compiled FlexAttention, or None."""
    if not INSTALLED:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "no GPU: FlexAttention's lse and backward are compiled for CUDA only"
    return None


def why_not(request: AttentionRequest) -> str | None:
    """Return the reason why the engine cannot serve a call, or None."""
    if request.device.type != "cuda":
        return f"FlexAttention's lse and backward are for CUDA only, not for {request.device.type} tensors"
    if (reason := why_too_old(request.device)) is not None:
        return reason
    if request.dtype == torch.float64:
        return "compiled FlexAttention takes bfloat16, float16 and float32, not torch.float64"
    if request.head_dim < 16:
        return f"compiled FlexAttention takes head_dim 16 and more, not {request.head_dim}"
    return None


def takes_value_dim(request: AttentionRequest, value_dim: int) -> bool:
    """Return whether v has at least 16 columns: its width need not be that of q and k."""
    return value_dim >= 16


def forward(inputs: AttentionInputs, options: AttentionOptions, plan: PlanTensors) -> AttentionOutputs:
    """Compute out in q's dtype and lse in float32, both differentiable in q, k, v and sinks."""
    q, k, v = inputs.q, inputs.k, inputs.v
    if q.numel() == 0:
        lse = q.sum(-1, dtype=torch.promote_types(q.dtype, torch.float32))
        return AttentionOutputs(q[..., :1].expand(*q.shape[:3], v.shape[3]).clone(), lse)
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    # Not compiled separately if the caller is being compiled as a whole.
    attend: Any = flex_attention if torch.compiler.is_compiling() else compiled()
    out, auxiliary = attend(
        q,
        k,
        v,
        score_mod=None if options.softcap is None else _capped(options.softcap, q),
        block_mask=_mask(inputs, options),
        scale=options.scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if inputs.sinks is None:
        return AttentionOutputs(out, auxiliary.lse)
    return AttentionOutputs(*apply_sinks(out, auxiliary.lse, inputs.sinks))


def backward(
    gradients: OutputGradients,
    inputs: AttentionInputs,
    outputs: AttentionOutputs,
    options: AttentionOptions,
    plan: PlanTensors,
) -> InputGradients:
    """Refuse: autograd differentiates :func:`forward`."""
    raise RuntimeError("engine flex: its forward is differentiated by autograd and it has no backward of its own")


@functools.cache
def compiled() -> Callable[..., Any]:
    """Return ``flex_attention``, compiled. It raises if it cannot be compiled and never materialises the weights."""
    from torch.nn.attention.flex_attention import flex_attention

    # A softcap that changes must not become a symbol: no score_mod can hold one.
    settings = torch._dynamo.config.patch(recompile_limit=RECOMPILATIONS, specialize_float=True)
    function: Callable[..., Any] = settings(torch.compile(flex_attention, fullgraph=True))
    return function


def _capped(softcap: float | Tensor, q: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    if not isinstance(softcap, Tensor) and torch.compiler.is_compiling():  # the softcap may be a symbol there
        softcap = torch.full((), softcap, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


def _mask(inputs: AttentionInputs, options: AttentionOptions) -> BlockMask | None:
    """Return the call's block mask; masks are kept for the latest geometries, those of packed sequences while
    cu_seqlens lives."""
    q, cu_seqlens = inputs.q, inputs.cu_seqlens
    M, causal, window = q.shape[2], options.causal, options.window
    if torch.compiler.is_compiling():
        return _make_mask(M, causal, window, q.device, cu_seqlens)
    if cu_seqlens is None:
        return kept_mask(M, causal, window, q.device)
    # A replay has to use the current values of cu_seqlens, and an inference tensor has no version.
    if cu_seqlens.is_inference() or (q.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _make_mask(M, causal, window, q.device, cu_seqlens)
    version = (cu_seqlens._version, cu_seqlens.data_ptr())
    known_version, masks = _packed_masks.get(cu_seqlens, (None, None))
    if known_version != version:
        masks = {}
        _packed_masks[cu_seqlens] = (version, masks)
    key = (M, causal, window)
    if key not in masks:
        with torch.inference_mode(False):  # flex's backward saves the mask's tensors
            masks[key] = _make_mask(M, causal, window, q.device, cu_seqlens)
    mask: BlockMask | None = masks[key]
    return mask


@functools.lru_cache(maxsize=16)
def kept_mask(M: int, causal: bool, window: int | None, device: torch.device) -> BlockMask | None:
    """Return the block mask of a geometry, computed once; None if every key is visible."""
    with torch.inference_mode(False):
        return _make_mask(M, causal, window, device, None)


def _make_mask(
    M: int, causal: bool, window: int | None, device: torch.device, cu_seqlens: Tensor | None
) -> BlockMask | None:
    """Compute a block mask: blocks without a visible pair are skipped, those with all pairs visible are not masked.

    It does not wait for a device.
    """
    from torch.nn.attention.flex_attention import BlockMask

    if not causal and window is None and cu_seqlens is None:
        return None
    first = torch.arange(-(-M // BLOCK), device=device) * BLOCK
    last = (first + BLOCK).clamp(max=M) - 1
    nearest, farthest = first[:, None] - last, last[:, None] - first  # the range of row - column in a block
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
    partial_count, partial_columns = _listed(some & ~full)
    full_count, full_columns = _listed(full)
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_columns,
        full_count,
        full_columns,
        BLOCK_SIZE=BLOCK,
        mask_mod=_visible(causal, window, sequence),
        seq_lengths=(M, M),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of set blocks per row of blocks and their columns first: ``(1, 1, n)`` and ``(1, 1, n, n)``."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


def _visible(
    causal: bool, window: int | None, sequence: Tensor | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def mask_mod(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        visible = column <= row if causal else column >= 0
        if window is not None:
            visible = visible & (column > row - window)
        if sequence is not None:
            visible = visible & (sequence[row] == sequence[column])
        return visible

    return mask_mod
