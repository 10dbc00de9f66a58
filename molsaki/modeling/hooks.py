"""The attention implementation "molsaki" for Hugging Face models, and `capture`, which collects its maps.

Importing this module registers the implementation and a mask function of the same name: without the latter
transformers hands over no mask at all and causality is lost. For the usual causal mask, with or without a window and
right padding, nothing of size M x M is made: the mask is a `CompactMask`. Any other mask (left padding, a cache,
bidirectional blocks) is transformers' boolean one, and the map is refused there.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from molsaki.batches.shared_prefix import Branches
from molsaki_kernels import StepPlan, pool_values, stepwise_attention
from molsaki_kernels.reference import visible

NAME = "molsaki"


@dataclasses.dataclass(frozen=True)
class CompactMask:
    """A causal mask in a few numbers: ``lengths (B,)`` of right-padded rows (None: no padding), a window or None."""

    lengths: Tensor | None
    window: int | None


class Record:
    """What `capture` collects: one entry a layer of the last forward."""

    def __init__(self, plan: StepPlan, values: bool, value_heads: str, pooling: str):
        self.plan = plan
        self._values, self._value_heads, self._pooling = values, value_heads, pooling
        self._open = False
        self._grad = False
        self._ran = False
        self._layers: dict[int, tuple[Tensor, Tensor | None]] = {}

    @property
    def maps(self) -> Tensor:
        """``(N, L, S, W)`` float32 stepwise maps of every layer (Eq. 2 and 3), differentiable."""
        return torch.stack([maps.to(self._device()) for maps, _ in self._recorded()], dim=1)

    @property
    def values(self) -> Tensor:
        """``(N, L, Hkv * D)`` float32 pooled value vectors of every layer (Eq. 5's h), differentiable."""
        if not self._values:
            raise ValueError("values: this record holds none; use capture(..., values=True)")
        return torch.stack([values.to(self._device()) for _, values in self._recorded()], dim=1)

    def _recorded(self) -> list[tuple[Tensor, Tensor | None]]:
        if not self._ran:
            raise ValueError("capture: no forward of the model has run inside the block yet")
        if not self._layers:
            raise ValueError("capture: the model's forward hands no extra keywords to its attention; no map was made")
        return [self._layers[index] for index in sorted(self._layers)]

    def _device(self) -> torch.device:
        return next(iter(self._layers.values()))[0].device

    def _start(self) -> None:
        self._open, self._ran, self._grad = True, True, torch.is_grad_enabled()
        self._layers = {}

    def _stop(self) -> None:
        self._open = False

    def _add(self, layer: int, maps: Tensor, value: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None) -> None:
        values = None
        if self._values:
            values = pool_values(value, lengths, pooling=self._pooling, heads=self._value_heads, cu_seqlens=cu_seqlens)
        if not self._open:
            return  # gradient checkpointing runs a layer again in the backward, and must find the same operations
        if self._grad and not torch.is_grad_enabled():
            raise ValueError(
                "capture: the layers run without gradients inside a forward with gradients, as under gradient "
                'checkpointing with use_reentrant=True, which loses the map\'s; use {"use_reentrant": False}'
            )
        if layer in self._layers:
            raise ValueError(f"capture: layer {layer} ran twice in one forward; expected one attention a layer index")
        self._layers[layer] = (maps, values)


@contextlib.contextmanager
def capture(
    model: nn.Module,
    plan: StepPlan,
    values: bool = False,
    *,
    value_heads: str = "concat",
    pooling: str = "sum",
) -> Iterator[Record]:
    """Collect the stepwise maps of every layer from the model's forwards inside the block.

    Sets the attention implementation "molsaki" and restores the one before, also after an exception.

    Args:
        model: a Hugging Face model, or a wrapper (DDP, PEFT) around one whose forward passes keywords on.
        plan: of the batch that will be run; right-padded, or packed with ``cu_seq_lens_q`` in the forward's keywords.
        values: also collect Eq. 5's pooled value vectors; padding stays out.
        value_heads, pooling: as `pool_values`' ``heads`` and ``pooling``.

    Yields:
        A record with ``maps (N, L, S, W)`` and, if asked for, ``values (N, L, Hkv * D)``, of the last forward.

    Raises:
        TypeError: ``model`` holds no Hugging Face model, or ``plan`` is not a StepPlan.
        ValueError: (from the forward) the plan is of another batch, or the batch is left-padded.
    """
    if not isinstance(plan, StepPlan):
        raise TypeError(f"plan: expected a StepPlan, got {type(plan).__name__}")
    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if inner is None:
        raise TypeError(f"model: expected a Hugging Face model or a wrapper around one, got {type(model).__name__}")
    record = Record(plan, values, value_heads, pooling)

    def start(_, args, kwargs):
        record._start()
        return args, {**kwargs, "step_plan": plan, "step_record": record}

    handles = [
        model.register_forward_pre_hook(start, with_kwargs=True),
        model.register_forward_hook(lambda *_: record._stop(), always_call=True),
    ]
    previous = inner.config._attn_implementation
    try:
        if previous != NAME:
            inner.set_attn_implementation(NAME)
        yield record
    finally:
        for handle in handles:
            handle.remove()
        record._stop()
        if previous != NAME:
            inner.set_attn_implementation(previous)


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
    branches: Branches | None = None,
    output_attentions: bool | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers calls it: out ``(B, M, H, D)`` and the map ``(N, S, W)``, None without a plan.

    Args:
        query: ``(B, Hq, M, D)``. key, value: ``(B, Hkv, M, D)``, or longer than the queries with a cache.
        step_plan: of this batch; passed as an extra keyword of the model's forward, with ``output_attentions=True``.
        cu_seq_lens_q: where the texts of a packed row begin and end.
        branches: which of those are tails of the first N; plan, map and pooled values are of the latter.
        dropout: applied to the output's weights; the map is of the undropped ones.
    """
    if output_attentions and step_plan is None:
        raise ValueError('step_plan: expected a StepPlan with output_attentions=True under "molsaki", got None')
    window = _window(attention_mask, sliding_window)
    lengths = attention_mask.lengths if isinstance(attention_mask, CompactMask) else None
    plain = dict(scale=scaling, softcap=softcap, sinks=s_aux)
    if not (isinstance(attention_mask, CompactMask) or cu_seq_lens_q is not None):
        if step_plan is not None:
            raise ValueError(
                "step_plan: expected a right-padded batch under plain causal attention (no cache, no left padding, no "
                f"custom mask), got a mask {None if attention_mask is None else tuple(attention_mask.shape)} "
                f"for queries {tuple(query.shape)} and keys {tuple(key.shape)}"
            )
        return _masked(query, key, value, attention_mask, dropout, **plain).transpose(1, 2).contiguous(), None

    cu_seqlens = None if cu_seq_lens_q is None else cu_seq_lens_q.to(torch.int32)
    tails = None
    if branches is not None:
        if cu_seqlens is None:
            raise ValueError("branches: expected with cu_seq_lens_q, the bounds of a packed row, got None")
        query, tails = query.split([query.shape[2] - len(branches.tails), len(branches.tails)], 2)
        tails = _branched(tails, key, value, branches.to(query.device), window, dropout, **plain)
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        cu_seqlens = cu_seqlens[: len(branches) + 1]
    sequences = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    layer = getattr(module, "layer_idx", None) or 0
    if step_plan is None:
        plan = StepPlan.from_spans([[]] * sequences, [[]] * sequences, device=query.device)
    else:
        plan = step_plan.to(query.device)
        if layer == 0 and lengths is not None:
            _check_lengths(plan, lengths)
    out, maps = stepwise_attention(query, key, value, plan, window=window, cu_seqlens=cu_seqlens, **plain)
    if dropout:
        row = torch.arange(query.shape[2], device=query.device)
        mask = visible(row, row, True, window)
        if cu_seqlens is not None:
            text = torch.searchsorted(cu_seqlens[1:], row, right=True)
            mask = mask & (text[:, None] == text)
        out = _masked(query, key, value, mask, dropout, **plain)
    if step_plan is None:
        maps = None
    elif step_record is not None:
        step_record._add(layer, maps, value, lengths, cu_seqlens)
    out = out.transpose(1, 2)
    return out.contiguous() if tails is None else torch.cat([out, tails.to(out.dtype)], 1), maps


def attention_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs,
) -> CompactMask | Tensor | None:
    """The mask as transformers asks for it: compact where it is causal and right-padded, else transformers' own."""
    position = kwargs.get("cache_position")  # transformers 4 says so where the queries are
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
    return sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, attention_mask)


