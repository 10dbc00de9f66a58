"""The text decoder of a Hugging Face model, and its attention implementation."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from molsaki.modeling.attention_hook import NAME


def text_decoder(model: PreTrainedModel) -> nn.Module:
    """The text decoder inside a model, which may have other parts such as a vision tower."""
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    return decoder if isinstance(decoder, PreTrainedModel) else model


def decoder_configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    """The configs that choose the attention implementation and the masks of a model's text decoder."""
    parts = getattr(model.config, "sub_configs", {})
    others = [getattr(model.config, name, None) for name in parts if any(word in name for word in ("vision", "audio"))]
    found: list[Any] = [model.config, model.base_model.config, model.config.get_text_config()]
    found += [
        m.config for m in text_decoder(model).modules() if isinstance(getattr(m, "config", None), PretrainedConfig)
    ]
    return [config for config in {id(c): c for c in found}.values() if not any(config is other for other in others)]


_in_use: dict[int, tuple[int, str | None]] = {}  # id of a config: blocks that use it, implementation before the first
_lock = threading.Lock()


@contextlib.contextmanager
def using_molsaki(configs: list[PretrainedConfig]) -> Iterator[None]:
    """Set the attention implementation "molsaki" in these configs, not in their parts; restore the previous ones.

    Models may share a config: it is restored when the last block that uses it ends, whatever the order of the blocks.
    """
    with _lock:
        for config in configs:
            blocks, previous = _in_use.get(id(config), (0, config._attn_implementation))
            _in_use[id(config)] = blocks + 1, previous
            config._attn_implementation_internal = NAME  # the property would set it in the parts too
    try:
        yield
    finally:
        with _lock:
            for config in configs:
                blocks, previous = _in_use.pop(id(config))
                if blocks > 1:
                    _in_use[id(config)] = blocks - 1, previous
                else:
                    config._attn_implementation_internal = previous
