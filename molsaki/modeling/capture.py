"""`capture` records the stepwise maps of every attention layer during a model's forward."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from molsaki.modeling.decoder import using_molsaki
from molsaki.modeling.mask_function import active_record, set_active_record
from molsaki.modeling.record import Record
from molsaki.modeling.structure import Structure, checkpointing_under_molsaki, examine, takes_keywords
from molsaki.modeling.unwrap import causal_model
from molsaki_kernels import StepPlan

_captured: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextlib.contextmanager
def capture(
    model: nn.Module,
    plan: StepPlan,
    values: bool = False,
    *,
    value_heads: str = "concat",
    pooling: str = "sum",
    map_heads: str = "mean",
) -> Iterator[Record]:
    """Record the stepwise maps of every layer from the model's forwards inside the block.

    Sets the attention implementation "molsaki" in the text decoder and restores the previous one, also after an
    exception. Under tensor parallelism each process gets the maps and values of all heads.

    Args:
        model: a Hugging Face model, or a wrapper around one (DDP, PEFT) that forwards keywords.
        plan: of the batch that will be run: right-padded, or packed with ``cu_seq_lens_q`` in the forward's keywords.
        values: also record Eq. 5's pooled value vectors, without padding.
        value_heads, pooling: as `pool_values`' ``heads`` and ``pooling``.
        map_heads: ``"mean"``, one map per layer, the mean over its query heads; ``"each"``, one per head.

    Yields:
        A record with ``maps (N, L, S, W)`` or ``(N, L * H, S, W)``, their ``layers`` and, with ``values``, ``values (N,
        L, Hkv * Dv)``, of the last forward.

    Raises:
        TypeError: ``model`` holds no Hugging Face model, or ``plan`` is not a StepPlan.
        ValueError: the model does not use transformers' attention interface, or it is in another `capture` block; from
            the forward: the plan is of another batch, or the model's attention has no map (the message says why).
    """
    if not isinstance(plan, StepPlan):
        raise TypeError(f"plan: expected a StepPlan, got {type(plan).__name__}")
    if map_heads not in ("mean", "each"):
        raise ValueError(f'map_heads: expected "mean" or "each", got {map_heads!r}')
    inner = causal_model(model)
    modules = list(model.modules())
    if any(isinstance(module, nn.DataParallel) for module in modules):
        raise ValueError(
            "model: expected no nn.DataParallel, which gives each replica a part of the batch but the whole plan; use "
            "DistributedDataParallel"
        )
    if inner.base_model in _captured:
        name = type(inner).__name__
        raise ValueError(f"model: {name} is in a capture block already; expected one block at a time for a model")
    own = set(inner.modules())
    if any(isinstance(module, PreTrainedModel) and module not in own for module in modules):
        raise ValueError(
            f"model: expected a wrapper around one Hugging Face model, got {type(model).__name__} around several; "
            "pass the one whose maps are wanted"
        )
    structure = _structures.get(inner)
    if structure is None or structure.configs[0] is not inner.config:
        structure = _structures[inner] = examine(inner)
    record = Record(plan, values, value_heads, pooling, map_heads, inner)
    passes_keywords = structure.takes_keywords and (model is inner or takes_keywords(model))

    def start(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        record.start(inner, args, kwargs)
        record._outer = active_record()
        set_active_record(record)
        return args, {**kwargs, "step_record": record} if passes_keywords else kwargs

    def stop(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        record.stop()
        if output is None:
            record._forget()  # the forward ended with an exception
        elif not record._layers:
            raise ValueError(
                f"capture: no attention of {type(inner).__name__} was computed by transformers' attention interface, "
                "so there are no maps"
            )

    handles = [
        model.register_forward_pre_hook(start, with_kwargs=True),
        model.register_forward_hook(stop, always_call=True),
    ]
    for index, layer in enumerate(structure.layers_to_count):
        handles.append(layer.register_forward_pre_hook(functools.partial(_enter_layer, record, index)))
    _captured.add(inner.base_model)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(using_molsaki(structure.configs))
            for module in modules:
                if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func"):
                    record.uses_checkpointing = True
                    stack.enter_context(checkpointing_under_molsaki(module, structure.configs))
            yield record
    finally:
        _captured.discard(inner.base_model)
        for handle in handles:
            handle.remove()
        record.stop()
        record.has_ended = True


_structures: weakref.WeakKeyDictionary[nn.Module, Structure] = weakref.WeakKeyDictionary()


def _enter_layer(record: Record, index: int, *_: Any) -> None:
    record.calling_layer = index
