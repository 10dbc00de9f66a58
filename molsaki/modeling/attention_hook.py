"""The attention implementation "molsaki" of Hugging Face models: transformers calls `attention` and `attention_mask`.

Importing this module registers both. Without a mask function of the same name transformers passes no mask, and
attention is not causal. The usual causal mask, with or without a window and right padding, is a `CompactMask`, which
takes no memory of size M x M. Any other mask (left padding, a cache, bidirectional blocks) is transformers' boolean
one, and no map can be computed under it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from molsaki.batches.shared_prefix import SharedPrefix
from molsaki.modeling.masked_attention import masked_attention, suffix_attention
from molsaki_kernels import StepPlan, stepwise_attention
from molsaki_kernels.masking import visible

if TYPE_CHECKING:
    from molsaki.modeling.capture import Record

NAME = "molsaki"


def register() -> None:
    """Register the attention implementation and its mask function with transformers; importing this module does it."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)


@dataclasses.dataclass(frozen=True)
class CompactMask:
    """A causal mask in a few numbers: ``lengths (B,)`` of right-padded sequences (None: no padding), and a window."""

    lengths: Tensor | None
    window: int | None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: CompactMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    step_plan: StepPlan | None = None,
    step_record: Record | None = None,
    cu_seq_lens_q: Tensor | None = None,
    shared_prefix: SharedPrefix | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with transformers' signature: out ``(B, M, H, D)`` and the map ``(N, S, W)``, None without a plan.

    Args:
        query: ``(B, Hq, M, D)``. key, value: ``(B, Hkv, M, D)``, or longer than the queries with a cache.
        dropout: of the weights that give the output; the map is of the undropped weights.
        step_plan: of this batch, passed as a keyword of the model's forward, with ``output_attentions=True``.
        step_record: where `capture` collects maps and values.
        cu_seq_lens_q: ``(N + 1,)`` bounds of the texts in a packed sequence.
        shared_prefix: where the suffixes are in a packed sequence; plan, map and pooled values are of the whole texts.
    """
    if output_attentions and step_plan is None:
        raise ValueError('step_plan: expected a StepPlan with output_attentions=True under "molsaki", got None')
    window = _window(attention_mask, sliding_window)
    lengths = attention_mask.lengths if isinstance(attention_mask, CompactMask) else None
    scores: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux}
    if not isinstance(attention_mask, CompactMask) and cu_seq_lens_q is None:
        if step_plan is not None:
            raise ValueError(
                "step_plan: expected a right-padded batch under ordinary causal attention (no cache, no left padding, "
                f"no custom mask), got a mask {None if attention_mask is None else tuple(attention_mask.shape)} "
                f"for queries {tuple(query.shape)} and keys {tuple(key.shape)}"
            )
        out = masked_attention(query, key, value, attention_mask, dropout=dropout, **scores)
        return out.transpose(1, 2).contiguous(), None

    cu_seqlens = None if cu_seq_lens_q is None else cu_seq_lens_q.to(torch.int32)
    suffixes = None
    if shared_prefix is not None:
        if cu_seqlens is None:
            raise ValueError("shared_prefix: expected with cu_seq_lens_q, the bounds of packed texts, got None")
        whole = query.shape[2] - len(shared_prefix.suffixes)
        shared = shared_prefix.to(query.device)
        suffixes = suffix_attention(query[:, :, whole:], key, value, shared, window=window, dropout=dropout, **scores)
        query, key, value = (t[:, :, :whole] for t in (query, key, value))
        cu_seqlens = cu_seqlens[: len(shared_prefix) + 1]
    sequences = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    layer = getattr(module, "layer_idx", None) or 0
    if step_plan is None:
        plan = StepPlan.from_spans([[]] * sequences, [[]] * sequences, device=query.device)
    else:
        plan = step_plan.to(query.device)
        if layer == 0 and lengths is not None:
            _check_lengths(plan, lengths)
    out, maps = stepwise_attention(query, key, value, plan, window=window, cu_seqlens=cu_seqlens, **scores)
    if dropout:
        position = torch.arange(query.shape[2], device=query.device)
        mask = visible(position, position, True, window)
        if cu_seqlens is not None:
            text = torch.searchsorted(cu_seqlens[1:], position, right=True)
            mask = mask & (text[:, None] == text)
        out = masked_attention(query, key, value, mask, dropout=dropout, **scores)
    if step_plan is not None and step_record is not None:
        step_record.add(layer, maps, value, lengths, cu_seqlens)
    out = out.transpose(1, 2)
    out = out.contiguous() if suffixes is None else torch.cat([out, suffixes.to(out.dtype)], 1)
    return out, None if step_plan is None else maps


def attention_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> CompactMask | Tensor | None:
    """The mask, with transformers' signature: compact if it is causal and right-padded, else transformers' own."""
    position = kwargs.get("cache_position")  # transformers 4 passes the queries' positions so
    if position is not None:
        length, start = position.shape[0], position[0]
    else:
        length, start = q_length, q_offset
        kwargs.update(q_length=q_length, q_offset=q_offset)
    if allow_is_causal_skip and length == kv_length and kv_offset == 0 and start == 0:
        if attention_mask is None:
            return CompactMask(None, local_size)
        mask = attention_mask.bool()
        if mask.shape[-1] == length and not (mask[:, 1:] & ~mask[:, :-1]).any():
            return CompactMask(None if mask.all() else mask.sum(-1), local_size)
    mask = sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )
    return cast("Tensor | None", mask)


def _window(mask: CompactMask | Tensor | None, sliding_window: int | None) -> int | None:
    """The window on which mask and layer agree."""
    if isinstance(mask, CompactMask) and mask.window != sliding_window:
        if mask.window is None:  # a layer of full attention in a model that passes its window to every layer
            return None
        raise ValueError(
            f"attention_mask: it is local to {mask.window} keys, but the layer asks for a sliding window of "
            f"{sliding_window}; masks other than a sliding window are not supported"
        )
    return sliding_window


def _check_lengths(plan: StepPlan, lengths: Tensor) -> None:
    if len(plan) != lengths.shape[0]:
        raise ValueError(f"step_plan: expected one entry for each of {lengths.shape[0]} sequences, got {len(plan)}")
    for n, (extent, length) in enumerate(zip(plan.extents, lengths.tolist(), strict=True)):
        if extent > length:
            raise ValueError(
                f"step_plan: sequence {n} has {length} tokens before its padding; the plan reaches {extent}"
            )


register()
