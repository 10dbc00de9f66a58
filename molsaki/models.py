"""Loads causal language models and their tokenizers, with errors that name the flag at fault."""

from __future__ import annotations

import os

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


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


def load_model(name: str, flag: str = "model", dtype: str = "auto", device_map: str | None = None) -> PreTrainedModel:
    """The causal language model of a folder or hub name, in evaluation mode; ``flag`` names it in error messages.

    Args:
        dtype: ``"auto"`` for the checkpoint's own, or a torch dtype's name.
        device_map: as in ``from_pretrained``; on the CPU if None.

    Raises:
        ValueError: there is no such model.
    """
    dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    return _load(AutoModelForCausalLM, name, flag, dtype=dtype, device_map=device_map).eval()


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
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{flag}: cannot load {name!r} as a model folder or hub name: {reason}") from error
