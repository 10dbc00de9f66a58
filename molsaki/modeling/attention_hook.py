"""The attention implementation "molsaki" of Hugging Face models: transformers calls `attention` and `attention_mask`.

Importing this module registers both. Without a mask function of the same name transformers passes no mask, and
attention is not causal. A map is computed under a `CompactMask` or for packed texts. Under any other mask (left
padding, a cache, a model's own pattern) attention equals the model's eager implementation, and a plan is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from molsaki.batches.shared_prefix import SharedPrefix
from molsaki.modeling.chunked_attention import chunked_attention
from molsaki.modeling.compact_mask import CompactMask
from molsaki.modeling.mask_function import active_record, attention_mask
from molsaki.modeling.masked_attention import masked_attention, suffix_attention
from molsaki_kernels import StepPlan, stepwise_attention
from molsaki_kernels.masking import visible

if TYPE_CHECKING:
    from molsaki.modeling.record import Record

NAME = "molsaki"
SPARSE = frozenset({"block_indices", "indices"})  # the keys or blocks of keys that each query sees
# Keywords that models pass to every attention function and that have no effect there. position_ids have been applied to
# queries and keys already; the packed texts that they separate are in the mask.
WITHOUT_EFFECT = frozenset({
    "cache_position", "cu_seq_lens_k", "deterministic", "labels", "layer_idx", "logits_to_keep", "max_length_k",
    "max_length_q", "num_items_in_batch", "output_hidden_states", "output_router_logits", "past_key_value",
    "past_key_values", "position_embeddings", "position_ids", "return_dict", "seq_idx", "token_type_ids", "use_cache",
})  # fmt: skip


def register() -> None:
    """Register the attention implementation and its mask function with transformers; importing this module calls it."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: CompactMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    step_plan: StepPlan | None = None,
    step_record: Record | None = None,
    cu_seq_lens_q: Tensor | None = None,
    shared_prefix: SharedPrefix | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with transformers' signature: out ``(B, M, H, Dv)`` and the map ``(N, S, W)``, None without a plan.

    Args:
        query: ``(B, Hq, M, D)``. key: ``(B, Hkv, M, D)``, or longer than the queries with a cache. value: ``(B, Hkv, M,
            Dv)``.
        attention_mask: None means as in transformers' "sdpa": causal if ``is_causal``, else that all keys are visible.
        dropout: of the weights that give the output; the map uses the weights before dropout.
        is_causal: the module's own ``is_causal`` if None; without one, a mask of None hides nothing.
        sliding_window: used if the mask does not determine what is visible.
        position_bias: ``(B or 1, Hq, M, M)``, added to the scores; not with a plan.
        step_plan: of this batch, passed as a keyword of the model's forward, with ``output_attentions=True``.
        step_record: where `capture` collects maps and values; it has its own plan.
        cu_seq_lens_q: ``(N + 1,)`` bounds of the texts in a packed sequence.
        shared_prefix: where the suffixes are in a packed sequence; plan, map and pooled values cover the whole texts
            only.

    Raises:
        ValueError: a keyword is unknown, or the map of the plan cannot be computed; the message says why.
    """
    _refuse_unknown(kwargs)
    compact = attention_mask if isinstance(attention_mask, CompactMask) else None
    record = step_record or (active_record() if compact is None else compact.record)
    plan = step_plan if record is None else record.plan
    if record is not None and cu_seq_lens_q is None:
        cu_seq_lens_q, shared_prefix = record.cu_seqlens, record.shared_prefix
    cu_seqlens = _bounds(cu_seq_lens_q, query, compact, shared_prefix)
    if output_attentions and plan is None:
        raise ValueError('step_plan: expected a StepPlan with output_attentions=True under "molsaki", got None')
    if is_causal is None:
        is_causal = getattr(module, "is_causal", attention_mask is not None)  # cross-attention may lack it
    is_whole = key.shape[2] == query.shape[2]
    if attention_mask is None and is_causal and not is_whole and query.shape[2] > 1:
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]  # the rest of a static cache is empty
        is_whole = plan is None
    if compact is not None and not is_whole:
        raise ValueError(
            f"attention_mask: {type(module).__name__} has {key.shape[2]} keys for {query.shape[2]} queries under the "
            'mask of whole texts (compressed keys?); "molsaki" does not support this attention'
        )
    scores: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux}
    is_packed = cu_seqlens is not None
    if is_packed and (isinstance(attention_mask, Tensor) or position_bias is not None or not is_causal):
        found = "a mask" if isinstance(attention_mask, Tensor) else "a position_bias or attention that is not causal"
        raise ValueError(
            "cu_seq_lens_q: expected packed texts under causal attention with an attention_mask of None, or without "
            f"padding; {type(module).__name__} has {found}"
        )
    is_plain = is_causal and is_whole and attention_mask is None and query.shape[2] > 1
    is_stepwise = position_bias is None and (is_packed or is_plain or compact is not None)
    if plan is None and not is_packed and compact is not None and not compact.is_checked:
        is_stepwise = False
    if not is_stepwise:
        if plan is not None:
            raise ValueError(
                _why_no_map(module, query, key, attention_mask, record, position_bias is not None, is_causal)
            )
        mask = attention_mask.tensor() if isinstance(attention_mask, CompactMask) else attention_mask
        if mask is None and position_bias is not None and is_causal:
            position = torch.arange(key.shape[2], device=query.device)
            mask = visible(position[-query.shape[2] :], position, True, None)
        out = masked_attention(query, key, value, mask, dropout=dropout, bias=position_bias, **scores)
        return out.transpose(1, 2).contiguous(), None

    window, chunk = (sliding_window, None) if compact is None else (compact.window, compact.chunk)
    if record is not None and record.length is not None and record.length != query.shape[2]:
        raise ValueError(
            f"step_plan: the model's attention has {query.shape[2]} tokens where its forward was given "
            f"{record.length}; tokens that a model puts before the text (prompt tuning, images) would shift the plan"
        )
    if compact is not None and not compact.is_checked:
        compact.check(cu_seqlens)
    elif compact is not None and compact.padding is not None and is_packed:
        raise ValueError("attention_mask: expected no padding with packed texts (cu_seq_lens_q), got some")
    lengths = None if compact is None or cu_seqlens is not None else compact.lengths
    suffixes = None
    if shared_prefix is not None:
        if cu_seqlens is None:
            raise ValueError("shared_prefix: expected with cu_seq_lens_q, the bounds of packed texts, got None")
        if chunk is not None:
            raise ValueError("shared_prefix: expected no attention in chunks, which would cut the prefix elsewhere")
        whole = query.shape[2] - len(shared_prefix.suffixes)
        shared = shared_prefix.to(query.device)
        suffixes = suffix_attention(query[:, :, whole:], key, value, shared, window=window, dropout=dropout, **scores)
        query, key, value = (t[:, :, :whole] for t in (query, key, value))
        cu_seqlens = cu_seqlens[: len(shared_prefix) + 1]
    sequences = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if plan is None:
        used = _empty_plan(sequences, query.device)
    else:
        used = plan.to(query.device)
        if record is None or record.is_first_layer:
            _check_plan(used, sequences, lengths)
    options = {**scores, "cu_seqlens": cu_seqlens}
    if record is not None and record.map_heads == "each":
        options["head_reduction"] = "none"
    if chunk is None or chunk >= query.shape[2]:
        out, maps = stepwise_attention(query, key, value, used, window=window, **options)
    else:
        out, maps = chunked_attention(query, key, value, used, chunk, **options)
    if dropout:
        position = torch.arange(query.shape[2], device=query.device)
        mask = visible(position, position, True, window)
        start = torch.zeros_like(position)
        if cu_seqlens is not None:
            text = torch.searchsorted(cu_seqlens[1:], position, right=True)
            mask, start = mask & (text[:, None] == text), cu_seqlens[text]
        if chunk is not None:
            mask = mask & ((position - start)[:, None] // chunk == (position - start) // chunk)
        out = masked_attention(query, key, value, mask, dropout=dropout, **scores)
    if record is not None:
        maps = record.add(module, maps, query.shape[1], value, lengths, cu_seqlens)
    out = out.transpose(1, 2)
    out = out.contiguous() if suffixes is None else torch.cat([out, suffixes.to(out.dtype)], 1)
    return out, None if plan is None else maps


def _empty_plan(sequences: int, device: torch.device) -> StepPlan:
    """A plan without steps and words, which also works in a compiled graph."""
    none = torch.zeros(sequences, 0, dtype=torch.int64, device=device)
    return StepPlan(none[..., None].expand(-1, -1, 2), none, none, none.bool(), none.bool(), extents=())


def _bounds(
    cu_seq_lens_q: Tensor | None, query: Tensor, compact: CompactMask | None, shared_prefix: SharedPrefix | None
) -> Tensor | None:
    """The bounds ``(N + 1,)`` int32 of packed texts: as given, else derived from the positions in the mask."""
    told = None if compact is None else compact.cu_seqlens
    if cu_seq_lens_q is None:
        return told
    if not isinstance(cu_seq_lens_q, Tensor) or cu_seq_lens_q.dim() != 1 or cu_seq_lens_q.is_floating_point():
        raise ValueError(f"cu_seq_lens_q: expected a tensor (N + 1,) of integers, got {cu_seq_lens_q!r}")
    bounds = cu_seq_lens_q.to(query.device, torch.int32)
    if compact is not None and told is not None and shared_prefix is None and not compact.is_compared:
        if not torch.equal(told, bounds.unique_consecutive()):
            raise ValueError(
                f"cu_seq_lens_q: expected the bounds at which position_ids start again, {told.tolist()}, "
                f"got {bounds.tolist()}"
            )
        compact.is_compared = True
    return bounds


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    for name, given in kwargs.items():
        if given is not None and name in SPARSE:
            raise ValueError(f'{name}: the attention implementation "molsaki" does not support sparse attention')
        if given is not None and name not in WITHOUT_EFFECT:
            raise ValueError(
                f'{name}: the attention implementation "molsaki" does not know this keyword, which a model passed to '
                "its attention; the result could be wrong without it"
            )


def _why_no_map(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Any,
    record: Record | None,
    has_bias: bool,
    is_causal: bool,
) -> str:
    """The error message that says why this call has no map."""
    if has_bias:
        reason = "position_bias, which is added to the scores"
    elif not is_causal:
        reason = "attention that is not causal"
    elif record is not None and record.why_no_map is not None and isinstance(mask, Tensor):
        reason = record.why_no_map
    elif isinstance(mask, Tensor):
        reason = f"a mask of shape {tuple(mask.shape)} (left padding, a cache, or a pattern of its own)"
    else:
        reason = f"{query.shape[2]} queries with {key.shape[2]} keys"
    return (
        "step_plan: expected a right-padded or packed batch of whole texts under causal attention, without a cache; "
        f"{type(module).__name__} has {reason}"
    )


def _check_plan(plan: StepPlan, sequences: int, lengths: Tensor | None) -> None:
    if len(plan) != sequences:
        raise ValueError(f"step_plan: expected one entry for each of {sequences} sequences, got {len(plan)}")
    if lengths is None:
        return
    if torch.compiler.is_compiling():
        ends = torch.cat([plan.steps[..., 1], (plan.tokens + 1) * (plan.word_of_token >= 0)], 1)
        torch._assert_async((ends <= lengths[:, None]).all(), "step_plan: it reaches into the padding of a sequence")
        return
    for n, (extent, tokens) in enumerate(zip(plan.extents, lengths.tolist(), strict=True)):
        if extent > tokens:
            raise ValueError(
                f"step_plan: sequence {n} has {tokens} tokens before its padding; the plan reaches {extent}"
            )


register()
