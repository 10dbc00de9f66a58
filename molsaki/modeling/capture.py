"""`capture` records the stepwise maps of every attention layer during a model's forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from molsaki.modeling.attention_hook import NAME
from molsaki.modeling.unwrap import causal_model
from molsaki_kernels import StepPlan, pool_values


class Record:
    """The maps and pooled values of the last forward inside a `capture` block, one entry per layer."""

    def __init__(self, plan: StepPlan, values: bool, value_heads: str, pooling: str):
        self.plan = plan
        self._has_values, self._value_heads, self._pooling = values, value_heads, pooling
        self._is_open = self._has_grad = self._has_run = False
        self._maps: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    @property
    def maps(self) -> Tensor:
        """``(N, L, S, W)`` float32 stepwise maps of every layer (Eq. 2 and 3), differentiable."""
        return self._stacked(self._maps)

    @property
    def values(self) -> Tensor:
        """``(N, L, Hkv * D)`` float32 pooled value vectors of every layer (Eq. 5's h), differentiable."""
        if not self._has_values:
            raise ValueError("values: this record holds none; use capture(..., values=True)")
        return self._stacked(self._values)

    def _stacked(self, layers: dict[int, Tensor]) -> Tensor:
        if not self._has_run:
            raise ValueError("capture: no forward of the model has run inside the block yet")
        if not layers:
            raise ValueError("capture: the model's forward passes no extra keywords to its attention: no maps")
        device = next(iter(self._maps.values())).device
        return torch.stack([layers[index].to(device) for index in sorted(layers)], dim=1)

    def _start(self) -> None:
        self._is_open, self._has_run, self._has_grad = True, True, torch.is_grad_enabled()
        self._maps, self._values = {}, {}

    def _stop(self, *_: Any) -> None:
        self._is_open = False

    def add(self, layer: int, maps: Tensor, value: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None) -> None:
        """Record one layer, as the attention function calls it.

        Args:
            maps: ``(N, S, W)``.
            value: ``(B, Hkv, M, D)``.
            lengths: ``(B,)`` tokens before the padding, None if there is none.
            cu_seqlens: ``(N + 1,)`` bounds of packed sequences.
        """
        values = None
        if self._has_values:
            values = pool_values(value, lengths, pooling=self._pooling, heads=self._value_heads, cu_seqlens=cu_seqlens)
        if not self._is_open:
            return  # Gradient checkpointing repeats a layer in the backward and requires the same operations.
        if self._has_grad and not torch.is_grad_enabled():
            raise ValueError(
                "capture: the layers run without gradients inside a forward with gradients, as under gradient "
                "checkpointing with use_reentrant=True, which loses the gradient of the map; use "
                '{"use_reentrant": False}'
            )
        if layer in self._maps:
            raise ValueError(f"capture: layer {layer} ran twice in one forward; expected one attention per layer index")
        self._maps[layer] = maps
        if values is not None:
            self._values[layer] = values


@contextlib.contextmanager
def capture(
    model: nn.Module, plan: StepPlan, values: bool = False, *, value_heads: str = "concat", pooling: str = "sum"
) -> Iterator[Record]:
    """Record the stepwise maps of every layer from the model's forwards inside the block.

    Sets the attention implementation "molsaki" and restores the previous one, also after an exception.

    Args:
        model: a Hugging Face model, or a wrapper (DDP, PEFT) around one that passes keywords on.
        plan: of the batch that will be run: right-padded, or packed with ``cu_seq_lens_q`` in the forward's keywords.
        values: also record Eq. 5's pooled value vectors, without padding.
        value_heads, pooling: as `pool_values`' ``heads`` and ``pooling``.

    Yields:
        A record with ``maps (N, L, S, W)`` and, with ``values``, ``values (N, L, Hkv * D)``, of the last forward.

    Raises:
        TypeError: ``model`` holds no Hugging Face model, or ``plan`` is not a StepPlan.
        ValueError: (from the forward) the plan is of another batch, or the batch is left-padded.
    """
    if not isinstance(plan, StepPlan):
        raise TypeError(f"plan: expected a StepPlan, got {type(plan).__name__}")
    inner = causal_model(model)
    record = Record(plan, values, value_heads, pooling)

    def start(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        record._start()
        return args, {**kwargs, "step_plan": plan, "step_record": record}

    handles = [
        model.register_forward_pre_hook(start, with_kwargs=True),
        model.register_forward_hook(record._stop, always_call=True),
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
