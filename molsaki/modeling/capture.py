"""`capture` records the stepwise maps of every attention layer during a model's forward."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from molsaki.batches.shared_prefix import SharedPrefix
from molsaki.modeling.compact_mask import active_record, bounds_of, set_active_record
from molsaki.modeling.decoder import decoder_configs, text_decoder, using_molsaki
from molsaki.modeling.packing_probe import can_pack
from molsaki.modeling.sequence_parallel import refuse_sequence_parallelism
from molsaki.modeling.tensor_parallel import head_group
from molsaki.modeling.unwrap import causal_model
from molsaki_kernels import StepPlan, pool_values

_captured: weakref.WeakSet[nn.Module] = weakref.WeakSet()


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

    def _start(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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

    def _stop(self) -> None:
        if active_record() is self:
            set_active_record(self._outer)
        self._is_open = False
        self.cu_seqlens = self.shared_prefix = self._outer = None


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
        structure = _structures[inner] = _examine(inner)
    record = Record(plan, values, value_heads, pooling, map_heads, inner)
    takes_keywords = structure.takes_keywords and (model is inner or _takes_keywords(model))

    def start(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        record._start(inner, args, kwargs)
        record._outer = active_record()
        set_active_record(record)
        return args, {**kwargs, "step_record": record} if takes_keywords else kwargs

    def stop(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        record._stop()
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
                    stack.enter_context(_checkpointing_under_molsaki(module, structure.configs))
            yield record
    finally:
        _captured.discard(inner.base_model)
        for handle in handles:
            handle.remove()
        record._stop()
        record.has_ended = True


@dataclasses.dataclass(frozen=True)
class _Structure:
    """The properties of a model that `capture` needs, determined once.

    Attributes:
        configs: those of `decoder_configs`, the model's own first.
        takes_keywords: whether its forward passes on unknown keywords.
        layers_to_count: the layers of the decoder if the ``layer_idx`` of its attention modules does not tell them
            apart, else nothing.
    """

    configs: list[PretrainedConfig]
    takes_keywords: bool
    layers_to_count: list[nn.Module]


_structures: weakref.WeakKeyDictionary[nn.Module, _Structure] = weakref.WeakKeyDictionary()


def _examine(model: PreTrainedModel) -> _Structure:
    """The structure of a model.

    Raises:
        ValueError: its maps cannot be computed.
    """
    name, decoder, configs = type(model).__name__, text_decoder(model), decoder_configs(model)
    modules, own = list(decoder.modules()), {id(config) for config in configs}  # not those of a vision tower
    if not any(_calls_interface(module) and id(getattr(module, "config", None)) in own for module in modules):
        if any("attention" in type(module).__name__.lower() for module in modules):
            raise ValueError(
                f"model: {name} computes attention by itself, not through transformers' attention interface "
                '(ALL_ATTENTION_FUNCTIONS), so no map can be computed; use attn_implementation="eager" with '
                "output_attentions=True for its weights"
            )
        raise ValueError(f"model: {name} has no attention layers, so it has no maps")
    return _Structure(configs, _takes_keywords(model), _layers_to_count(decoder))


def _takes_keywords(model: nn.Module) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())


def _layers_to_count(decoder: nn.Module) -> list[nn.Module]:
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and any(map(_calls_interface, m.modules()))]
    layers = list(lists[0]) if lists else []
    found = [{getattr(m, "layer_idx", None) for m in layer.modules() if _calls_interface(m)} for layer in layers]
    return layers if sum(map(len, found)) > len(set().union(*found)) else []


def _enter_layer(record: Record, index: int, *_: Any) -> None:
    record.calling_layer = index


def _calls_interface(module: nn.Module) -> bool:
    """Whether a module computes attention through transformers' attention interface."""
    kind: Any = type(module)
    return _class_calls_interface(kind)


@functools.cache
def _class_calls_interface(kind: Any) -> bool:
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is None or "ALL_ATTENTION_FUNCTIONS" in code.co_names


@contextlib.contextmanager
def _checkpointing_under_molsaki(module: nn.Module, configs: list[PretrainedConfig]) -> Iterator[None]:
    """Have a checkpointed layer run under "molsaki" again if the backward comes after the block."""
    checkpoint: Any = module._gradient_checkpointing_func

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return checkpoint(functools.partial(_run_under_molsaki, configs, function), *args, **kwargs)

    module._gradient_checkpointing_func = call  # type: ignore[assignment]
    try:
        yield
    finally:
        module._gradient_checkpointing_func = checkpoint


def _run_under_molsaki(configs: list[PretrainedConfig], function: Callable[..., Any], *args: Any) -> Any:
    with using_molsaki(configs):
        return function(*args)


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
