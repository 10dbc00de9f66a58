"""`Record`: what one forward of a model recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from molsaki.batches.shared_prefix import SharedPrefix
from molsaki.modeling.mask_function import active_record, bounds_of, set_active_record
from molsaki.modeling.packing_probe import can_pack
from molsaki.modeling.sequence_parallel import refuse_sequence_parallelism
from molsaki.modeling.tensor_parallel import head_group
from molsaki_kernels import StepPlan, pool_values


class Record:
    """The maps and pooled values of the last forward inside a `capture` block, one entry per call of attention.

    Attributes:
        cu_seqlens: ``(N + 1,)`` bounds of the packed texts of the running forward, None if they are not packed.
        shared_prefix: of the running forward.
        has_ended: whether the block is over.
        why_no_map: the reason why the last explicit mask of the running forward is not compact.
        length: tokens of each sequence of the running forward, None if it is not known.
        uses_checkpointing: whether layers of the model are checkpointed.
        calling_layer: the number of the running decoder layer, if the attention modules do not know theirs.
    """

    def __init__(
        self, plan: StepPlan, values: bool, value_heads: str, pooling: str, map_heads: str, model: PreTrainedModel
    ):
        self.plan = plan
        self.map_heads = map_heads
        self.cu_seqlens: Tensor | None = None
        self.shared_prefix: SharedPrefix | None = None
        self.has_ended = False
        self.why_no_map: str | None = None
        self.length: int | None = None
        self.uses_checkpointing = False
        self.calling_layer: int | None = None
        self._outer: Record | None = None  # the record of the block in whose forward this one runs
        self._has_values, self._value_heads, self._pooling = values, value_heads, pooling
        self._heads = head_group(model)
        self._is_open = self._has_grad = self._has_run = False
        self._layers: list[int] = []
        self._maps: list[Tensor] = []
        self._values: list[Tensor] = []

    @property
    def layers(self) -> tuple[int, ...]:
        """The decoder layer of each of the L maps, in the order in which they were computed.

        It is the ``layer_idx`` of the attention module, or the number of the layer where layers share one attention
        (Zamba). Layers without attention are missing, and a layer with two calls of attention appears twice.
        """
        self._check_has_run()
        return tuple(self._layers)

    @property
    def maps(self) -> Tensor:
        """``(N, L, S, W)`` float32 stepwise maps of the attention of every layer (Eq. 2 and 3), differentiable.

        With ``map_heads="each"``: of every head, those of the first layer first, ``(N, L * H, S, W)``.
        """
        self._check_has_run()
        if self.map_heads == "mean" or not self._maps:
            return self._stacked(self._maps)
        return torch.cat([maps.to(self._maps[0].device) for maps in self._maps], dim=1)

    @property
    def maps_per_layer(self) -> tuple[int, ...]:
        """The number of maps of each entry of ``layers``: 1, or with ``map_heads="each"`` its number of heads."""
        self._check_has_run()
        return tuple(maps.shape[1] if self.map_heads == "each" else 1 for maps in self._maps)

    @property
    def values(self) -> Tensor:
        """``(N, L, Hkv * Dv)`` float32 pooled value vectors of every layer (Eq. 5's h), differentiable."""
        if not self._has_values:
            raise ValueError("values: this record holds none; use capture(..., values=True)")
        self._check_has_run()
        widths = sorted({values.shape[-1] for values in self._values})
        if len(widths) > 1:
            raise ValueError(
                f"values: the layers of this model have value vectors of different widths ({widths}), which cannot be "
                'stacked; use capture(..., value_heads="mean") if only the numbers of heads differ'
            )
        return self._stacked(self._values)

    @property
    def is_first_layer(self) -> bool:
        """Whether nothing was recorded yet in the running forward."""
        return self._is_open and not self._layers

    def _check_has_run(self) -> None:
        if not self._has_run:
            raise ValueError("capture: no forward of the model has run inside the block yet")

    def _stacked(self, tensors: list[Tensor]) -> Tensor:
        if not tensors:
            raise ValueError("capture: the last forward failed, so there are no maps")
        return torch.stack([tensor.to(tensors[0].device) for tensor in tensors], dim=1)

    def add(
        self,
        module: nn.Module,
        maps: Tensor,
        heads: int,
        value: Tensor,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        """Record one call of attention, as the attention function does, and return its map.

        Args:
            maps: ``(N, S, W)``, the mean over ``heads`` query heads, or ``(N, H, S, W)``, one per head; under tensor
                parallelism only the heads of this process.
            value: ``(B, Hkv, M, Dv)``.
            lengths: ``(B,)`` tokens before the padding, None if there is none.
            cu_seqlens: ``(N + 1,)`` bounds of packed sequences.
        """
        if self._heads is not None:
            together = self._heads.mean if self.map_heads == "mean" else self._heads.gather_queries
            maps = together(maps, heads, module)
            if self._has_values:
                value = self._heads.gather(value, module)
        values = None
        if self._has_values:
            values = pool_values(value, lengths, pooling=self._pooling, heads=self._value_heads, cu_seqlens=cu_seqlens)
        if not self._is_open:
            return maps  # Gradient checkpointing repeats a layer in the backward, with the same operations.
        if self._has_grad and not torch.is_grad_enabled():
            why = (
                "as under gradient checkpointing with use_reentrant=True, which loses the gradient of the map; use "
                '{"use_reentrant": False}'
                if self.uses_checkpointing
                else "as in a model that repeats its layers under no_grad, which is not supported"
            )
            raise ValueError(
                f"capture: {type(module).__name__} runs without gradients inside a forward with gradients, {why}"
            )
        layer = getattr(module, "layer_idx", None) if self.calling_layer is None else self.calling_layer
        layer = 0 if layer is None else layer
        if self._layers and layer < self._layers[-1]:
            raise ValueError(
                f"capture: layer {layer} ran after layer {self._layers[-1]} in one forward; expected one pass over the "
                "layers in their order, not a model that repeats them or a wrapper that runs the model twice"
            )
        self._layers.append(layer)
        self._maps.append(maps)
        if values is not None:
            self._values.append(values)
        return maps

    def start(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_sequence_parallelism()
        self._is_open, self._has_run, self._has_grad = True, True, torch.is_grad_enabled()
        self._forget()
        self.why_no_map = self.calling_layer = None
        given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]]
        self.length = next(
            (tokens.shape[1] for tokens in given if isinstance(tokens, Tensor) and tokens.dim() > 1), None
        )
        self.shared_prefix = kwargs.get("shared_prefix")
        self.cu_seqlens = kwargs.get("cu_seq_lens_q")
        if self.cu_seqlens is None:
            self.cu_seqlens = _bounds_of_positions(kwargs.get("position_ids"), kwargs.get("attention_mask"))
        if self.cu_seqlens is None or len(self.cu_seqlens) <= 2:
            return
        if kwargs.get("position_ids") is None and can_pack(model) and not can_pack(model, positions=False):
            raise ValueError(
                "position_ids: expected positions that start again in each packed text (cu_seq_lens_q), which "
                f"{type(model).__name__} needs, got None"
            )
        if not can_pack(model):
            raise ValueError(
                f"cu_seq_lens_q: {type(model).__name__} does not keep packed texts separate (it may use convolutions, "
                "a recurrent state or absolute positions); expected one text per sequence, right-padded"
            )

    def _forget(self) -> None:
        self._layers, self._maps, self._values = [], [], []

    def stop(self) -> None:
        # In a compiled graph no record is active, but what `start` set there stays set after it.
        if torch.compiler.is_compiling() or active_record() is self:
            set_active_record(self._outer)
        self._is_open = False
        self.cu_seqlens = self.shared_prefix = self._outer = None


def _bounds_of_positions(position_ids: Any, attention_mask: Any) -> Tensor | None:
    """The bounds ``(N + 1,)`` of packed texts that only position_ids separate; None if the positions start once.

    Raises:
        ValueError: the positions of a text do not ascend by one, or several packed sequences are in one batch.
    """
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2 or position_ids.shape[1] < 2:
        return None
    step = position_ids.diff()
    if (
        isinstance(attention_mask, Tensor)
        and attention_mask.dim() == 2
        and attention_mask.shape[1] == position_ids.shape[1]
    ):
        is_text = attention_mask.bool()
        step = torch.where(is_text[:, 1:] & is_text[:, :-1], step, 1)
    breaks = step != 1
    if not breaks.any():
        return None
    if position_ids.shape[0] != 1 or (step[breaks] > 0).any():
        raise ValueError(
            "position_ids: expected positions that ascend by one; where they start again (packed texts), expected one "
            f"sequence (batch size 1), and its bounds as cu_seq_lens_q; got shape {tuple(position_ids.shape)}"
        )
    return bounds_of(breaks[0])
