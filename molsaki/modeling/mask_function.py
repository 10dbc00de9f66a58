"""The mask function of the attention implementation "molsaki".

transformers calls `attention_mask` for each kind of mask that a model needs. The usual ones (causal, with a window or
in chunks, right-padded) become a `CompactMask`. All others are the additive mask of transformers' eager attention.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from molsaki.modeling.compact_mask import CompactMask
from molsaki.modeling.sequence_parallel import refuse_sequence_parallelism

if TYPE_CHECKING:
    from molsaki.modeling.record import Record


class _Pattern(NamedTuple):
    """The keys that a mask function of transformers hides besides those after the query."""

    window: int | None
    chunk: int | None
    texts: Tensor | None = None  # (B, M), the packed text of each token, if position_ids separate texts


class _Active(threading.local):
    record: Record | None = None


_active = _Active()


def active_record() -> Record | None:
    """The record of the `capture` block whose forward is running in this thread. None in a compiled graph."""
    return None if torch.compiler.is_compiling() else _active.record


def set_active_record(record: Record | None) -> None:
    _active.record = record


def attention_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    *,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | CompactMask | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> CompactMask | Tensor | None:
    """The mask, with transformers' signature: compact if possible, None if a single query sees every key, else the
    additive mask ``(B, 1, q_length, kv_length)``.

    ``allow_is_bidirectional_skip`` is ignored: a mask of None has one meaning, see `attention_hook.attention`.
    """
    if isinstance(attention_mask, CompactMask):
        return attention_mask  # prepared before the model's forward
    masking = _masking_utils()
    mask_function = masking.causal_mask_function if mask_function is None else mask_function
    position = kwargs.pop("cache_position", None)  # the queries' positions in transformers 4
    length = q_length if position is None else position.shape[0]
    start = q_offset if position is None else position[0]
    where = {"q_length": q_length, "q_offset": q_offset} if position is None else {"cache_position": position}
    kwargs |= {"kv_offset": kv_offset, "mask_function": mask_function, "attention_mask": attention_mask, **where}
    build = functools.partial(masking.eager_mask, batch_size=batch_size, kv_length=kv_length, device=device, **kwargs)
    record, is_traced = active_record(), _is_traced(attention_mask)
    if not is_traced:
        refuse_sequence_parallelism()
    if length == 1 and kv_length > 1 and allow_is_causal_skip and not is_traced:
        sees_all = local_size is None or kv_length < local_size
        if sees_all and (attention_mask is None or (attention_mask.shape[-1] == kv_length and attention_mask.all())):
            return None
    reason = None
    pattern = _pattern(mask_function, local_size, kwargs.get("config"), allow_is_causal_skip, is_traced)
    padding = None if attention_mask is None else attention_mask.bool()
    if length != kv_length or kv_offset != 0 or (not is_traced and start != 0):
        reason = f"queries with a cache (queries {length}, keys {kv_length}); a plan needs a forward of whole texts"
    elif padding is not None and padding.shape[-1] != length:
        reason = f"an attention_mask of shape {tuple(padding.shape)} for {length} tokens"
    elif padding is not None and not is_traced and (padding[:, 1:] & ~padding[:, :-1]).any():
        reason = "an attention_mask that is not right-padded"
    elif pattern is not None and pattern.texts is not None and pattern.texts.shape[0] != 1:
        reason = "position_ids that start again (packed texts) in a batch of several; expected one packed sequence"
    if reason is not None:
        return _explicit(build, record, reason)
    if padding is not None and not is_traced and padding.all():
        padding = None
    is_checked = not is_traced or (padding is None and allow_is_causal_skip)
    # A model-specific pattern, such as image blocks, may happen to hide the same keys as a usual mask.
    windows = {local_size, getattr(kwargs.get("config"), "sliding_window", None)}
    for window, chunk, texts in [_Pattern(window, None) for window in windows] if pattern is None else [pattern]:
        cu_seqlens = None if texts is None else bounds_of(texts[0].diff() != 0)
        numbers = (batch_size, kv_length, padding, window, chunk, cu_seqlens)
        mask = CompactMask(build, *numbers, record=record, is_checked=is_checked)
        if pattern is not None or (record is not None and mask.hides_the_same()):
            return mask
    return _explicit(build, record, "a mask of the model's own pattern, which is not causal, local or in chunks")


def _explicit(build: Callable[[], Tensor], record: Record | None, reason: str) -> Tensor:
    if record is not None:
        record.why_no_map = reason
    return build()


def _pattern(
    function: Callable[..., Any], local_size: int | None, config: Any, allow_is_causal_skip: bool, is_traced: bool
) -> _Pattern | None:
    """The pattern of a mask function, None if it is another one or the model needs the elements of the mask.

    ``allow_is_causal_skip`` is False if the function may be arbitrary or the model operates on the mask. A compiled
    graph cannot inspect the function: there its pattern is checked by its values (`CompactMask.check`).
    """
    if allow_is_causal_skip or is_traced:
        is_chunk = local_size is not None and local_size == getattr(config, "attention_chunk_size", None)
        if is_chunk and local_size == getattr(config, "sliding_window", None):
            return None
        return _Pattern(None, local_size) if is_chunk else _Pattern(local_size, None)
    window = chunk = texts = None
    for part in _parts(function):
        code = getattr(part, "__code__", None)
        if code is _code_of("sliding_window_overlay", 1):
            window = _enclosed(part)["sliding_window"]
        elif code is _code_of("chunked_overlay", 1, None):
            chunk = _enclosed(part)["chunk_size"]
        elif code is _code_of("packed_sequence_mask_function", None):
            texts = _enclosed(part)["packed_sequence_mask"]
        elif part is not _masking_utils().causal_mask_function:
            return None
    return None if texts is None else _Pattern(window, chunk, texts)


def bounds_of(starts: Tensor) -> Tensor:
    """The bounds ``(N + 1,)`` int32 of packed texts; ``starts (M - 1,)``: whether a text starts at the next token."""
    first = starts.nonzero()[:, 0] + 1
    return torch.cat([first.new_zeros(1), first, first.new_full((1,), len(starts) + 1)]).int()


def _parts(function: Callable[..., Any]) -> Iterator[Any]:
    if getattr(function, "__code__", None) is _code_of("and_masks", _visible_everywhere):
        for part in _enclosed(function)["mask_functions"]:
            yield from _parts(part)
    else:
        yield function


@functools.cache
def _code_of(factory: str, *arguments: Any) -> Any:
    """The code object of the mask functions that a factory of transformers returns."""
    return getattr(_masking_utils(), factory)(*arguments).__code__


def _is_traced(mask: Tensor | None) -> bool:
    """Whether the values of tensors cannot be read: torch.compile, export, jit.trace, capture of a CUDA graph."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    is_tracing = getattr(_masking_utils(), "is_tracing", None)  # transformers 5
    return is_tracing is not None and bool(is_tracing(mask))


def _visible_everywhere(*_: Any) -> bool:
    return True


def _masking_utils() -> Any:
    """transformers' module, imported late: importing transformers imports this module (registration.py).

    It is imported by one of its names: torch.compile of PyTorch 2.11 refuses to trace an import from the package
    ``transformers`` itself, which is a lazy module.
    """
    from transformers.masking_utils import __name__ as name

    return sys.modules[name]


def _enclosed(function: Any) -> dict[str, Any]:
    return {
        name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, function.__closure__, strict=True)
    }
