"""Loads causal language models and their tokenizers, with errors that name the flag at fault."""

from __future__ import annotations

import importlib.util
import json
import os
from typing import Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


def load_tokenizer(name: str, flag: str = "tokenizer") -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name, with a padding token; ``flag`` is what error messages call it.

    Raises:
        ValueError: there is none, or it gives no character offsets.
    """
    tokenizer = _load(AutoTokenizer, name, flag)
    check_tokenizer(tokenizer, flag)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, flag: str = "tokenizer") -> None:
    """Refuse a tokenizer without offsets or end token; give one without a padding token its end token for it."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{flag}: {type(tokenizer).__name__} gives no character offsets; expected a fast tokenizer (tokenizer.json)"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{flag}: the tokenizer has no end token (eos_token), which a trained model needs to stop")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def load_model(
    name: str,
    flag: str = "model",
    dtype: str = "auto",
    device_map: str | dict | None = None,
    quantize: Literal["none", "8bit", "4bit"] = "none",
) -> PreTrainedModel:
    """The causal language model of a folder or hub name, in evaluation mode; ``flag`` names it in error messages.

    Args:
        dtype: ``"auto"`` for the checkpoint's own, or a torch dtype's name.
        device_map: as in ``from_pretrained``, or the same as JSON; on the CPU if None and not quantised.
        quantize: bits of the weights of linear layers, by bitsandbytes; 4 are its NF4.

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
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ImportError(f"--quantize: {quantize} needs the package bitsandbytes, which is not installed")
        compute = torch.bfloat16 if dtype == "auto" else options["dtype"]
        options["quantization_config"] = (
            BitsAndBytesConfig(load_in_8bit=True)
            if quantize == "8bit"
            else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
        )
    return _load(AutoModelForCausalLM, name, flag, **options).eval()


def context_length(model_config) -> int | None:
    """The longest text in tokens that a model with this config was made for, if it says so."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None)


def _load(auto_class, name: str, flag: str, **options):
    if not isinstance(name, str):
        raise TypeError(f"{flag}: expected a folder or hub name, got {type(name).__name__}")
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not os.path.isdir(os.path.expanduser(name)):
        raise ValueError(f"{flag}: no such folder: {name}")
    try:
        return auto_class.from_pretrained(os.path.expanduser(name) if is_path else name, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{flag}: cannot load {name!r} as a model folder or hub name: {reason}") from error