def _window(mask: CompactMask | Tensor | None, sliding_window: int | None) -> int | None:
    """The window that mask and model agree on."""
    if isinstance(mask, CompactMask) and mask.window != sliding_window:
        if mask.window is None:  # a layer of full attention in a model that names its window everywhere
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


def _branched(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    branches: Branches,
    window: int | None,
    dropout: float,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention ``(1, n, Hq, D)`` of the tails' ``query (1, Hq, n, D)`` over ``key`` and ``value`` of the whole row."""
    (N, T), kv_heads = branches.queries.shape, key.shape[1]
    groups = query.shape[1] // kv_heads
    first = key.shape[2] - query.shape[2]

    def rows(t: Tensor, index: Tensor) -> Tensor:
        """``(1, H, M, D)`` to ``(N, H, number, D)``, of ``index (N, number)``."""
        return t[0].transpose(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)

    # The heads of a group are rows of one head, so that no key is there twice.
    query = rows(query, branches.keys.gather(1, branches.queries) - first)
    query = query.unflatten(1, (kv_heads, groups)).flatten(2, 3)  # (N, Hkv, groups * T, D)
    if sinks is not None:
        sinks = sinks.view(kv_heads, groups).repeat_interleave(T, 1)
    column = torch.arange(branches.keys.shape[1], device=key.device)
    mask = visible(branches.queries.flatten(), column, True, window).view(N, 1, T, -1).repeat(1, 1, groups, 1)
    key, value = rows(key, branches.keys), rows(value, branches.keys)
    out = _masked(query, key, value, mask, dropout, scale, softcap, sinks)
    out = out.unflatten(2, (groups, T)).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)  # (N * T, Hq, D)
    return out.index_select(0, branches.tails)[None]


def _masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention under an explicit mask ``(..., M, n)``, boolean or additive, for what has no map: generation, dropout,
    tails. ``sinks`` are ``(Hq,)``, or ``(Hq, M)`` where rows have their own."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    if softcap is None and sinks is None:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale
        )
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        sinks = sinks.view(1, query.shape[1], -1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks.to(scores)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))[..., : key.shape[2]]
    return nn.functional.dropout(weights.to(value.dtype), dropout) @ value
