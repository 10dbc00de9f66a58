"""Loads causal language models and their tokenizers; errors name the flag at fault."""

from __future__ import annotations

import json
import os
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from molsaki import extras
from molsaki.config import require


def load_tokenizer(name: str, flag: str = "tokenizer") -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name, with a padding token; error messages call it ``flag``."""
    return check_tokenizer(cast(PreTrainedTokenizerBase, _load(AutoTokenizer, name, flag)), flag)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, flag: str) -> PreTrainedTokenizerBase:
    """Refuse a tokenizer without offsets or end token. One without a padding token gets its end token for it."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{flag}: {type(tokenizer).__name__} gives no character offsets; expected a fast tokenizer (tokenizer.json)"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{flag}: the tokenizer has no end token (eos_token), which a trained model needs to stop")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name: str,
    flag: str = "model",
    dtype: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    quantize: Literal["none", "8bit", "4bit"] = "none",
) -> PreTrainedModel:
    """The causal language model of a folder or hub name, in evaluation mode; error messages call it ``flag``.

    Args:
        dtype: ``"auto"`` for the checkpoint's own, or a torch dtype's name.
        device_map: as in ``from_pretrained``, or the same as JSON; the CPU if None and not quantised.
        quantize: bits of the weights of linear layers, by bitsandbytes; 4 means its NF4.

    Raises:
        ValueError: there is no such model, or bitsandbytes cannot run on this machine's devices.
        ImportError: bitsandbytes is needed and not installed.
    """
    if isinstance(device_map, str) and device_map.startswith("{"):
        try:
            device_map = json.loads(device_map)
        except json.JSONDecodeError as error:
            raise ValueError(f"--device_map: expected a name or JSON, got {device_map!r}: {error}") from None
    options = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype), "device_map": device_map}
    if quantize != "none":
        extras.require("quantize", by=f"--quantize: {quantize}")
        compute = torch.bfloat16 if dtype == "auto" else options["dtype"]
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute}
        bits = {"load_in_8bit": True} if quantize == "8bit" else four
        options["quantization_config"] = BitsAndBytesConfig(**bits)  # type: ignore[no-untyped-call]
    model = cast(PreTrainedModel, _load(AutoModelForCausalLM, name, flag, **options))
    model.eval()  # type: ignore[no-untyped-call]
    return model


def load_for_command(
    config: Any,
    field: str,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that a field of a command's config names, and its tokenizer, or those given instead.

    Args:
        config: has the field and ``dtype``.
        options: further ones of `load_model`.
    """
    if (model is None) != (tokenizer is None):
        raise ValueError(f"{field}, tokenizer: expected both or neither, got one of them")
    name = require(config, field) if model is None else None
    model, tokenizer = load_both(model, tokenizer, name, f"--{field}", config.dtype, **options)
    model.eval()  # type: ignore[no-untyped-call]
    return model, tokenizer


def load_both(
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    name: str | None,
    flag: str,
    dtype: str,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer; those that are not given are loaded from ``name``."""
    if model is None:
        if name is None:
            raise ValueError(f"{flag}: required: a folder or hub name, or the model itself from Python")
        model = load_model(name, flag, dtype, **options)
    if tokenizer is None:
        tokenizer = load_tokenizer(name or str(model.name_or_path), flag)
    return model, check_tokenizer(tokenizer, flag)


def context_length(model_config: PretrainedConfig) -> int | None:
    """The longest text in tokens that a model supports, if its config says so."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None)


def _load(auto_class: Any, name: str, flag: str, **options: Any) -> Any:
    if not isinstance(name, str):
        raise TypeError(f"{flag}: expected a folder or hub name, got {type(name).__name__}")
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not os.path.isdir(os.path.expanduser(name)):
        raise ValueError(f"{flag}: no such folder: {name}")
    try:
        return auto_class.from_pretrained(os.path.expanduser(name) if is_path else name, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{flag}: cannot load {name!r} as a model folder or hub name: {reason}") from error
