"""What `capture` has to know of a model: which modules compute attention, and how layers are checkpointed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from molsaki.modeling.decoder import decoder_configs, text_decoder, using_molsaki


@dataclasses.dataclass(frozen=True)
class Structure:
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


def examine(model: PreTrainedModel) -> Structure:
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
    return Structure(configs, takes_keywords(model), _layers_to_count(decoder))


def takes_keywords(model: nn.Module) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())


def _layers_to_count(decoder: nn.Module) -> list[nn.Module]:
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and any(map(_calls_interface, m.modules()))]
    layers = list(lists[0]) if lists else []
    found = [{getattr(m, "layer_idx", None) for m in layer.modules() if _calls_interface(m)} for layer in layers]
    return layers if sum(map(len, found)) > len(set().union(*found)) else []


def _calls_interface(module: nn.Module) -> bool:
    """Whether a module computes attention through transformers' attention interface."""
    kind: Any = type(module)
    return _class_calls_interface(kind)


@functools.cache
def _class_calls_interface(kind: Any) -> bool:
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is None or "ALL_ATTENTION_FUNCTIONS" in code.co_names


@contextlib.contextmanager
def checkpointing_under_molsaki(module: nn.Module, configs: list[PretrainedConfig]) -> Iterator[None]:
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
